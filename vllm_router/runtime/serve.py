"""One router process from its first listening socket to its last exchange."""

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
from vllm_router.http.server.listener import Address, Front
from vllm_router.http.server.server import Limits
from vllm_router.http.server.socket_handover import notify
from vllm_router.observability import tracing
from vllm_router.observability.log_output import LogOutput
from vllm_router.routing.paths import is_inference
from vllm_router.runtime.dispatch import Dispatcher
from vllm_router.runtime.local_listener import LocalListener, LocalSockets
from vllm_router.runtime.supervisor import Supervisor, log_memory_plan
from vllm_router.web.access import is_loopback
from vllm_router.web.guard import MonitorListener

logger = logging.getLogger(__name__)


class LocalMonitorAccess:
    """What the view that runs beside the router needs to get in, however the router is locked.

    `url` is that of a loopback listener which serves nobody but the holder of `key`; it is empty,
    and the view comes in by the public one, if there is nothing to lock it out.
    """

    def __init__(self) -> None:
        self.key = secrets.token_urlsafe(32)
        self.url = ""

    def open(self, front: Front, config: Config, local: LocalSockets) -> MonitorListener | None:
        """Open the listener if there must be one. Raises OSError.

        Without keys, TLS and a listener of its own for administration the view comes in as any
        command of this machine does, by one of the `local` sockets.
        """
        locked = config.auth is not None or config.tls is not None
        if not locked and config.settings.admin_listen is None and local.sockets:
            return None
        host, port = front.open("127.0.0.1", 0, plain=True)[0]
        self.url = url_of(host, port)
        return MonitorListener(port, digest_of(self.key))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What the command line decides. `source` is None if there is no file to follow.

    `output` is closed by the caller; None for no access log.

    `workers` is for those who start them: `serve` is one process.

    With `demo`, so many simulated servers run inside, and their addresses replace the servers of
    `config`.

    `passed` are descriptors of listening sockets to be used instead of `host` and `port`: the one
    at the port of `admin_listen`, if there is one, for administration. With `reuse_port` other
    processes may listen at the same addresses.
    """

    config: Config
    demo: int = 0
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
    """A port that the configuration names cannot be had."""


async def serve(options: ServeOptions, listening: Callable[[str], None]) -> None:
    """Run the router until SIGTERM or SIGINT, then drain. `listening(url)` is called once it is up.

    On the first signal `/readyz` answers 503 while requests are still served for `drain_grace`
    seconds; then no connection is accepted any more, and what runs has `drain_timeout` seconds to
    finish before it is ended with an error event. A second signal ends at once.
    Raises OSError if the port cannot be had, CannotListen for that of administration, and
    ConfigError if the files for TLS cannot be used any more.
    """
    app = Dispatcher()
    settings = options.config.settings
    log_memory_plan(settings, options.workers)
    limits = client_limits(settings)
    told = options.output.access.refused if options.output is not None else None
    front = Front(
        app,
        accepts=is_inference,
        lane=options.lane,
        limits=limits,
        tls_only=True,
        told=told,
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
                from vllm_router.lab.demo import start_demo  # it costs a start without it nothing

                config = await start_demo(nursery, options.demo, settings)
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
            app.attach(supervisor)
            await nursery.start(supervisor.run)
            if options.passed or options.reuse_port:
                await probed(supervisor)
            await nursery.start(front.serve)
            door = LocalListener(app, local.sockets, limits=limits, told=told)
            await nursery.start(door.serve)
            if admin is not None:
                logger.info("administration on %s", url_of(*admin))
            listening(url_of(*public, secure=config.tls is not None))
            notify("READY=1", os.environ)
            await signals.first.wait()
            notify("STOPPING=1", os.environ)
            with signals.until_second():
                await drain(supervisor, front)
            front.abort()
            nursery.cancel_scope.cancel(reason="stopped")
    logger.info("stopped")


def client_limits(settings: Settings) -> Limits:
    """What a client may take, as far as the configuration says."""
    return Limits(
        body_read_timeout=settings.body_timeout,
        write_stall_timeout=settings.write_stall_timeout,
        keep_alive_timeout=settings.client_idle_timeout,
    )


def take_tls(front: Front, config: Config) -> None:
    """New connections speak TLS, or no longer. Raises ConfigError if its files cannot be used."""
    front.use_tls(serving_context(config.tls) if config.tls is not None else None)


def follow_limits(front: Front, supervisor: Supervisor, new: Config) -> None:
    """A reload changes what clients may take: new connections have it so."""
    limits = client_limits(new.settings)
    if limits != client_limits(supervisor.config.settings):
        front.use_limits(limits)


def follow_tls(front: Front, supervisor: Supervisor, new: Config) -> None:
    """The same for a reload, if it changes something."""
    if new.tls != supervisor.config.tls:
        take_tls(front, new)


DESCRIPTORS_KEPT = 64
"""For files, checks of servers and connections to them that are idle."""


def most_connections() -> int | None:
    """How many clients there are descriptors for: each may need one more, to a server."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors == resource.RLIM_INFINITY:
        return None
    return max(1, (descriptors - DESCRIPTORS_KEPT) // 2)


def listen(front: Front, options: ServeOptions) -> tuple[Address, Address | None]:
    """Open or adopt the public listener and that of administration, if there is to be one.

    At a loopback address the latter speaks plain HTTP, too: nobody else can hear it. Raises
    OSError, and CannotListen for what the configuration names or was passed.
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


def addresses_of(front: Front) -> list[Address]:
    """The TCP addresses that it listens at, with the ports that 0 became."""
    return [listener.getsockname()[:2] for listener in front.listeners]


async def probed(supervisor: Supervisor) -> None:
    """Wait until every server has been asked once: until then another process serves the port.

    What does not answer is not waited for.
    """
    with trio.move_on_after(supervisor.config.settings.health_check_timeout + 1):
        while not supervisor.fleet.probed:  # noqa: ASYNC110 (nobody is told, and it is soon)
            await trio.sleep(0.02)


def url_of(host: str, port: int, *, secure: bool = False) -> str:
    scheme = "https" if secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


async def drain(
    supervisor: Supervisor, front: Front, wind_down: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Finish the requests in progress, within the configured times.

    `wind_down` replaces that of the supervisor.
    """
    await supervisor.lame_duck()
    supervisor.feed.close()
    front.stop_accepting()
    front.last_call()
    with trio.move_on_after(LAST_CALL):
        await front.drained()
    front.begin_drain()
    await (wind_down or supervisor.wind_down)()
    with trio.move_on_after(LINGER):
        await front.drained()


LAST_CALL = 1.0
"""Seconds that idle connections stay open: a request may be on its way. It is served; `/readyz`
says no. Their clients take the port's closing, or the last answer's, as the sign to go."""

LINGER = 1.0
"""Seconds for connections to close after their last answer."""


class StopSignals:
    """SIGTERM and SIGINT: the first asks for a drain, the second for an end."""

    def __init__(self) -> None:
        self.first = trio.Event()
        self._second = trio.CancelScope()

    async def listen(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Take signals until cancelled."""
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
        """The second signal has come."""
        self._second.cancel(reason="second signal")

    def until_second(self) -> trio.CancelScope:
        """A scope that the second signal cancels."""
        return self._second
