"""The feed: the fleet's load as it is, sent to every websocket client.

A snapshot is encoded once and put into the mailboxes of all clients; each client's own task sends
it. While nobody listens, one row of history a second is all that happens.
"""

from __future__ import annotations

import logging
import platform
import time
from collections import deque

import msgspec
import trio

from vllm_router import __version__
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server, State, Transition
from vllm_router.proxy.record import Record
from vllm_router.routing.retry import RULES, Outcome
from vllm_router.web import schema
from vllm_router.web.decisions import Decisions
from vllm_router.web.history import Row, Series, Thinner
from vllm_router.web.mailbox import Mailbox
from vllm_router.web.metrics import Metrics
from vllm_router.web.process import LagWatch, cpu_seconds, rss_bytes
from vllm_router.web.router import Router, wall_offset
from vllm_router.web.stats import Rate
from vllm_router.web.tally import Tally, failed

logger = logging.getLogger(__name__)

HISTORY_INTERVAL = 1.0
HISTORY_LENGTH = 300
HOUR_FACTOR = 10
HOUR_LENGTH = 360
RECENT_EVENTS = 100
"""Events that a new client is told."""

EXHAUSTED_PER_SECOND = 5
"""Events of retries exhausted; the rest of a second's are counted in one."""

_encode = msgspec.json.Encoder().encode


def _text(message: schema.Message) -> str:
    return _encode(message).decode()


