"""`vllm-router run` in one process: listeners, supervisor, signals and the drain."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import secrets
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import trio

from vllm_router.config.schema import Config, Settings
from vllm_router.config.source import ConfigSource
from vllm_router.config.ssl_contexts import serving_context
from vllm_router.config.types import digest_of, split_address
from vllm_router.errors import RouterError
from vllm_router.http.server.interfaces import Address
from vllm_router.http.server.limits import Limits
from vllm_router.http.server.listener import Listener
from vllm_router.observability import tracing
from vllm_router.observability.log_output import LogOutput
from vllm_router.routing.paths import is_inference
from vllm_router.runtime.dispatch import RequestDispatcher
from vllm_router.runtime.local_listener import LocalListener, LocalSockets
from vllm_router.runtime.service_manager import ServiceManager
from vllm_router.runtime.supervisor import Supervisor, log_memory_plan
from vllm_router.web.access import is_loopback
from vllm_router.web.guard import MonitorListener

logger = logging.getLogger(__name__)


class LocalMonitorAccess:
    """Access for the router's own full-screen monitor, independent of keys and TLS.

    `url` is a loopback listener that accepts only requests with `key`. It is empty if no such
    listener is needed: the monitor then uses the public one.
    """

    def __init__(self) -> None:
        self.key = secrets.token_urlsafe(32)
        self.url = ""

    def open(self, front: Listener, config: Config, local: LocalSockets) -> MonitorListener | None:
        """Open the listener if it is needed. Raises OSError.

        Without keys, TLS and a separate administration listener, the monitor connects like any
        local command, through one of the `local` sockets.
        """
        locked = config.auth is not None or config.tls is not None
        if not locked and config.settings.admin_listen is None and local.sockets:
            return None
        host, port = front.open("127.0.0.1", 0, plain=True)[0]
        self.url = url_of(host, port)
        return MonitorListener(port, digest_of(self.key))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """The options of the command line.

    `source` is None if there is no configuration file to follow. The caller closes `output`; None
    means no access log. `workers` is used by `serve_workers` only.

    With `demo`, that many simulated servers run inside this process and replace the servers of
    `config`. `demo_load` is how much traffic of its own the demo has; 0: none.

    `passed` are descriptors of listening sockets that replace `host` and `port`; the socket at the
    port of `admin_listen` is used for administration. With `reuse_port`, other processes may listen
    at the same addresses.
    """

    config: Config
    demo: int = 0
    demo_load: float = 0.0
    source: ConfigSource | None = None
    host: str = "0.0.0.0"
    port: int = 8888
    lane: bool = True
    reuse_port: bool = False
    passed: tuple[int, ...] = ()
    workers: int = 1
    output: LogOutput | None = None
    view: LocalMonitorAccess | None = None


class CannotListen(RouterError):
    """A configured or passed address cannot be listened on."""


async def serve(options: ServeOptions, listening: Callable[[str], None]) -> None:
    """Run the router until SIGTERM or SIGINT, then drain. Calls `listening(url)` when it is ready.

    After the first signal `/readyz` answers 503 and requests are still accepted for `drain_grace`
    seconds. Then the listeners close, and requests in flight have `drain_timeout` seconds to finish
    before they are cancelled with an error event. A second signal ends at once.

    Raises OSError if the public port is not available, CannotListen for other listeners, and
    ConfigError if the TLS files are unusable.
    """
    app = RequestDispatcher()
    settings = options.config.settings
    log_memory_plan(settings, options.workers)
    limits = client_limits(settings)
    on_rejected = options.output.access.refused if options.output is not None else None
    front = Listener(
        app,
        accepts=is_inference,
        lane=options.lane,
        limits=limits,
        tls_only=True,
        on_rejected=on_rejected,
        max_connections=most_connections(),
    )
    take_tls(front, options.config)
    public, admin = listen(front, options)
    signals = StopSignals()
    with contextlib.ExitStack() as ending:
        local = ending.enter_context(contextlib.closing(LocalSockets()))
        local.open(addresses_of(front))
        view = options.view
        monitor_listener = view.open(front, options.config, local) if view is not None else None
        spans = ending.enter_context(tracing.running(options.config.log))
        async with trio.open_nursery() as nursery:
            await nursery.start(signals.listen)
            config = options.config
            if options.demo:
                from vllm_router.lab.demo import start_demo  # imported only if it is used

                several = options.demo_load > 0
                config = await start_demo(nursery, options.demo, settings, several_models=several)
            supervisor = Supervisor(
                config,
                options.source,
                output=options.output,
                telemetry=spans,
                admin_port=admin[1] if admin is not None else None,
                monitor_listener=monitor_listener,
            )
            supervisor.before_apply.append(partial(follow_tls, front, supervisor))
            supervisor.before_apply.append(partial(follow_limits, front, supervisor))
            manager = ServiceManager(os.environ)
            supervisor.reloading = manager.reloading
            app.attach(supervisor)
            await nursery.start(supervisor.run)
            if options.passed or options.reuse_port:
                await probed(supervisor)
            await nursery.start(front.serve)
            local_listener = LocalListener(
                app, local.sockets, limits=limits, on_rejected=on_rejected
            )
            await nursery.start(local_listener.serve)
            if admin is not None:
                logger.info("administration on %s", url_of(*admin))
            url = url_of(*public, secure=config.tls is not None)
            listening(url)
            start_demo_traffic(nursery, options, url)
            manager.ready(supervisor.status_line())
            nursery.start_soon(manager.run, supervisor.status_line)
            await signals.first.wait()
            manager.stopping()
            with signals.until_second() as patience:
                await drain(supervisor, front)
            if patience.cancelled_caught:
                await end_at_once(supervisor, front)
            front.abort()
            nursery.cancel_scope.cancel(reason="stopped")
    logger.info("stopped")


def start_demo_traffic(nursery: trio.Nursery, options: ServeOptions, url: str) -> None:
    """Start the demo's clients of the router at `url`, if there are any."""
    if options.demo and options.demo_load:
        from vllm_router.lab.demo_traffic import run_demo_traffic  # imported only if it is used

        nursery.start_soon(run_demo_traffic, url, options.demo_load)


