"""The patch of a Hypercorn that serves alone; `vllm_router/asgi.py` is its only user."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import Any

import hypercorn.trio
import hypercorn.trio.run
import trio
from hypercorn.config import Config

from vllm_router.http.hypercorn.settings import tune
from vllm_router.http.hypercorn.streams import Address
from vllm_router.http.hypercorn.tcp_server import HANDSHAKES, GuardedTCPServer
from vllm_router.http.io.keepalive import enable_keepalive
from vllm_router.http.server.tls_stream import Handshakes


def install(
    before_shutdown: Callable[[], Awaitable[None]] | None = None,
    before_start: Callable[[Config, list[Address]], None] | None = None,
) -> None:
    """Give `hypercorn -k trio` and `hypercorn.trio.serve` the guarded connections and settings.

    `before_start` is called with Hypercorn's configuration and its TCP listening addresses before
    the lifespan begins; an exception ends Hypercorn. `before_shutdown` is awaited at the begin of
    a shutdown: while it runs, requests are still accepted and served. Stock Hypercorn closes its
    listeners at once.
    """
    run: Any = hypercorn.trio.run
    package: Any = hypercorn.trio
    stock = getattr(run.worker_serve, "stock", run.worker_serve)

    async def worker_serve(
        app: Any,
        config: Config,
        *,
        sockets: Any = None,
        shutdown_trigger: Callable[..., Awaitable[None]] | None = None,
        task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        tune(config)
        made = sockets is None
        if sockets is None:
            sockets = config.create_sockets()
        listeners = (*sockets.secure_sockets, *sockets.insecure_sockets)
        if before_start is not None:
            addresses = [
                sock.getsockname()[:2]
                for sock in listeners
                if sock.family in (socket.AF_INET, socket.AF_INET6)
            ]
            before_start(config, addresses)
        for sock in listeners:
            sock.listen(config.backlog)  # again, with the tuned backlog
            enable_keepalive(sock)

        async def trigger() -> None:
            if shutdown_trigger is None:
                await trio.sleep_forever()
            else:
                await shutdown_trigger()
            if before_shutdown is not None:
                await before_shutdown()

        handshakes = vars(config)[HANDSHAKES] = Handshakes()
        pacing = trio.CancelScope()

        async def pace() -> None:
            with pacing:
                await handshakes.run()

        trio.lowlevel.spawn_system_task(pace)
        try:
            await stock(
                app, config, sockets=sockets, shutdown_trigger=trigger, task_status=task_status
            )
        finally:
            pacing.cancel(reason="the server has ended")
            if made:
                for sock in listeners:
                    sock.close()

    worker_serve.stock = stock  # type: ignore[attr-defined]  # a second install replaces the first
    run.TCPServer = GuardedTCPServer
    run.worker_serve = package.worker_serve = worker_serve
