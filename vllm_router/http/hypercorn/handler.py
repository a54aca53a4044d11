"""Hypercorn as a handler of accepted connections."""

from __future__ import annotations

from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app

from vllm_router.http.asgi_types import App
from vllm_router.http.http_error import OnRejected
from vllm_router.http.hypercorn.settings import tune
from vllm_router.http.hypercorn.streams import Relay, ReplayStream
from vllm_router.http.hypercorn.tcp_server import GuardedTCPServer
from vllm_router.http.server.limits import Limits


class _Context(WorkerContext):
    """With `closing`, every response ends its connection."""

    closing = False


class HypercornHandler:
    """Serves connections with Hypercorn, in the caller's tasks. A `ConnectionHandler`.

    The caller runs the application's lifespan.
    """

    def __init__(
        self, app: App, *, limits: Limits | None = None, on_rejected: OnRejected | None = None
    ) -> None:
        self._on_rejected = on_rejected
        self.config = Config()
        tune(self.config)
        self.use_limits(limits or Limits())
        framework: Any = app
        self._app = wrap_app(framework, self.config.wsgi_max_body_size, "asgi")
        self._context = _Context(None)
        self._connections: set[GuardedTCPServer] = set()

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._connections)

    async def serve(
        self,
        stream: trio.SocketStream | trio.SSLStream[Any],
        data: bytes = b"",
        relay: Relay | None = None,
    ) -> None:
        """Serve one connection to its end and close it; `data` has been read from it already."""
        server = GuardedTCPServer(
            self._app,
            self.config,
            self._context,
            ConnectionState({}),
            ReplayStream(stream, data),
            limits=self._limits,
            on_rejected=self._on_rejected,
            relay=relay,
        )
        self._connections.add(server)
        try:
            await server.run()
        finally:
            self._connections.discard(server)

    def use_limits(self, limits: Limits) -> None:
        """Serve new connections within these limits."""
        self._limits = limits
        self.config.keep_alive_timeout = limits.keep_alive_timeout
        self.config.h11_max_incomplete_size = limits.max_head_bytes

    @property
    def closing(self) -> bool:
        """Whether every HTTP/1.1 response is the last one of its connection."""
        return self._context.closing

    @closing.setter
    def closing(self, value: bool) -> None:
        self._context.closing = value

    def close_idle(self, seconds: float) -> None:
        """Close connections that have waited this long for a request."""
        moment = trio.current_time() - seconds
        for server in self._connections:
            if server.idle_since <= moment:
                server.abort()

    def drain(self) -> None:
        """Close idle connections now, and the others after their response."""
        terminated: Any = self._context.terminated
        terminated._event.set()

    def abort(self) -> None:
        """End every connection now, in any state."""
        for server in self._connections:
            server.abort()