def client_limits(settings: Settings) -> Limits:
    """The limits for clients, from the configuration."""
    return Limits(
        body_read_timeout=settings.body_timeout,
        write_stall_timeout=settings.write_stall_timeout,
        keep_alive_timeout=settings.client_idle_timeout,
    )


def take_tls(front: Listener, config: Config) -> None:
    """Use or stop using TLS for new connections. Raises ConfigError if its files are unusable."""
    front.use_tls(serving_context(config.tls) if config.tls is not None else None)


def follow_limits(front: Listener, supervisor: Supervisor, new: Config) -> None:
    """Apply changed client limits of a reload to new connections."""
    limits = client_limits(new.settings)
    if limits != client_limits(supervisor.config.settings):
        front.use_limits(limits)


def follow_tls(front: Listener, supervisor: Supervisor, new: Config) -> None:
    """Apply a changed TLS configuration of a reload to new connections."""
    if new.tls != supervisor.config.tls:
        take_tls(front, new)


DESCRIPTORS_KEPT = 64
"""File descriptors reserved for files, probes and idle connections to servers."""


def most_connections() -> int | None:
    """The client limit by file descriptors: each client may need a second one, to a server."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors == resource.RLIM_INFINITY:
        return None
    return max(1, (descriptors - DESCRIPTORS_KEPT) // 2)


def listen(front: Listener, options: ServeOptions) -> tuple[Address, Address | None]:
    """Open or adopt the public listener and, if configured, the administration listener.

    On a loopback address the administration listener also accepts plain HTTP. Raises OSError for
    the public port, and CannotListen for configured and passed addresses.
    """
    wanted = options.config.settings.admin_listen
    host, port = split_address(wanted) if wanted is not None else ("", 0)
    public = admin = None
    for fileno in options.passed:
        try:
            address = front.adopt(fileno)
        except OSError as error:
            raise CannotListen(f"passed socket {fileno}: {error.strerror or error}") from None
        if port and address[1] == port:
            admin = address
            if is_loopback(address[0]):
                front.allow_plain(port)
        else:
            public = public or address
    if options.passed and public is None:
        raise CannotListen("no socket was passed for the public port")
    shared = options.reuse_port
    if public is None:
        found = front.open(options.host, options.port, reuse_port=shared)
        public = options.host, found[0][1]
    if wanted is not None and admin is None:
        try:
            admin = front.open(host, port, plain=is_loopback(host), reuse_port=shared)[0]
        except OSError as error:
            raise CannotListen(f"admin_listen: {wanted}: {error.strerror or error}") from None
    return public, admin


def addresses_of(front: Listener) -> list[Address]:
    """The TCP addresses of the listeners, with the actual ports."""
    return [listener.getsockname()[:2] for listener in front.listeners]


async def probed(supervisor: Supervisor) -> None:
    """Wait until every server has been probed once, at most for the time of one check.

    Until then, another process serves the port.
    """
    with trio.move_on_after(supervisor.config.settings.health_check_timeout + 1):
        while not supervisor.fleet.probed:  # noqa: ASYNC110  once per start
            await trio.sleep(0.02)


def url_of(host: str, port: int, *, secure: bool = False) -> str:
    scheme = "https" if secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


async def drain(
    supervisor: Supervisor, front: Listener, wind_down: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Finish the requests in flight, within the configured times.

    `wind_down` replaces the supervisor's method.
    """
    await supervisor.lame_duck()
    if not supervisor.in_flight:
        supervisor.feed.close()
    front.stop_accepting()
    front.close_after_responses()
    with trio.move_on_after(IDLE_GRACE):
        await front.drained()
    front.begin_drain()
    await (wind_down or supervisor.wind_down)()
    with trio.move_on_after(LINGER):
        await front.drained()


async def end_at_once(supervisor: Supervisor, front: Listener) -> None:
    """End the requests in flight with an error, and give those last messages time to leave."""
    await supervisor.end_requests()
    front.begin_drain()
    with trio.move_on_after(LAST_MESSAGES):
        await front.drained()


LAST_MESSAGES = 0.3
"""Seconds for the errors of requests that the second signal ends."""

IDLE_GRACE = 1.0
"""Seconds that idle connections stay open, because a request may be on its way; it is served.

`/readyz` fails already. Clients notice the closed port, or the end of their last response.
"""

LINGER = 1.0
"""Seconds for connections to close after their last response."""


class StopSignals:
    """SIGTERM and SIGINT: the first requests a drain, the second an immediate end."""

    def __init__(self) -> None:
        self.first = trio.Event()
        self._second = trio.CancelScope()

    async def listen(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Handle signals until cancelled."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            task_status.started()
            async for number in received:
                name = signal.Signals(number).name
                if self.first.is_set():
                    logger.warning("second %s: stopping at once", name)
                    self.end_now()
                else:
                    logger.info("%s: draining", name)
                    self.first.set()

    def end_now(self) -> None:
        """Act as on the second signal."""
        self._second.cancel(reason="second signal")

    def until_second(self) -> trio.CancelScope:
        """A scope that the second signal cancels."""
        return self._second
