"""The parts of one router process: construction, background tasks, and new configurations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from random import Random

import trio

from vllm_router.config.changes import changes_of
from vllm_router.config.memory import Memory, memory_line
from vllm_router.config.reload import Nudge, Reload, Reloader, watch
from vllm_router.config.schema import RESTART_SETTINGS, Config, ServerConfig, Settings
from vllm_router.config.source import ConfigSource
from vllm_router.config.ssl_contexts import ServerContexts
from vllm_router.config.types import Secret
from vllm_router.discovery.source import SourceStatus
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State, Transition
from vllm_router.http.client.resolver import Resolver
from vllm_router.observability.log_output import LogOutput
from vllm_router.observability.metrics import Metrics
from vllm_router.observability.stalls import StallMonitor
from vllm_router.observability.tracing import Telemetry
from vllm_router.proxy.admission import Queue
from vllm_router.proxy.batched_recorder import BatchedRecorder
from vllm_router.proxy.handler import Proxy
from vllm_router.proxy.record import Record, Recorder
from vllm_router.routing.server_estimate import PrefixStatistics
from vllm_router.routing.sharing.scrapes import SharedScrapes
from vllm_router.routing.sharing.status import SharedStatus
from vllm_router.runtime.background import BackgroundTasks, Task
from vllm_router.runtime.fleet_sources import FleetSources
from vllm_router.runtime.memory_limit import memory_limit_mb
from vllm_router.runtime.model_lists import ModelLists
from vllm_router.runtime.parts import Parts
from vllm_router.runtime.probes import BATCH_PAUSE, SERVERS_AT_ONCE, ProbeContext
from vllm_router.runtime.sharing.router_share import share_alone
from vllm_router.runtime.sharing.task import SharedState
from vllm_router.runtime.tuning import tune_process
from vllm_router.web.feed import Feed
from vllm_router.web.guard import Guard, MonitorListener
from vllm_router.web.sessions import Sessions

logger = logging.getLogger(__name__)

END_TIME = 1.0
"""Seconds for cancelled exchanges to send their error event."""

PREPARED_AT_ONCE = 10
"""New servers that are constructed in one turn of the event loop: 1 ms."""

_LEVELS = {
    State.DOWN: logging.WARNING,
    State.EJECTED: logging.WARNING,
    State.ASLEEP: logging.WARNING,
    State.PAUSED: logging.WARNING,
    State.SILENT: logging.WARNING,
    State.REFUSING: logging.WARNING,
}


class Supervisor:
    """One router process: fleet, proxy, control plane state and background tasks.

    `source` is None if the servers were given on the command line: nothing is reloaded then.
    `output` follows `[log]`; without it there is no access log. `telemetry` makes spans. The caller
    closes both. `admin_port` is the port of the listener for administration, `monitor_listener` the
    listener of the router's own monitor. `parts` differ in a router of several processes.

    Hooks: `before_apply` functions check a new configuration before anything changes and may raise
    ConfigError; `after_apply` functions are called when it is in force. `tasks` are named
    background tasks that `run` starts besides the supervisor's own. `reloading()` is entered for a
    reload on SIGHUP.
    """

    def __init__(
        self,
        config: Config,
        source: ConfigSource | None,
        rng: Random | None = None,
        output: LogOutput | None = None,
        telemetry: Telemetry | None = None,
        admin_port: int | None = None,
        monitor_listener: MonitorListener | None = None,
        parts: Parts | None = None,
    ) -> None:
        parts = parts if parts is not None else Parts()
        self.rng = rng or Random()
        self.fleet = parts.fleet if parts.fleet is not None else Fleet(config)
        self.metrics = Metrics(self.fleet)
        self.stalls = StallMonitor()
        self.feed = Feed(self.fleet, self.metrics, self.stalls.lag)
        self.tls = ServerContexts()
        self.sessions = Sessions(trio.current_time)
        self.guard = Guard(config, admin_port, monitor_listener, self.sessions)
        self.resolver = Resolver()
        self.before_apply: list[Callable[[Config], None]] = []
        self.after_apply: list[Callable[[Config], None]] = []
        self.tasks: list[tuple[str, Task]] = []
        self.reloading: Callable[[], AbstractContextManager[None]] = nullcontext
        self.output = output
        self.proxy = Proxy(
            self.fleet,
            config,
            BatchedRecorder(self._recorders(parts, telemetry)),
            self.rng,
            self.tls,
            self.resolver,
            parts.make_peers,
        )
        self.proxy.context.tracer = telemetry
        if parts.key_limits is not None:
            self.proxy.context.key_limits = parts.key_limits
        self._parts = parts
        self._choose_recorded_fields(config)
        self.nudge = Nudge()
        self.config = config
        self.sources = self._make_sources()
        self.reloader = self._make_reloader(source) if source is not None else None
        self.draining = False
        self._was_probed = False
        self.started_at = trio.current_time()
        self._background = BackgroundTasks()
        self.scrapes = SharedScrapes(self.fleet.by_url)
        self.probes = parts.make_probes(
            ProbeContext(
                fleet=self.fleet,
                rng=self.rng,
                tls=self.tls,
                resolver=self.resolver,
                tasks=self._background,
                server_down=self.server_down,
                upkeep=self.proxy.maintain,
                scrapes=self.scrapes,
            )
        )
        self.lists = ModelLists(self.probes.list_readers, self.probes.list_gap)
        self.proxy.context.refresh_models = self.refresh_model_lists
        self.fleet.on_stale_model_list.append(self.probes.read_list_soon)
        self.shared: SharedState | None = None
        self._make_shared: Callable[[], SharedState] = partial(
            share_alone, self, self.probes.check_soon, self.scrapes
        )
        self._sharing = trio.Event()
        if parts.reports is None:
            self.fleet.on_transition += [
                _log_transition,
                self.metrics.transition,
                self.feed.transition,
            ]

    # -- construction -------------------------------------------------------------------------

    def _make_sources(self) -> FleetSources:
        return FleetSources(
            self.config,
            self.fleet.answers,
            lambda item: self.feed.event("source", item.text, item.code, item.values),
            lambda: self.config,
            self.prepare,
            self.apply,
        )

    def _make_reloader(self, source: ConfigSource) -> Reloader:
        sources = self.sources
        return Reloader(source, sources.file_config, sources.apply_file, sources.prepare_file)

    def _recorders(self, parts: Parts, telemetry: Telemetry | None) -> list[Recorder]:
        recorders: list[Recorder] = (
            [parts.reports] if parts.reports is not None else [self.metrics, self.feed]
        )
        if self.output is not None:
            recorders.append(self.output.access)
        if telemetry is not None:
            recorders.append(telemetry)
        return recorders

    # -- tasks --------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run all background tasks until cancelled, then close the connections to the servers."""
        try:
            async with trio.open_nursery() as nursery:
                for server in self.fleet.servers.values():
                    self.probes.start(server)
                for name, task in self._all_tasks():
                    nursery.start_soon(self._background.keep_running, name, task)
                tune_process()
                task_status.started()
        finally:
            self.proxy.close()

    def _all_tasks(self) -> list[tuple[str, Task]]:
        tasks: list[tuple[str, Task]] = [
            ("probes", self.probes.run),
            ("stalls", self.stalls.run),
            ("lists", self.lists.run),
            ("leavers", self._dismiss_leavers),
        ]
        if self._parts.reports is None:
            # A worker follows the leader, which runs the sources for all processes.
            tasks += [
                ("feed", self.feed.run),
                ("discovery", self.sources.run),
                ("sharing", self._share),
            ]
        if self.reloader is not None:
            tasks.append(("watch", self._watch))
        if self._parts.signals is not None:
            tasks += self._parts.signals.tasks(
                self.nudge if self.reloader is not None else None,
                self.output.reopen if self.output is not None else None,
            )
        return tasks + self.tasks

    @property
    def source_statuses(self) -> list[SourceStatus]:
        """The sources of `[discovery]`."""
        return self.sources.discovery.statuses

    @property
    def shared_status(self) -> SharedStatus | None:
        """The state of `[shared]`; None without that table."""
        return self.shared.status() if self.shared is not None else None

    @property
    def task_restarts(self) -> int:
        """Number of background tasks that failed and were started again."""
        return self._background.restarts

    def share_with(self, make: Callable[[], SharedState]) -> None:
        """Use another function to make the shared state once `[shared]` is configured."""
        self._make_shared = make

    def _follow_shared(self, config: Config) -> None:
        """Begin to share, use another store, or end; a worker leaves it to the leader."""
        if self._parts.reports is not None:
            return
        if self.shared is None:
            if config.shared is None:
                return
            self.shared = self._make_shared()
            self._sharing.set()
        self.shared.use(config.shared)

    async def _share(self) -> None:
        self._follow_shared(self.config)
        await self._sharing.wait()
        assert self.shared is not None
        await self.shared.run()

    async def _watch(self) -> None:
        assert self.reloader is not None
        await watch(self.reloader, self.nudge, lambda: self.reloading())

    async def _dismiss_leavers(self) -> None:
        """Forget removed servers once their last request has ended."""
        while True:
            await trio.sleep(0.25)
            for number, server in enumerate(self.fleet.gone(), 1):
                if number % SERVERS_AT_ONCE == 0:
                    await trio.sleep(BATCH_PAUSE)
                logger.info("server %s: removed, no requests in flight", server.name)
                self.probes.stop(server)
                self.proxy.forget(server)

    def server_down(self, server: Server) -> None:
        """Cancel the silent requests of a server that has just gone down, to retry them."""
        silence = self.fleet.settings.metrics_interval
        cancelled = self.proxy.server_gone(server, trio.current_time(), silence)
        if cancelled:
            logger.info("server %s: down, cancelled %d silent requests", server.name, cancelled)

    async def refresh_model_lists(self, found: Callable[[], bool]) -> None:
        """Read the servers' model lists again, until all are read or `found` returns True."""
        await self.lists.fresh(found, self.fleet.settings.health_check_timeout + 1.0)

    # -- configuration ------------------------------------------------------------------------

    async def prepare(self, new: Config) -> None:
        """Prepare the slow parts of a new configuration in small steps. Raises ConfigError."""
        await trio.to_thread.run_sync(self.tls.prepare, new.servers)
        for number, server in enumerate(self.fleet.prepare(new), 1):
            self.proxy.prepare(server)
            if number % PREPARED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()

    def apply(self, old: Config, new: Config, kind: str = "reload") -> None:
        """Put a configuration in force. `kind` is the kind of the event that announces it.

        Raises ConfigError before anything has changed.
        """
        self.tls.prepare(new.servers)  # raises ConfigError before anything has changed
        for prepare in self.before_apply:
            prepare(new)
        for setting in RESTART_SETTINGS:
            if getattr(old.settings, setting) != getattr(new.settings, setting):
                logger.warning(
                    "%s has changed in the configuration; restart the router to apply it", setting
                )
        if old.run != new.run:
            logger.warning("[run] has changed in the configuration; restart the router to apply it")
        if _admin_key(new) != _admin_key(old):
            self.sessions.end()
        self.guard = Guard(new, self.guard.admin_port, self.guard.own, self.sessions)
        change = self.fleet.apply(new)
        self.config = new
        self.proxy.apply(new)
        self._follow_shared(new)
        if self.output is not None:
            self.output.follow(new.log)
        self._choose_recorded_fields(new)
        for server in change.added:
            self.probes.stop(server)  # of a removed one that returns: its key may have changed
            self.probes.start(server)
        before = {server.url: server for server in old.servers}
        for server in change.kept:
            was, now = before[server.url], server.config
            if was is not now and _credentials(was) != _credentials(now):
                self.probes.stop(server)
                self.probes.start(server)
        for server in change.removed:
            if server.in_flight == 0:
                continue
            logger.info(
                "server %s: removed, %d requests in flight may finish",
                server.name,
                server.in_flight,
            )
        if kind == "reload" or old.servers != new.servers:
            found = changes_of(old, new)
            self.feed.event(kind, found.text, "changes", found.values)
        for publish in self.after_apply:
            publish(new)

    def _choose_recorded_fields(self, config: Config) -> None:
        """Skip the extraction of fields that only the access log needs."""
        logged = self.output is not None and self.output.access.writer is not None
        self.proxy.context.wants_prompt = logged and config.log.prompts

    @property
    def log_lines_dropped(self) -> int:
        """Lines of the log and the access log that were dropped because the output was too slow."""
        return self.output.dropped if self.output is not None else 0

    async def reload(self) -> Reload:
        """Read the configuration file now; returns UNCHANGED if there is no file."""
        if self.reloader is None:
            return Reload.UNCHANGED
        return await self.reloader.reload(force=True)

    # -- figures for the control plane ---------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests in progress in all processes."""
        return len(self.proxy.context.exchanges) + self._parts.others.in_flight

    def running(self) -> list[Record]:
        """The records of the requests in progress."""
        own = [exchange.record for exchange in self.proxy.context.exchanges]
        return own + self._parts.others.running()

    def status_line(self) -> str:
        """The state of the router in one line, for the service manager."""
        servers = self.fleet.servers.values()
        up = sum(server.current_state(trio.current_time())[0] == State.UP for server in servers)
        running = self.in_flight
        line = f"{up} of {len(servers)} servers up, {running} request{'s' * (running != 1)} running"
        if self.reloader is not None and self.reloader.last_error is not None:
            line += "; the changed configuration is refused"
        return line

    def queues(self, now: float) -> list[Queue]:
        """The requests that wait for a server; empty without `[limits]`."""
        return (
            self.proxy.context.admission.queues(now)
            if self.proxy.context.admission is not None
            else []
        )

    def prefix_statistics(self, server: Server) -> PrefixStatistics | None:
        """Expected prefix cache hits of a server; None if no policy predicts them."""
        own = self.proxy.context.policies.statistics(server)
        all_of_them = [own, *self._parts.others.prefix_statistics(server)]
        known = [one for one in all_of_them if one is not None]
        if len(known) < 2:
            return known[0] if known else None
        return PrefixStatistics(*map(sum, zip(*known, strict=True)))

    def elsewhere(self, figure: str) -> float | None:
        """The other processes' part of a figure; None in a router of one process."""
        return self._parts.others.figure(figure)

    def workers(self) -> Mapping[str, Mapping[str, float]]:
        """The figures of each worker process, by number; empty in a router of one process."""
        return self._parts.others.workers()

    def refused(self, code: str) -> None:
        """Count a request that was rejected before an exchange began."""
        (self._parts.reports or self.metrics).refused(code)

    # -- drain --------------------------------------------------------------------------------

    def drain_server(self, name: str, on: bool) -> Server | None:
        """Drain a server, or take it back; returns None if the name is unknown."""
        server = self.fleet.servers.get(name)
        if server is not None:
            server.drain(on)
            self.fleet.settle(trio.current_time())
            if self.shared is not None:
                self.shared.drain(server, on=on)
        return server

    async def lame_duck(self) -> None:
        """Fail `/readyz`, and go on serving for `drain_grace` seconds."""
        self.draining = True
        grace = self.config.settings.drain_grace
        if grace:
            logger.info(
                "not ready any more, accepting requests for another %g s (drain_grace)", grace
            )
            await trio.sleep(grace)

    async def wind_down(self, *, still_listening: bool = False, others_drain: bool = False) -> None:
        """Let the requests in flight finish for `drain_timeout`, then cancel them with an error.

        Websocket clients follow the drain to its end, and are disconnected then (1001), unless
        `others_drain`: other processes still finish requests. If the port is still open, new
        requests are rejected; otherwise the drain would not end.
        """
        self.draining = True
        self.proxy.context.stopping = still_listening
        running = len(self.proxy.context.exchanges)
        if running:
            logger.info("draining: waiting for %d requests in flight", running)
        with trio.move_on_after(self.config.settings.drain_timeout) as patience:
            await self.proxy.drained()
        self.proxy.context.stopping = True
        if patience.cancelled_caught:
            running = len(self.proxy.context.exchanges)
            logger.warning("drain_timeout reached: cancelled %d requests in flight", running)
            await self.end_requests()
        if not others_drain:
            self.feed.close()

    async def end_requests(self) -> None:
        """Cancel the requests in flight with an error."""
        self.proxy.context.stopping = True
        self.proxy.stop()
        with trio.move_on_after(END_TIME):
            await self.proxy.drained()

    @property
    def ready(self) -> bool:
        """True if a load balancer should send requests to this router."""
        # Servers that join later do not make a running router unready.
        self._was_probed = self._was_probed or self.fleet.probed
        return self._was_probed and not self.draining and self._parts.others.ready


def _log_transition(change: Transition) -> None:
    logger.log(
        _LEVELS.get(change.new, logging.INFO),
        "server %s: %s -> %s%s",
        change.server,
        change.old,
        change.new,
        f" ({change.reason.text})" if change.reason else "",
    )


def log_memory_plan(settings: Settings, workers: int) -> None:
    """Log the memory limits that follow from the machine's memory."""
    plan = memory_line(settings, Memory(memory_limit_mb(), workers))
    if plan is not None:
        warn, line = plan
        logger.log(logging.WARNING if warn else logging.INFO, "%s", line)


def _admin_key(config: Config) -> Secret | None:
    return config.auth.admin_key if config.auth is not None else None


def _credentials(config: ServerConfig) -> tuple[object, ...]:
    """The settings that a running probe cannot change."""
    tls = config.ca, config.client_certificate, config.client_key, config.verify
    return config.api_key, *tls
