"""The one nursery: constructs everything, hands it around, starts and ends the tasks.

Nothing here decides; it connects those who do. A task that fails by a defect is logged and
started again: a router that goes on with one probe missing is better than none.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from random import Random

import trio

from vllm_router.config.changes import changes
from vllm_router.config.memory import Memory, memory_line
from vllm_router.config.reload import Nudge, Reload, Reloader, watch
from vllm_router.config.schema import RESTART_SETTINGS, Config, ServerConfig, Settings
from vllm_router.config.source import ConfigSource
from vllm_router.config.ssl_contexts import ServerContexts
from vllm_router.config.types import Secret
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server, State, Transition
from vllm_router.http.client.resolver import Resolver
from vllm_router.observability.log_output import LogOutput
from vllm_router.observability.metrics import Metrics
from vllm_router.observability.stalls import StallMonitor
from vllm_router.observability.tracing import Telemetry
from vllm_router.proxy.admission import PeersMaker, Queue
from vllm_router.proxy.handler import Proxy
from vllm_router.proxy.record import Record, Recorder
from vllm_router.routing.server_estimate import PrefixStatistics
from vllm_router.runtime.early_signals import came
from vllm_router.runtime.memory_limit import memory_limit_mb
from vllm_router.runtime.model_lists import ModelLists, Reader
from vllm_router.runtime.probe import Probe
from vllm_router.web.feed import Feed
from vllm_router.web.guard import Guard, OwnDoor
from vllm_router.web.sessions import Sessions

logger = logging.getLogger(__name__)

END_TIME = 1.0
"""Seconds for interrupted exchanges to write their last words."""

RESTART_PAUSE = 1.0
"""Seconds before a crashed task is started again."""

SERVERS_AT_ONCE = 4
"""Servers whose probes are started, or ended, in one turn of the loop: 5 ms."""

BREATH = 0.005
"""Seconds between two such turns."""

PREPARED_AT_ONCE = 50
"""New servers that are made in one turn of the loop: 5 ms."""

_LEVELS = {
    State.DOWN: logging.WARNING,
    State.EJECTED: logging.WARNING,
    State.ASLEEP: logging.WARNING,
    State.PAUSED: logging.WARNING,
    State.SILENT: logging.WARNING,
    State.REFUSING: logging.WARNING,
}


class Supervisor:
    """Everything that lives as long as the router.

    `source` is None when the servers came from the command line: then nothing is reloaded.
    `output` follows `[log]`; without one there is no access log. `telemetry` makes spans. Whoever
    made them closes them.
    `admin_port` is that of the listener for administration, `own_door` that of the router's own
    view, if there are such. `before_apply` are
    called with a new configuration before anything changes, and may raise ConfigError.
    One of several processes brings a `fleet` that knows of the others and `make_peers` for its
    waiting room, and a worker a `recorder` that tells the leader what would be counted here.
    """

    def __init__(
        self,
        config: Config,
        source: ConfigSource | None,
        rng: Random | None = None,
        output: LogOutput | None = None,
        telemetry: Telemetry | None = None,
        admin_port: int | None = None,
        own_door: OwnDoor | None = None,
        fleet: Fleet | None = None,
        recorder: Recorder | None = None,
        make_peers: PeersMaker | None = None,
    ) -> None:
        self.rng = rng or Random()
        self.fleet = fleet if fleet is not None else Fleet(config)
        self.metrics = Metrics(self.fleet)
        self.stalls = StallMonitor()
        self.feed = Feed(self.fleet, self.metrics, self.stalls.lag)
        self.tls = ServerContexts()
        self.sessions = Sessions(trio.current_time)
        self.guard = Guard(config, admin_port, own_door, self.sessions)
        self.resolver = Resolver()
        self.before_apply: list[Callable[[Config], None]] = []
        recorders: list[Recorder] = [recorder] if recorder is not None else []
        if recorder is None:
            recorders += [self.metrics, self.feed]
        self.output = output
        if output is not None:
            recorders.append(output.access)
        if telemetry is not None:
            recorders.append(telemetry)
        self.proxy = Proxy(
            self.fleet, config, recorders, self.rng, self.tls, self.resolver, make_peers
        )
        self.proxy.tracer = telemetry
        self._ask_for_what_is_logged(config)
        self.nudge = Nudge()
        self.reloader = (
            Reloader(source, config, self._apply, self._prepare) if source is not None else None
        )
        self.config = config
        self.draining = False
        self.started_at = trio.current_time()
        self.task_restarts = 0
        self._nursery: trio.Nursery | None = None
        self._probes: dict[Server, trio.CancelScope] = {}
        self._probing: dict[Server, Probe] = {}
        self._to_start: deque[tuple[Server, trio.CancelScope]] = deque()
        self._start_some = trio.Event()
        self.lists = ModelLists(self._list_readers)
        self.proxy.look_at_lists = self._look_at_lists
        self.fleet.on_stale_list.append(self._read_list_soon)
        self.fleet.on_transition += [
            self._log_transition,
            self.metrics.transition,
            self.feed.transition,
        ]

    # -- tasks --------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Probe, watch and publish until cancelled; closes the connections to the servers."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._start_tasks(nursery)
                _settle_garbage_collector()
                _settle_allocator()
                task_status.started()
        finally:
            self._nursery = None
            self.proxy.close()

    def _start_tasks(self, nursery: trio.Nursery) -> None:
        for server in self.fleet.servers.values():
            self._start_probe(server)
        nursery.start_soon(self._keep, "probes", self._start_probes)
        nursery.start_soon(self._keep, "stalls", self.stalls.run)
        nursery.start_soon(self._keep, "feed", self.feed.run)
        nursery.start_soon(self._keep, "lists", self.lists.run)
        nursery.start_soon(self._keep, "leavers", self._dismiss_leavers)
        if self.reloader is not None:
            nursery.start_soon(self._keep, "watch", self._watch)
        self._follow_signals(nursery)

    def _follow_signals(self, nursery: trio.Nursery) -> None:
        if self.reloader is not None:
            nursery.start_soon(self._keep, "reload signal", self._reload_on_sighup)
        if self.output is not None:
            nursery.start_soon(self._keep, "log signal", self._reopen_on_sigusr1)

    async def _keep(self, name: str, task: Callable[[], Awaitable[None]]) -> None:
        """Run a task that should never end; a defect in it is logged and it is started anew."""
        while True:
            try:
                await task()
            except Exception:
                # Not silent, and not fatal: traffic goes on without this task for a moment.
                logger.exception("task %s failed, starting it again", name)
                self.task_restarts += 1
            await trio.sleep(RESTART_PAUSE)

    async def _watch(self) -> None:
        assert self.reloader is not None
        await watch(self.reloader, self.nudge)

    async def _reload_on_sighup(self) -> None:
        with trio.open_signal_receiver(signal.SIGHUP) as signals:
            if came(signal.SIGHUP):
                self.nudge()
            async for _ in signals:
                self.nudge()

    async def _reopen_on_sigusr1(self) -> None:
        assert self.output is not None
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            if came(signal.SIGUSR1):
                self.output.reopen()
            async for _ in signals:
                self.output.reopen()

    async def _dismiss_leavers(self) -> None:
        """Forget removed servers once their last request has ended."""
        while True:
            await trio.sleep(0.25)
            for number, server in enumerate(self.fleet.gone(), 1):
                if number % SERVERS_AT_ONCE == 0:
                    await trio.sleep(BREATH)
                logger.info("server %s has left, nothing in flight", server.name)
                self._stop_probe(server)
                self.proxy.forget(server)

    # -- probes -------------------------------------------------------------------------------

    def _start_probe(self, server: Server) -> None:
        if self._nursery is None or server in self._probes:
            return
        scope = self._probes[server] = trio.CancelScope()
        self._to_start.append((server, scope))
        self._start_some.set()

    async def _start_probes(self) -> None:
        """Start the probes that wait for it, a few at a time: each takes a millisecond."""
        while True:
            await self._start_some.wait()
            self._start_some = trio.Event()
            while self._to_start:
                for _ in range(min(SERVERS_AT_ONCE, len(self._to_start))):
                    server, scope = self._to_start.popleft()
                    if self._nursery is not None and self._probes.get(server) is scope:
                        self._nursery.start_soon(self._probe, server, scope)
                await trio.sleep(BREATH)

    def _stop_probe(self, server: Server) -> None:
        scope = self._probes.pop(server, None)
        if scope is not None:
            scope.cancel(reason="server removed")

    async def _probe(self, server: Server, scope: trio.CancelScope) -> None:
        tls = self.tls.of(server.config)
        down, tick = self._server_down, self.proxy.tick
        probe = Probe(server, self.fleet, self.rng, tls, down, tick, self.resolver)
        self._probing[server] = probe
        try:
            with scope:
                await self._keep(f"probe of {server.name}", probe.run)
        finally:
            if self._probing.get(server) is probe:
                del self._probing[server]

    def _server_down(self, server: Server) -> None:
        ended = self.proxy.server_gone(server, trio.current_time(), self._patience())
        if ended:
            logger.info("server %s is gone: %d silent requests taken off it", server.name, ended)

    def _patience(self) -> float:
        """How long a request must have been silent to be taken off a server that went down."""
        return self.fleet.settings.metrics_interval

    def _read_list_soon(self, server: Server) -> None:
        probe = self._probing.get(server)
        if probe is not None:
            probe.read_list_soon()

    def _list_readers(self) -> list[Reader]:
        return [probe.read_list for probe in self._probing.values()]

    async def _look_at_lists(self, found: Callable[[], bool]) -> None:
        await self.lists.fresh(found, self.fleet.settings.health_check_timeout + 1.0)

    # -- configuration ------------------------------------------------------------------------

    async def _prepare(self, new: Config) -> None:
        """Make what takes long of a new configuration, a little at a time. Raises ConfigError."""
        await trio.to_thread.run_sync(self.tls.prepare, new.servers)
        for number, server in enumerate(self.fleet.prepare(new), 1):
            self.proxy.prepare(server)
            if number % PREPARED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()

    def _apply(self, old: Config, new: Config) -> None:
        self.tls.prepare(new.servers)  # raises ConfigError while nothing has changed
        for prepare in self.before_apply:
            prepare(new)
        for setting in RESTART_SETTINGS:
            if getattr(old.settings, setting) != getattr(new.settings, setting):
                logger.warning("%s changes at the next start only", setting)
        if _admin_key(new) != _admin_key(old):
            self.sessions.end()
        self.guard = Guard(new, self.guard.admin_port, self.guard.own, self.sessions)
        change = self.fleet.apply(new)
        self.config = new
        self.proxy.apply(new)
        if self.output is not None:
            self.output.follow(new.log)
        self._ask_for_what_is_logged(new)
        for server in change.added:
            self._start_probe(server)
        before = {server.url: _credentials(server) for server in old.servers}
        for server in change.kept:
            if before[server.url] != _credentials(server.config):
                self._stop_probe(server)
                self._start_probe(server)
        for server in change.removed:
            if server.in_flight == 0:
                continue
            logger.info("server %s leaves, %d in flight", server.name, server.in_flight)
        self.feed.event("reload", changes(old, new))

    def _ask_for_what_is_logged(self, config: Config) -> None:
        """What only the access log needs to know of an exchange is not read without one."""
        logged = self.output is not None and self.output.access.writer is not None
        self.proxy.wants_usage = logged or self.proxy.tracer is not None
        self.proxy.wants_prompt = logged and config.log.prompts

    @property
    def log_lines_dropped(self) -> int:
        """Lines of the log and the access log that were lost, as nobody took them."""
        return self.output.dropped if self.output is not None else 0

    async def reload(self) -> Reload:
        """Read the file again now, changed or not; UNCHANGED if there is no file."""
        if self.reloader is None:
            return Reload.UNCHANGED
        return await self.reloader.reload(force=True)

    # -- what the pages are told --------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests being served now."""
        return len(self.proxy.exchanges)

    def running(self) -> list[Record]:
        """Those of the requests being served now."""
        return [exchange.record for exchange in self.proxy.exchanges]

    def queues(self, now: float) -> list[Queue]:
        """Who waits for a server; none without `[limits]`."""
        return self.proxy.gate.queues(now) if self.proxy.gate is not None else []

    def prefix_statistics(self, server: Server) -> PrefixStatistics | None:
        """What the policies expected of a server's prefix cache; None if none looks at prompts."""
        return self.proxy.policies.statistics(server)

    def elsewhere(self, figure: str) -> float | None:
        """What other processes of this router add to a figure; None if there are none."""
        return None

    def workers(self) -> Mapping[str, Mapping[str, float]]:
        """The figures of each worker process; none if there is but this one."""
        return {}

    def refused(self, code: str) -> None:
        """A request was refused by its head alone."""
        self.metrics.refused(code)

    # -- drain --------------------------------------------------------------------------------

    def drain_server(self, name: str, on: bool) -> Server | None:
        """Take a server out of the rotation or back; None if there is none of that name."""
        server = self.fleet.servers.get(name)
        if server is not None:
            server.drain(on)
            self.fleet.settle(trio.current_time())
        return server

    async def lame_duck(self) -> None:
        """`/readyz` says no, and for `drain_grace` seconds everything is served all the same."""
        self.draining = True
        grace = self.config.settings.drain_grace
        if grace:
            logger.info("serving for another %g s of grace", grace)
            await trio.sleep(grace)

    async def wind_down(self, *, still_listening: bool = False) -> None:
        """Let running exchanges finish for `drain_timeout`, then end them honestly.

        Websocket clients are sent away at once (1001), the feed has nothing more to say. Where
        the port is still open, new requests are refused: else there would be no end.
        """
        self.draining = True
        self.proxy.stopping = still_listening
        self.feed.close()
        running = len(self.proxy.exchanges)
        if running:
            logger.info("draining: %d in flight", running)
        with trio.move_on_after(self.config.settings.drain_timeout) as patience:
            await self.proxy.drained()
        self.proxy.stopping = True
        if patience.cancelled_caught:
            logger.warning("drain_timeout is over: ending %d exchanges", self.proxy.stop())
            with trio.move_on_after(END_TIME):
                await self.proxy.drained()

    @property
    def ready(self) -> bool:
        """Whether a load balancer should send requests here."""
        return self.fleet.probed and not self.draining

    def _log_transition(self, change: Transition) -> None:
        logger.log(
            _LEVELS.get(change.new, logging.INFO),
            "server %s: %s -> %s%s",
            change.server,
            change.old,
            change.new,
            f" ({change.reason})" if change.reason else "",
        )


def tell_memory(settings: Settings, workers: int) -> None:
    """Log, at the start, what follows from the memory that there is."""
    told = memory_line(settings, Memory(memory_limit_mb(), workers))
    if told is not None:
        warn, line = told
        logger.log(logging.WARNING if warn else logging.INFO, "%s", line)


def _admin_key(config: Config) -> Secret | None:
    return config.auth.admin_key if config.auth is not None else None


def _credentials(config: ServerConfig) -> tuple[object, ...]:
    """What a probe keeps for as long as it runs."""
    tls = config.ca, config.client_certificate, config.client_key, config.verify
    return config.api_key, *tls


def _settle_garbage_collector() -> None:
    """What exists after the start stays: it need not be looked at in every collection.

    Exchanges leave hardly any cycles behind, so the young generation may grow before it is
    searched. Together 5 % of the cost of a request.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 20


def _settle_allocator() -> None:
    """Large request bodies are given back to the system when they are let go.

    Left alone, glibc learns from the first that large blocks come and go, keeps up to 32 MB of each
    in the heap from then on, and the router as large as its busiest moment.
    """
    # Other C libraries (musl) have no such habit, and no such function.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
