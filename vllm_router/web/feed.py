"""The feed: the state of the fleet, sent to all websocket clients.

A snapshot is encoded once and put into the mailboxes of all clients; each client's task sends it.
Without clients, the only work is one row of history per second.
"""

from __future__ import annotations

import time

import msgspec
import trio

from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import Transition
from vllm_router.http.request_ids import DEMO_PREFIX
from vllm_router.observability.decisions import Decisions
from vllm_router.observability.metrics import Metrics
from vllm_router.observability.model_rows import AVAILABLE
from vllm_router.observability.process import cpu_seconds
from vllm_router.observability.router_state import CPU, LAG
from vllm_router.observability.sliding import Percentiles, Rate
from vllm_router.observability.stalls import LagWatch
from vllm_router.observability.tally import Tallies, failed, total_tokens_per_s
from vllm_router.proxy.record import Record
from vllm_router.proxy.retry import ANSWERED, Outcome
from vllm_router.web import events, history, schema, view
from vllm_router.web.mailbox import Mailbox
from vllm_router.web.outages import Outages
from vllm_router.web.router import Router
from vllm_router.web.turned_away import TurnedAway

_encode = msgspec.json.Encoder().encode


SERVERS_AT_ONCE = 50
"""Servers whose counters are read in one turn of the event loop."""


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
        self.unused = True
        self._fleet = fleet
        self._metrics = metrics
        self._tallies = Tallies()
        self._turned_away = TurnedAway()
        self._outages = Outages()
        self._memory = history.Memory()
        self._events = events.EventLog(self._announce, time.time)
        self._mailboxes: set[Mailbox] = set()
        self._closed = False
        self._seq = 0
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

    def event(self, kind: str, text: str) -> None:
        """Send an event to all clients; new clients receive the last events."""
        self._events.add(kind, text)

    def _announce(self, event: schema.Event) -> None:
        if not self._mailboxes:
            return
        encoded = _text(event)
        for mailbox in self._mailboxes:
            if not mailbox.put_event(encoded):
                self._metrics.feed_dropped += 1

    # -- clients ------------------------------------------------------------------------------

    def subscribe(self, *, admin: bool) -> Mailbox:
        """A mailbox with the hello and a snapshot; the caller passes it to `unsubscribe`."""
        router = self._attached()
        mailbox = Mailbox()
        last = list(self._events.last)
        mailbox.put_event(_text(view.hello(router, self._memory.encoded(), last, admin=admin)))
        self._mailboxes.add(mailbox)
        self._metrics.feed_clients = len(self._mailboxes)
        mailbox.put_snapshot(self._recent_snapshot(trio.current_time()))
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
            await self._read(now)
            if now >= next_row:
                next_row = _next(next_row, history.INTERVAL, now)
                self._remember(now)
            if now >= next_snapshot:
                next_snapshot = _next(next_snapshot, self._fleet.settings.feed_interval, now)
                if self._mailboxes:
                    self._seq += 1
                    encoded = self._new_snapshot(now)
                    for mailbox in self._mailboxes:
                        mailbox.put_snapshot(encoded)

    async def _read(self, now: float) -> None:
        router = self.router
        running = router.running() if router is not None else ()
        self._fleet.look()
        servers = self._fleet.all_servers()
        expected = router.prefix_statistics if router is not None else None
        for number, _ in enumerate(self._tallies.read(servers, running, expected, now), 1):
            if number % SERVERS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        self._turned_away.read(self._metrics.refused_by_code(), now)
        self._outages.look(self._fleet, now, time.time())
        self._events.look(servers, router.reloader if router is not None else None)
        cpu = router.elsewhere(CPU) if router is not None else None
        self._cpu.observe(cpu_seconds() + (cpu or 0.0), now)
        lag = router.elsewhere(LAG) if router is not None else None
        self._metrics.lag = max(self._lag.worst(now), lag or 0.0)

    def _remember(self, now: float) -> None:
        """Add one row of history per second, and drop removed servers."""
        loads = {name: round(server.load, 3) for name, server in self._fleet.servers.items()}
        self._memory.add(self._row(now), loads, round(time.time(), 3))
        self._events.second()
        names = [name for row in self._outages.rows for name in (row.name, *row.names)]
        self._tallies.keep(self._fleet.all_servers(), names)
        self._outages.budgets = {
            row.name: self._metrics.budget_left((row.name, *row.names, *row.aliases))
            for row in self._outages.rows
        }
        self._metrics.prune()

    def _row(self, now: float) -> history.Row:
        """The values of `history.FIGURES`."""
        total, sums = self._tallies.total, view.sums_of(self._fleet)
        servers = self._fleet.servers.values()
        router = self.router
        return (
            total.requests_per_s,
            total.errors_per_s,
            self._turned_away.per_second,
            self._turned_away.saved_per_second,
            total.chunks_per_s,
            total_tokens_per_s(map(self._tallies.of, servers)),
            sums.running,
            sums.waiting,
            sum(queue.waiting for queue in router.queues(now)) if router is not None else 0,
            sums.capacity,
            sums.load,
            router.in_flight if router is not None else sums.leases,
            self._fleet.count(*AVAILABLE),
            *_percentiles(total.ttft(now)),
            *_percentiles(total.duration(now)),
        )

    def _recent_snapshot(self, now: float) -> str:
        """For a new client: the last published snapshot, unless it is too old."""
        taken, encoded = self._latest
        return (
            encoded if now - taken < self._fleet.settings.feed_interval else self._new_snapshot(now)
        )

    def _new_snapshot(self, now: float) -> str:
        router = self._attached()
        facts = view.router_view(
            router,
            lag=max(self._lag.worst(now), router.elsewhere(LAG) or 0.0),
            cpu=self._cpu.per_second,
            feed_clients=len(self._mailboxes),
            unused=self.unused,
            now=now,
        )
        snapshot = view.snapshot(
            router,
            self._tallies,
            facts,
            self._turned_away,
            self._outages,
            seq=self._seq,
            now=now,
        )
        encoded = _text(snapshot)
        self._latest = (now, encoded)
        return encoded


def _percentiles(found: Percentiles | None) -> tuple[float | None, float | None, float | None]:
    return (found.p50, found.p95, found.p99) if found is not None else (None, None, None)


def _next(due: float, interval: float, now: float) -> float:
    """The next time after `now` on the grid of `due`; missed ticks are skipped."""
    return due + interval if due + interval > now else now + interval
