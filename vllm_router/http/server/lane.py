"""An ASGI server for HTTP/1.1: strict, small, and cheap per request.

Each connection is one task: it reads a request, runs the application, writes the response. No
task, nursery or cancel scope is created per request. While the application waits for an engine no
task reads; if the client leaves, its socket reports it, and the connection's scope is cancelled
with the application in it (ASGI extension `vllm_router.cancel_on_disconnect`).

A client that closes its sending side counts as gone: the two cannot be distinguished.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from vllm_router.http.asgi_types import App
from vllm_router.http.head_cache import FirstHeads
from vllm_router.http.http_error import OnRejected
from vllm_router.http.request_head import HTTP2_PREFACE, Head, read_head
from vllm_router.http.request_line import check_method, request_line, split_target
from vllm_router.http.server.connection import Connection
from vllm_router.http.server.limits import Limits


class Lane:
    """The server: state that connections share, and the task that enforces their deadlines.

    A `Host`, see `host.py`.

    `accepts(method, path)` decides which requests are served here; None means all. `on_rejected`
    is called for requests rejected before the application sees them.
    """

    def __init__(
        self,
        app: App,
        *,
        accepts: Callable[[str, bytes], bool] | None = None,
        limits: Limits | None = None,
        on_rejected: OnRejected | None = None,
    ) -> None:
        self.app = app
        self.accepts = accepts
        self.on_rejected = on_rejected
        self.limits = limits or Limits()
        # Replaced by the clock's own method, without two indirections, once a loop runs.
        self.now: Callable[[], float] = trio.current_time
        self.draining = False
        self.closing = False
        self.requests = 0
        self.refused = 0
        self.first_heads = FirstHeads()
        self._connections: set[Connection] = set()
        self._occupied = trio.Event()

    def parse_head(self, data: bytes, end: int) -> Head | None:
        """Parse the head `data[:end]`; None for a request of another server. Raises HttpError."""
        accepts = self.accepts
        if accepts is not None and data.startswith(HTTP2_PREFACE):
            return None
        line = request_line(data[: data.find(b"\r\n")])
        method, target, _ = line
        check_method(method)
        if accepts is not None and not accepts(method, split_target(method, target)[0]):
            return None
        return read_head(data[:end], line)

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._connections)

    def add(self, connection: Connection) -> None:
        self.now = trio.lowlevel.current_clock().current_time
        self._connections.add(connection)
        self._occupied.set()

    def discard(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def drain(self) -> None:
        """Close idle connections now, and the others after their response."""
        self.draining = self.closing = True
        for connection in self._connections:
            connection.close_if_idle()

    def close_idle(self, seconds: float) -> None:
        """Close connections that have waited this long for a request."""
        moment = trio.current_time() - seconds
        for connection in self._connections:
            connection.close_if_idle_since(moment)

    def abort(self) -> None:
        """End every connection now, in any state."""
        for connection in self._connections:
            connection.abort()

    async def watch(self) -> None:
        """Enforce the deadlines of all connections, until cancelled.

        One task for all: a cancel scope around every read would cost more than parsing a request.
        """
        while True:
            if not self._connections:
                self._occupied = trio.Event()
                await self._occupied.wait()
            await trio.sleep(self.limits.check_interval())
            now = trio.current_time()
            for connection in self._connections:
                if connection.deadline <= now:
                    connection.expire()
                elif connection.left_unseen():
                    connection.client_left()
