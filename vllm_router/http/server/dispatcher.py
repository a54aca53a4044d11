"""Dispatch of accepted connections: TLS or plain, the lane or another handler."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable

import trio

from vllm_router.http.hypercorn.settings import ALPN_PROTOCOLS
from vllm_router.http.io.trio_internals import release_ssl_stream
from vllm_router.http.server.interfaces import Address, ConnectionHandler
from vllm_router.http.server.lane import Lane
from vllm_router.http.server.limits import Limits
from vllm_router.http.server.socket_connection import SocketConnection
from vllm_router.http.server.stream_connection import StreamConnection
from vllm_router.http.server.tls_stream import Handshakes, TlsStream

_TLS_HANDSHAKE = b"\x16"


class ConnectionDispatcher:
    """Serves connections with the lane, and moves them to `handler` if the lane does not accept.

    Without a lane, `handler` serves all. `is_plain(sock)`: whether a connection may be plain HTTP
    although `tls_only` is set. `handed_over` counts connections moved from the lane.
    """

    def __init__(
        self,
        lane: Lane | None,
        handler: ConnectionHandler,
        limits: Limits,
        *,
        tls_only: bool,
        is_plain: Callable[[socket.socket], bool],
    ) -> None:
        self.lane = lane
        self.handler = handler
        self.handed_over = 0
        self._limits = limits
        self._tls_only = tls_only
        self._is_plain = is_plain
        self._ssl_context: ssl.SSLContext | None = None
        self._handshakes = Handshakes()
        self._draining = False
        self._silent: set[trio.CancelScope] = set()
        """Waits for a client's first byte."""

    # -- settings ------------------------------------------------------------------------------

    def use_tls(self, ssl_context: ssl.SSLContext | None) -> None:
        """Serve new connections with this context; None for plain HTTP."""
        if ssl_context is not None:
            ssl_context.set_alpn_protocols(ALPN_PROTOCOLS)
        self._ssl_context = ssl_context

    def use_limits(self, limits: Limits) -> None:
        """Serve new connections within these limits."""
        self._limits = limits
        if self.lane is not None:
            self.lane.limits = limits
        self.handler.use_limits(limits)

    def set_closing(self, closing: bool) -> None:
        """Whether every response is the last one of its connection."""
        if self.lane is not None:
            self.lane.closing = closing
        self.handler.closing = closing

    # -- ends ----------------------------------------------------------------------------------

    def shorten_waits(self) -> None:
        """Give new connections little time for their first request, before a drain."""
        self._draining = True
        if self.lane is not None:
            self.lane.draining = True

    def drain(self) -> None:
        """Close idle connections at once, and the others after their response."""
        for wait in self._silent:
            wait.cancel(reason="draining")
        if self.lane is not None:
            self.lane.drain()
        self.handler.drain()

    def close_idle(self, seconds: float) -> None:
        """Close connections that have waited this long for a request."""
        if self.lane is not None:
            self.lane.close_idle(seconds)
        self.handler.close_idle(seconds)
        soon = trio.current_time() + seconds
        for wait in self._silent:
            wait.deadline = min(wait.deadline, soon)

    def abort(self) -> None:
        """End every connection now."""
        if self.lane is not None:
            self.lane.abort()
        self.handler.abort()

    # -- serving -------------------------------------------------------------------------------

    def start_helpers(self, nursery: trio.Nursery) -> None:
        """Start the tasks that connections need; they run until cancelled."""
        if self.lane is not None:
            nursery.start_soon(self.lane.watch)
        nursery.start_soon(self._handshakes.run)

    async def serve(self, sock: socket.socket, client: Address) -> None:
        """Serve one connection, from its first byte to its last. The caller closes the socket."""
        context = self._ssl_context
        if context is not None:
            first = await self._first_byte(sock)
            if not first:
                return
            if first == _TLS_HANDSHAKE or (self._tls_only and not self._is_plain(sock)):
                await self._serve_tls(sock, client, context)
                return
        if self.lane is None:
            await self.handler.serve(_stream_over(sock))
            return
        try:
            local = sock.getsockname()[:2]
        except OSError:
            return
        data = await SocketConnection(self.lane, sock, client, local).run()
        if data is not None:
            self.handed_over += 1
            await self.handler.serve(_stream_over(sock), data)

    async def _first_byte(self, sock: socket.socket) -> bytes:
        """The client's first byte, left unread; b"" if it sends none in time."""
        with trio.move_on_after(self._limits.keep_alive_timeout) as wait:
            if self._draining:
                wait.deadline = trio.current_time() + self._limits.header_timeout
            self._silent.add(wait)
            try:
                await trio.lowlevel.wait_readable(sock)
            finally:
                self._silent.discard(wait)
        # Input may have arrived together with the timeout.
        try:
            return sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return b""

    async def _serve_tls(
        self, sock: socket.socket, client: Address, context: ssl.SSLContext
    ) -> None:
        stream = await self._handshakes.accept(
            _stream_over(sock), context, self._limits.header_timeout
        )
        if stream is None:
            return
        try:
            await self._serve_encrypted(stream, sock, client)
        finally:
            release_ssl_stream(stream)

    async def _serve_encrypted(
        self, stream: TlsStream, sock: socket.socket, client: Address
    ) -> None:
        if self.lane is None or stream.selected_alpn_protocol() == "h2":
            await self.handler.serve(stream)
            return
        local = stream.transport_stream.socket.getsockname()[:2]
        connection = StreamConnection(
            self.lane, stream, client, local, scheme="https", fileno=sock.fileno()
        )
        data = await connection.run()
        if data is not None:
            self.handed_over += 1
            await self.handler.serve(stream, data)


def _stream_over(sock: socket.socket) -> trio.SocketStream:
    """The socket as a Trio stream, which owns it."""
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