class Feed:
    """Publishes, and keeps what it takes as a Recorder of the proxy.

    `router` is attached by the application, before the first client comes.
    """

    def __init__(self, fleet: Fleet, metrics: Metrics) -> None:
        self.router: Router | None = None
        self.decisions = Decisions()
        self._fleet = fleet
        self._metrics = metrics
        self._closed = False
        self._seq = 0
        self._mailboxes: set[Mailbox] = set()
        self._total = Tally()
        self._tallies: dict[Server, Tally] = {}
        self._history = Series(HISTORY_INTERVAL, HISTORY_LENGTH)
        self._hour = Series(HISTORY_INTERVAL * HOUR_FACTOR, HOUR_LENGTH)
        self._thinner = Thinner(HOUR_FACTOR)
        self._history_end = 0.0
        self._hour_end = 0.0
        self._histories: tuple[float, msgspec.Raw, msgspec.Raw] | None = None
        self._event_id = 0
        self._events: deque[schema.Event] = deque(maxlen=RECENT_EVENTS)
        self._exhausted = 0
        self._drained: set[Server] = set()
        self._refused_seen = 0
        self._cpu = Rate()
        self._lag = LagWatch()

    # -- what exchanges and servers report ------------------------------------------------------

    def exchange_ended(self, record: Record) -> None:
        """Count, remember the decision, and tell when every attempt failed."""
        server = record.server
        self._total.ended(record)
        if failed(record):
            self._total.errors += 1
            if record.retries:
                self._exhaust(record)
        if server is not None:
            self._tally(server).ended(record)
        self.decisions.add(record)

    def attempt_ended(self, server: Server, outcome: Outcome) -> None:
        if RULES[outcome].blames:
            self._tally(server).errors += 1

    def transition(self, change: Transition) -> None:
        """A server has changed its state."""
        reason = f" ({change.reason})" if change.reason else ""
        text = f"{change.server}: {change.old} → {change.new}{reason}"
        self.event("state", text, server=change.server, old=change.old, new=change.new)

    def event(
        self,
        kind: str,
        text: str,
        server: str | None = None,
        old: str | None = None,
        new: str | None = None,
    ) -> None:
        """Tell every client now; the last ones are told to those who come later."""
        self._event_id += 1
        event = schema.Event(
            id=self._event_id,
            time=round(time.time(), 3),
            kind=kind,
            text=text,
            server=server,
            old=old,
            new=new,
        )
        self._events.append(event)
        if self._mailboxes:
            encoded = _text(event)
            for mailbox in self._mailboxes:
                if not mailbox.put_event(encoded):
                    self._metrics.feed_dropped += 1

    def _tally(self, server: Server) -> Tally:
        tally = self._tallies.get(server)
        if tally is None:
            tally = self._tallies[server] = Tally()
        return tally

    def _exhaust(self, record: Record) -> None:
        self._exhausted += 1
        if self._exhausted > EXHAUSTED_PER_SECOND:
            return
        last = record.server.name if record.server is not None else None
        self.event(
            "retries_exhausted",
            f"request {record.request_id.decode('latin-1')}: {record.attempts} attempts failed, "
            f"the last on {last}: {record.code or record.status}",
            server=last,
        )

    # -- clients --------------------------------------------------------------------------------

    def subscribe(self, *, admin: bool) -> Mailbox:
        """A mailbox with the hello and a snapshot in it; the caller gives it to `unsubscribe`."""
        mailbox = Mailbox()
        mailbox.put_event(_text(self._hello(admin=admin)))
        if self._closed:
            mailbox.close()
            return mailbox
        mailbox.put_snapshot(_text(self.snapshot(trio.current_time())))
        self._mailboxes.add(mailbox)
        self._metrics.feed_clients = len(self._mailboxes)
        return mailbox

    def unsubscribe(self, mailbox: Mailbox) -> None:
        self._mailboxes.discard(mailbox)
        self._metrics.feed_clients = len(self._mailboxes)

    def close(self) -> None:
        """Send every client away (1001), and those who come later."""
        self._closed = True
        for mailbox in self._mailboxes:
            mailbox.close()

    @staticmethod
    def missed(count: int) -> str:
        """The message for a client that was too slow for `count` events."""
        return _text(
            schema.Event(
                id=0,
                time=round(time.time(), 3),
                kind="missed",
                text=f"{count} events were lost: this client reads too slowly",
            )
        )

    # -- publishing -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Tick until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._lag.run)
            nursery.start_soon(self._publish)

    async def _publish(self) -> None:
        next_row = next_snapshot = trio.current_time()
        while True:
            due = min(next_row, next_snapshot) if self._mailboxes else next_row
            await trio.sleep_until(due)
            now = trio.current_time()
            self._read(now)
            if now >= next_row:
                next_row = _next(next_row, HISTORY_INTERVAL, now)
                self._remember(now)
                self._housekeeping()
            if now >= next_snapshot:
                next_snapshot = _next(next_snapshot, self._fleet.settings.feed_interval, now)
                if self._mailboxes:
                    encoded = _text(self.snapshot(now))
                    for mailbox in self._mailboxes:
                        mailbox.put_snapshot(encoded)

    def _read(self, now: float) -> None:
        """Read every counter that has a rate."""
        live: dict[Server | None, int] = {}
        total = 0
        for exchange in self.router.proxy.exchanges if self.router is not None else ():
            chunks = exchange.record.chunks
            if chunks:
                server = exchange.record.server
                live[server] = live.get(server, 0) + chunks
                total += chunks
        self._total.read(now, total)
        for server in self._fleet.all_servers():
            tally = self._tally(server)
            tally.read(now, live.get(server, 0))
            tally.read_engine(server.metrics, now)
        self._cpu.observe(cpu_seconds(), now)
        self._metrics.lag = self._lag.worst(now)
        self._tell_changes()

    def _tell_changes(self) -> None:
        """Events that nobody announces: they are seen by looking."""
        servers = self._fleet.all_servers()
        idle = {server for server in servers if server.draining and not server.in_flight}
        for server in idle - self._drained:
            self.event("drained", f"{server.name}: nothing in flight", server=server.name)
        self._drained = idle
        reloader = self.router.reloader if self.router is not None else None
        if reloader is not None and reloader.refused_total != self._refused_seen:
            self._refused_seen = reloader.refused_total
            self.event("reload_refused", reloader.last_error or "")

    def _housekeeping(self) -> None:
        more = self._exhausted - EXHAUSTED_PER_SECOND
        if more > 0:
            self.event("retries_exhausted", f"and {more} more requests within a second")
        self._exhausted = 0
        for server in self._tallies.keys() - set(self._fleet.all_servers()):
            del self._tallies[server]
        self._metrics.prune()

    # -- history --------------------------------------------------------------------------------

    def _remember(self, now: float) -> None:
        row = self._row(now)
        wall = round(time.time(), 3)
        loads = {server.name: round(server.load, 3) for server in self._fleet.servers.values()}
        self._history.add(row, loads)
        self._history_end = wall
        thin = self._thinner.add(row)
        if thin is not None:
            self._hour.add(thin, {})
            self._hour_end = wall

    def _row(self, now: float) -> Row:
        total, fleet = self._total, self._sums()
        ttft, duration = total.ttft(now), total.duration(now)
        return (
            total.requests_per_s,
            total.errors_per_s,
            total.chunks_per_s,
            fleet.running,
            fleet.waiting,
            fleet.capacity,
            fleet.load,
            len(self.router.proxy.exchanges) if self.router is not None else fleet.leases,
            ttft.p95 if ttft is not None else None,
            duration.p95 if duration is not None else None,
        )

    def _hello(self, *, admin: bool) -> schema.Hello:
        router = self._attached()
        settings = self._fleet.settings
        history, hour = self._encoded_history()
        return schema.Hello(
            schema=schema.VERSION,
            version=__version__,
            name=platform.node(),
            time=round(time.time(), 3),
            started=round(router.started_at + wall_offset(), 3),
            admin=admin,
            config=schema.Facts(
                policy=settings.policy,
                feed_interval=settings.feed_interval,
                metrics_interval=settings.metrics_interval,
                health_check_interval=settings.health_check_interval,
                request_timeout=settings.request_timeout,
                max_retries=settings.max_retries,
                drain_timeout=settings.drain_timeout,
                allow_engine_control=settings.allow_engine_control,
            ),
            history=history,
            hour=hour,
            events=list(self._events),
        )

    def _encoded_history(self) -> tuple[msgspec.Raw, msgspec.Raw]:
        """Encoded once for all clients that come within the same second."""
        found = self._histories
        if found is None or found[0] != self._history_end:
            found = self._histories = (
                self._history_end,
                _raw_history(self._history, self._history_end),
                _raw_history(self._hour, self._hour_end),
            )
        return found[1], found[2]

    # -- the snapshot ---------------------------------------------------------------------------

    def _attached(self) -> Router:
        if self.router is None:
            raise RuntimeError("the feed has clients before it has a router")
        return self.router

    def snapshot(self, now: float) -> schema.Snapshot:
        """Everything, as it is now."""
        self._seq += 1
        wall = wall_offset()
        servers = [self._server(server, now, wall) for server in self._fleet.all_servers()]
        return schema.Snapshot(
            seq=self._seq,
            time=round(now + wall, 3),
            router=self._router(now),
            fleet=self._whole(servers, now),
            servers=servers,
        )

    def _server(self, server: Server, now: float, wall: float) -> schema.ServerView:
        tally = self._tally(server)
        state, reason = server.current_state(now)
        since = server.state_since or self._attached().started_at
        kv_usage = server.metrics.kv_usage if server.metrics is not None else None
        age = server.metrics_age(now) if server.scraped_at is not None else None
        return schema.ServerView(
            name=server.name,
            url=server.url,
            models=server.models,
            state=state,
            reason=reason,
            since=round(since + wall, 3),
            leaving=self._fleet.servers.get(server.name) is not server,
            running=round(server.running, 1),
            waiting=round(server.waiting, 1),
            leases=server.in_flight,
            capacity=server.capacity,
            load=round(server.load, 4),
            kv_usage=round(kv_usage, 4) if kv_usage is not None else None,
            prefix_hit_rate=tally.prefix_hit_rate,
            requests_per_s=tally.requests_per_s,
            errors_per_s=tally.errors_per_s,
            chunks_per_s=tally.chunks_per_s,
            tokens_per_s=tally.tokens_per_s,
            ttft=tally.ttft(now),
            duration=tally.duration(now),
            metrics_age=round(age, 2) if age is not None else None,
            stale=not server.metrics_fresh,
        )

    def _whole(self, servers: list[schema.ServerView], now: float) -> schema.FleetView:
        total, sums = self._total, self._sums()
        states: dict[str, int] = {}
        tokens = [one.tokens_per_s for one in servers if one.tokens_per_s is not None]
        for one in servers:
            if not one.leaving:
                states[one.state] = states.get(one.state, 0) + 1
        return schema.FleetView(
            servers=len(self._fleet.servers),
            available=states.get(State.UP, 0) + states.get(State.FULL, 0),
            states=states,
            running=sums.running,
            waiting=sums.waiting,
            leases=sums.leases,
            capacity=sums.capacity,
            load=sums.load,
            requests_per_s=total.requests_per_s,
            errors_per_s=total.errors_per_s,
            chunks_per_s=total.chunks_per_s,
            tokens_per_s=round(sum(tokens), 1) if tokens else None,
            ttft=total.ttft(now),
            duration=total.duration(now),
        )

    def _sums(self) -> _Sums:
        running = waiting = there = 0.0
        leases = capacity = 0
        for server in self._fleet.all_servers():
            running += server.running
            waiting += server.waiting
            leases += server.in_flight
            if server.usable:
                capacity += server.capacity
                there += server.load * server.capacity
        load = round(there / capacity, 4) if capacity else 0.0
        return _Sums(round(running, 1), round(waiting, 1), leases, capacity, load)

    def _router(self, now: float) -> schema.RouterView:
        router = self._attached()
        reloader = router.reloader
        return schema.RouterView(
            open_streams=len(router.proxy.exchanges),
            event_loop_lag=round(self._lag.worst(now), 5),
            cpu=round(self._cpu.per_second, 4),
            rss_bytes=rss_bytes(),
            uptime=round(now - router.started_at, 1),
            ready=router.ready,
            draining=router.draining,
            reload=schema.ReloadView(
                source=str(reloader.source.path) if reloader is not None else None,
                generation=reloader.generation if reloader is not None else 1,
                applied=reloader.applied_total if reloader is not None else 0,
                refused=reloader.refused_total if reloader is not None else 0,
                error=reloader.last_error if reloader is not None else None,
            ),
            feed_clients=len(self._mailboxes),
        )


class _Sums(msgspec.Struct, frozen=True, gc=False):
    """Over all servers; capacity and load over those that may be asked."""

    running: float
    waiting: float
    leases: int
    capacity: int
    load: float


def _next(due: float, interval: float, now: float) -> float:
    """The next time after `now` on the grid that `due` lies on; a late tick is not made up for."""
    return due + interval if due + interval > now else now + interval


def _raw_history(series: Series, end: float) -> msgspec.Raw:
    history = schema.History(
        interval=series.interval, end=end, fleet=series.fleet(), servers=series.servers()
    )
    return msgspec.Raw(_encode(history))
