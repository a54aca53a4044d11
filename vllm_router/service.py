"""One router process from its first listening socket to its last exchange."""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import trio

from vllm_router import telemetry
from vllm_router.asgi import Application
from vllm_router.config import Config
from vllm_router.errors import RouterError
from vllm_router.front import Front
from vllm_router.http1.server import Limits
from vllm_router.kinds import digest_of, split_address
from vllm_router.log_output import LogOutput
from vllm_router.supervisor import Supervisor
from vllm_router.tasks.watch import ConfigSource
from vllm_router.tls import serving_context
from vllm_router.web.access import is_loopback
from vllm_router.web.guard import OwnDoor

logger = logging.getLogger(__name__)


class OwnView:
    """What the view that runs beside the router needs to get in, however the router is locked.

    `url` is that of a loopback listener which serves nobody but the holder of `key`; it is empty,
    and the view comes in by the public one, if there is nothing to lock it out.
    """

    def __init__(self) -> None:
        self.key = secrets.token_urlsafe(32)
        self.url = ""

    def open(self, front: Front, config: Config) -> OwnDoor | None:
        """Open the listener if there must be one. Raises OSError."""
        if config.auth is None and config.tls is None and config.settings.admin_listen is None:
            return None
        host, port = front.open("127.0.0.1", 0, plain=True)[0]
        self.url = _url(host, port)
        return OwnDoor(port, digest_of(self.key))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What the command line decides. `source` is None if there is no file to follow.

    `output` is closed by the caller; None for no access log.

    With `demo`, so many simulated servers run inside, and their addresses replace the servers of
    `config`.
    """

    config: Config
    demo: int = 0
    source: ConfigSource | None = None
    host: str = "0.0.0.0"
    port: int = 8888
    lane: bool = True
    output: LogOutput | None = None
    view: OwnView | None = None


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
    app = Application()
    settings = options.config.settings
    limits = Limits(
        body_read_timeout=settings.body_timeout, write_stall_timeout=settings.write_stall_timeout
    )
    front = Front(app, lane=options.lane, limits=limits, tls_only=True)
    take_tls(front, options.config)
    addresses = front.open(options.host, options.port)
    admin = open_admin(front, settings.admin_listen)
    own_door = options.view.open(front, options.config) if options.view is not None else None
    signals = StopSignals()
    with contextlib.ExitStack() as ending:
        spans = telemetry.start(options.config.log)
        if spans is not None:
            ending.callback(spans.close)
        async with trio.open_nursery() as nursery:
            await nursery.start(signals.listen)
            config = options.config
            if options.demo:
                from vllm_router.demo import start_demo  # it costs a start without it nothing

                config = await start_demo(nursery, options.demo, settings)
            supervisor = Supervisor(
                config,
                options.source,
                output=options.output,
                telemetry=spans,
                admin_port=admin[1] if admin is not None else None,
                own_door=own_door,
            )
            supervisor.before_apply.append(partial(follow_tls, front, supervisor))
            app.attach(supervisor)
            await nursery.start(supervisor.run)
            await nursery.start(front.serve)
            if admin is not None:
                logger.info("administration on %s", _url(*admin))
            listening(_url(options.host, addresses[0][1], secure=config.tls is not None))
            await signals.first.wait()
            with signals.until_second():
                await drain(supervisor, front)
            front.abort()
            nursery.cancel_scope.cancel(reason="stopped")
    logger.info("stopped")


def take_tls(front: Front, config: Config) -> None:
    """New connections speak TLS, or no longer. Raises ConfigError if its files cannot be used."""
    front.use_tls(serving_context(config.tls) if config.tls is not None else None)


def follow_tls(front: Front, supervisor: Supervisor, new: Config) -> None:
    """The same for a reload, if it changes something."""
    if new.tls != supervisor.config.tls:
        take_tls(front, new)


def open_admin(front: Front, address: str | None) -> tuple[str, int] | None:
    """The listener for administration, if there is to be one. Raises CannotListen.

    At a loopback address it speaks plain HTTP, too: nobody else can hear it.
    """
    if address is None:
        return None
    host, port = split_address(address)
    try:
        return front.open(host, port, plain=is_loopback(host))[0]
    except OSError as error:
        raise CannotListen(f"admin_listen: {address}: {error.strerror or error}") from None


def _url(host: str, port: int, *, secure: bool = False) -> str:
    scheme = "https" if secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


async def drain(supervisor: Supervisor, front: Front) -> None:
    """Finish what runs, within the configured times."""
    await supervisor.lame_duck()
    front.stop_accepting()
    front.begin_drain()
    await supervisor.wind_down()
    with trio.move_on_after(LINGER):
        await front.drained()


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
                    logger.warning("%s again: ending at once", name)
                    self._second.cancel(reason="second signal")
                else:
                    logger.info("%s: draining", name)
                    self.first.set()

    def until_second(self) -> trio.CancelScope:
        """A scope that the second signal cancels."""
        return self._second
