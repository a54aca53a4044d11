"""The ASGI application for Hypercorn: `hypercorn -k trio vllm_router.asgi:app`.

VLLM_ROUTER_CONFIG names the configuration file (default: servers.toml). The lifespan protocol
starts and ends the supervisor. Importing this module patches defects of the running Hypercorn;
`vllm-router run` does not import it.
"""

# ruff: noqa: E402 (signals must not kill while the rest is imported)

from __future__ import annotations

from vllm_router.runtime.early_signals import hold

hold()

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from typing import NoReturn

import trio
from hypercorn.config import Config as HypercornConfig

from vllm_router.config.memory import Memory
from vllm_router.config.source import ConfigSource
from vllm_router.config.types import split_address
from vllm_router.errors import ConfigError
from vllm_router.http.asgi_types import Receive, Scope, Send
from vllm_router.http.hypercorn.patch import install
from vllm_router.http.server.interfaces import Address
from vllm_router.observability import tracing
from vllm_router.observability.formatting import configure_if_unset
from vllm_router.observability.log_output import LogOutput
from vllm_router.routing.policies import POLICY_NAMES
from vllm_router.runtime.dispatch import RequestDispatcher
from vllm_router.runtime.local_listener import LocalListener, LocalSockets
from vllm_router.runtime.memory_limit import memory_limit_mb
from vllm_router.runtime.supervisor import Supervisor, log_memory_plan

logger = logging.getLogger(__name__)


def _refuse(message: str) -> NoReturn:
    """End all processes of Hypercorn with one message and an exit code other than 0.

    Hypercorn 0.18's master exits with 0 whatever its workers' exit codes are (run.py joins them
    twice), and handles termination signals as orders for a clean exit. So the first worker kills
    it.
    """
    master = multiprocessing.parent_process()
    if master is None or master.pid != os.getppid():
        raise SystemExit(2)  # the master is killed, or does not exist
    with socket.socket(socket.AF_UNIX) as first:
        try:
            first.bind(f"\0vllm-router refuses workers of {master.pid}")
        except OSError:
            raise SystemExit(2) from None
        if master.pid != os.getppid():
            raise SystemExit(2)  # the first worker has killed it and ended
        sys.stderr.write(message)
        sys.stderr.flush()
        os.kill(master.pid, signal.SIGKILL)
        # Keep the address until the master is gone; otherwise another worker would be the first.
        while master.pid == os.getppid():
            time.sleep(0.001)
        raise SystemExit(2)


class Application(RequestDispatcher):
    """The dispatcher for Hypercorn, whose lifespan protocol starts and ends the supervisor."""

    def __init__(self) -> None:
        super().__init__()
        self._addresses: list[Address] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def prepare(self, hypercorn: HypercornConfig, addresses: list[Address]) -> None:
        """Called by Hypercorn before it starts, with its configuration and listening addresses.

        Several Hypercorn processes would be several routers, each with its own key limits, view of
        the load, and drains.
        """
        if hypercorn.workers > 1:
            _refuse(
                f"vllm-router: hypercorn -w {hypercorn.workers} would run "
                f"{hypercorn.workers} independent routers; for several "
                f"processes use: vllm-router run --workers {hypercorn.workers}\n"
            )
        self._addresses = addresses

    async def wind_down(self) -> None:
        """Finish the requests in flight; called while the server still listens."""
        if self.supervisor is not None:
            await self.supervisor.lame_duck()
            await self.supervisor.wind_down(still_listening=True)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start the supervisor, and end it with the server."""
        await receive()
        ours = configure_if_unset()
        file = os.environ.get("VLLM_ROUTER_CONFIG", "servers.toml")
        source = ConfigSource(file, memory=Memory(memory_limit_mb()), policies=POLICY_NAMES)
        try:
            config = source.load()
        except ConfigError as error:
            for problem in error.problems:
                logger.error("%s", problem)
            await send({"type": "lifespan.startup.failed", "message": "\n".join(error.problems)})
            return
        output = LogOutput(with_log=ours)
        try:
            output.apply(config.log)
        except OSError as error:
            output.close()
            problem = f"cannot write the log: {error}"
            logger.error("%s", problem)
            await send({"type": "lifespan.startup.failed", "message": problem})
            return
        if config.tls is not None:
            logger.warning(
                "[tls] is ignored under Hypercorn: use its options --certfile and --keyfile"
            )
        address = config.settings.admin_listen
        admin_port = split_address(address)[1] if address is not None else None
        try:
            with tracing.running(config.log) as spans:
                supervisor = Supervisor(
                    config, source, output=output, telemetry=spans, admin_port=admin_port
                )
                await self._run(supervisor, receive, send)
        finally:
            output.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _run(self, supervisor: Supervisor, receive: Receive, send: Send) -> None:
        log_memory_plan(supervisor.config.settings, workers=1)
        self.attach(supervisor)
        with contextlib.closing(LocalSockets()) as local:
            local.open(self._addresses)
            await self._run_with(supervisor, LocalListener(self, local.sockets), receive, send)

    async def _run_with(
        self, supervisor: Supervisor, local_listener: LocalListener, receive: Receive, send: Send
    ) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.run)
            await nursery.start(local_listener.serve)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            nursery.cancel_scope.cancel(reason="shutdown")


app = Application()
install(before_shutdown=app.wind_down, before_start=app.prepare)
