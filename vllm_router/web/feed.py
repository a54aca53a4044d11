"""The feed: the state of the fleet, sent to all websocket clients.

A snapshot is encoded once and put into the mailboxes of all clients; each client's task sends it.
Without clients, the only work is one row of history per second.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec
import trio

from vllm_router.errors import NO_VALUES
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import Transition
from vllm_router.http.request_ids import DEMO_PREFIX
from vllm_router.observability.decisions import Decisions
from vllm_router.observability.key_usage import STEP as KEY_STEP
from vllm_router.observability.key_usage import KeyUsage
from vllm_router.observability.metrics import Metrics
from vllm_router.observability.process import cpu_seconds
from vllm_router.observability.router_state import CPU, LAG, wall_offset
from vllm_router.observability.slices import (
    SERVERS_AT_ONCE,
    VIEWS_AT_ONCE,
    each,
    in_turns,
    of_one_fleet,
)
from vllm_router.observability.sliding import Percentiles, Rate
from vllm_router.observability.stalls import LagWatch
from vllm_router.observability.tally import Tallies, failed
from vllm_router.proxy.record import Record
from vllm_router.proxy.retry import ANSWERED, Outcome
from vllm_router.steps import Steps
from vllm_router.web import events, history, schema, view
from vllm_router.web.mailbox import Mailbox
from vllm_router.web.outages import Outages
from vllm_router.web.router import Router
from vllm_router.web.shown_states import ShownStates
from vllm_router.web.turned_away import TurnedAway

_encode = msgspec.json.Encoder().encode


def _text(message: schema.Message) -> str:
    return _encode(message).decode()


_DEMO = DEMO_PREFIX.encode()


class Feed:
    """Publishes snapshots and events; also a recorder of the proxy.

    The application sets `router` before the first client connects. The stall monitor fills `lag`.
    """

    def __init__(self, fleet: Fleet, metrics: Metrics, lag: LagWatch) -> None:
        self.router: Router | None = None
        self.decisions = Decisions()
        self.key_usage = KeyUsage()
        self.unused = True
        self._fleet = fleet
        self._metrics = metrics
        self._tallies = Tallies()
        self._turned_away = TurnedAway()
        self._outages = Outages()
        self._shown = ShownStates()
        self._memory = history.Memory()
        self._events = events.EventLog(self._announce, time.time)
        self._mailboxes: set[Mailbox] = set()
        self._closed = False
        self._reading = trio.Lock()
        self._encoding = trio.Lock()
        self._seq = 0
        self._rows = 0
        self._latest = (-float("inf"), "")
        self._cpu = Rate()
        self._lag = lag

    # -- what exchanges and servers report ----------------------------------------------------

    def exchange_ended(self, record: Record) -> None:
        """Count the exchange, keep the decision, announce a request that failed everywhere."""
        self._tallies.exchange_ended(record)
        self.decisions.add(record)
        if self.unused:
            self.unused = record.request_id.startswith(_DEMO)
        if record.retries:
            if failed(record):
                self._events.exhausted(record)
            elif record.outcome is ANSWERED:
                self._turned_away.saved_total += 1

    def attempt_ended(self, server: Server, outcome: Outcome) -> None:
        self._tallies.attempt_ended(server, outcome)

    def transition(self, change: Transition) -> None:
        """Announce a server's change of state."""
        self._events.transition(change)

    def event(
        self, kind: str, text: str, code: str | None = None, values: Mapping[str, str] = NO_VALUES
    ) -> None:
        """Send an event to all clients; new clients receive the last events.

        `code` and `values` are the text for translations.
        """
        self._events.add(kind, text, code=code, values=values)

    def _announce(self, event: schema.Event) -> None:
        if not self._mailboxes:
            return
        encoded = _text(event)
        for mailbox in self._mailboxes:
            if not mailbox.put_event(encoded):
                self._metrics.feed_dropped += 1

    # -- clients ------------------------------------------------------------------------------

    async def subscribe(self, *, admin: bool) -> Mailbox:
        """A mailbox with the hello and a snapshot; the caller passes it to `unsubscribe`."""
        router = self._attached()
        async with self._encoding:
            histories = await in_turns(self._memory.encode())
        snapshot = await self._recent_snapshot()
        # No other task runs from here on: each event is in the hello or follows it, never both.
        mailbox = Mailbox()
        last = list(self._events.last)
        mailbox.put_event(_text(view.hello(router, histories, last, admin=admin)))
        self._mailboxes.add(mailbox)
        self._metrics.feed_clients = len(self._mailboxes)
        mailbox.put_snapshot(snapshot)
        if self._closed:
            mailbox.close()
        return mailbox

    def unsubscribe(self, mailbox: Mailbox) -> None:
        self._mailboxes.discard(mailbox)
        self._metrics.feed_clients = len(self._mailboxes)

    def close(self) -> None:
        """Disconnect all clients (1001), and later ones too."""
        self._closed = True
        for mailbox in self._mailboxes:
            mailbox.close()

    @staticmethod
    def missed(count: int) -> str:
        """The message for a client that was too slow for `count` events."""
        return _text(events.missed(count, time.time()))

    def _attached(self) -> Router:
        if self.router is None:
            raise RuntimeError("the feed has a client before it has a router")
        return self.router

    # -- publishing ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Tick until cancelled."""
        next_row = next_snapshot = trio.current_time()
        while True:
            await trio.sleep_until(min(next_row, next_snapshot) if self._mailboxes else next_row)
            now = trio.current_time()
            is_watched = now >= next_snapshot and bool(self._mailboxes)
            reading = await self._read(with_views=is_watched)
            if now >= next_snapshot:
                next_snapshot = _next(next_snapshot, self._fleet.settings.feed_interval, now)
                if is_watched:
                    self._seq += 1
                    encoded = self._snapshot_of(reading)
                    for mailbox in self._mailboxes:
                        mailbox.put_snapshot(encoded)
                    await trio.lowlevel.checkpoint()
            if now >= next_row:
                next_row = _next(next_row, history.INTERVAL, now)
                await self._remember(reading)

    async def _read(self, *, with_views: bool) -> view.Reading:
        """Read the fleet in slices. Two readings do not mix: the rates need ascending times."""
        async with self._reading:
            return await self._read_alone(with_views=with_views)

    async def _read_alone(self, *, with_views: bool) -> view.Reading:
        fleet, router = self._fleet, self.router
        reading = await of_one_fleet(fleet, lambda: self._pass(with_views=with_views))
        now, wall = reading.now, time.time()
        self._turned_away.read(self._metrics.refused_by_code(), now)
        self._outages.follow(reading.models.rows(now), now, wall, probed=fleet.probed)
        reloader = router.reloader if router is not None else None
        self._events.look(fleet.all_servers(), reloader)
        cpu = router.elsewhere(CPU) if router is not None else None
        self._cpu.observe(cpu_seconds() + (cpu or 0.0), now)
        lag = router.elsewhere(LAG) if router is not None else None
        self._metrics.lag = max(self._lag.worst(now), lag or 0.0)
        # What follows takes a slice of its own: a snapshot of a thousand servers is 550 KB.
        await trio.lowlevel.checkpoint()
        return reading

    def _pass(self, *, with_views: bool) -> Steps[view.Reading]:
        """One pass over all servers, which updates their rates, too."""
        router, now = self.router, trio.current_time()
        self._fleet.refresh_leases()
        tallies, running = self._tallies, router.running() if router is not None else ()
        live = tallies.begin(running, now)
        expected = router.prefix_statistics if router is not None else None
        started = router.started_at if router is not None else now
        reading = view.Reading(self._fleet, self._shown, started, now, wall_offset())

        def read(server: Server) -> None:
            found = expected(server) if expected is not None else None
            tally = tallies.read(server, live.get(server, 0), found, now)
            reading.add(server, tally, with_view=with_views)

        at_once = VIEWS_AT_ONCE if with_views else SERVERS_AT_ONCE
        yield from each(self._fleet.all_servers(), read, at_once)
        return reading

    async def _remember(self, reading: view.Reading) -> None:
        """Add one row of history per second, and drop removed servers."""
        row = self._row(reading)
        self._memory.add(row, reading.loads, round(reading.now + reading.wall, 3))
        self._events.second()
        names = [name for row in self._outages.rows for name in (row.name, *row.names)]
        self._tallies.keep(self._fleet.all_servers(), names)
        self._shown.keep(self._fleet.all_servers())
        self._metrics.prune()
        self._rows += 1
        if self._rows % KEY_STEP == 0:
            self.key_usage.advance(self._metrics.key_totals())
        self._outages.budgets = await in_turns(self._budgets())

    def _budgets(self) -> Steps[dict[str, float | None]]:
        """The error budgets left, by model; a step per model looks at all servers."""
        budgets: dict[str, float | None] = {}
        for row in self._outages.rows if self._metrics.has_objectives else ():
            names = (row.name, *row.names, *row.aliases)
            budgets[row.name] = self._metrics.budget_left(names)
            yield
        return budgets

    def _row(self, reading: view.Reading) -> history.Row:
        """The values of `history.FIGURES`."""
        total, now, router = self._tallies.total, reading.now, self.router
        return (
            total.requests_per_s,
            total.errors_per_s,
            self._turned_away.per_second,
            self._turned_away.saved_per_second,
            total.chunks_per_s,
            reading.tokens_per_s,
            round(reading.running, 1),
            round(reading.waiting, 1),
            sum(queue.waiting for queue in router.queues(now)) if router is not None else 0,
            reading.capacity,
            reading.load,
            router.in_flight if router is not None else reading.leases,
            reading.available,
            *_percentiles(total.ttft(now)),
            *_percentiles(total.duration(now)),
        )

    async def _recent_snapshot(self) -> str:
        """For a new client: the last published snapshot, unless it is too old."""
        async with self._reading:
            taken, encoded = self._latest
            if trio.current_time() - taken < self._fleet.settings.feed_interval:
                return encoded
            reading = await self._read_alone(with_views=True)
            return self._snapshot_of(reading, joining=1)

    def _snapshot_of(self, reading: view.Reading, joining: int = 0) -> str:
        """The message of a reading with views. `joining` clients get it as their first one."""
        router, now = self._attached(), reading.now
        facts = view.router_view(
            router,
            lag=max(self._lag.worst(now), router.elsewhere(LAG) or 0.0),
            cpu=self._cpu.per_second,
            feed_clients=len(self._mailboxes) + joining,
            unused=self.unused,
            now=now,
        )
        snapshot = view.snapshot(
            router,
            reading,
            self._tallies,
            facts,
            self._turned_away,
            self._outages,
            seq=self._seq,
        )
        encoded = _text(snapshot)
        self._latest = (now, encoded)
        return encoded


def _percentiles(found: Percentiles | None) -> tuple[float | None, float | None, float | None]:
    return (found.p50, found.p95, found.p99) if found is not None else (None, None, None)


def _next(due: float, interval: float, now: float) -> float:
    """The next time after `now` on the grid of `due`; missed ticks are skipped."""
    return due + interval if due + interval > now else now + interval
