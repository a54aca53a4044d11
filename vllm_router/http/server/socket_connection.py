"""A client connection on a bare socket."""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable

import trio

from vllm_router.http.asgi_types import Message
from vllm_router.http.io.async_socket import READ_SIZE
from vllm_router.http.io.closing import reset_on_close, wait_until_delivered
from vllm_router.http.io.sockets import async_socket
from vllm_router.http.server.asgi_connection import GONE, ClientDisconnected
from vllm_router.http.server.connection import Connection
from vllm_router.http.server.host import Host
from vllm_router.http.server.request_reader import ARRIVING, COMPLETE, DELIVERED


class SocketConnection(Connection):
    """Owns a non-blocking socket, which `run` closes. Offers itself as `Outlet`."""

    __slots__ = ("_async", "_socket")

    is_outlet = True

    def __init__(
        self,
        host: Host,
        sock: socket.socket,
        client: tuple[str, int] | None = None,
        local: tuple[str, int] | None = None,
    ) -> None:
        super().__init__(host, client, local)
        self._socket = sock
        self._async = async_socket(sock, self._on_hangup)

    async def _serve(self) -> None:
        await self._answer_all()
        if self._presence is not GONE:
            await self._async.drain()
            if self._handed_over is not None:
                self._async.detach()

    def _on_hangup(self) -> None:
        """The client has closed its side, or a write has failed."""
        if self._async.broken:
            self.client_left()
        else:
            self.hang_up()

    def _read(self, size: int = READ_SIZE) -> Awaitable[bytes]:
        return self._async.read(math.inf, size)

    def _write_now(self, data: bytes) -> bool:
        sock = self._async
        if sock.broken:
            raise BrokenPipeError
        sock.write(data)
        return not sock.unsent

    async def _write_rest(self, data: bytes) -> None:
        await self._async.drain()
        if self._async.broken:
            raise BrokenPipeError

    def has_input(self) -> bool:
        return self._async.has_unread()

    def has_output(self) -> bool:
        return bool(self._async.unsent)

    async def _end_output(self) -> None:
        with trio.move_on_after(self._limits.linger):
            await self._async.drain()
        self._socket.shutdown(socket.SHUT_WR)

    def _close_now(self) -> bool:
        self._async.detach()
        self._socket.close()
        return True

    async def _reset(self) -> None:
        with trio.move_on_after(self._limits.linger):
            await self._async.drain()
            await wait_until_delivered(self._socket, self._limits.linger)
        self._async.detach()
        reset_on_close(self._socket)
        self._socket.close()

    # -- Outlet: see asgi_types ----------------------------------------------------------------

    def whole_body(self) -> bytes | None:
        if self._body is not COMPLETE or self._presence is GONE or self._error is not None:
            return None
        pieces, self._body = self._pieces, DELIVERED
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return body

    def send_whole(self, start: Message, last: Message) -> bool:
        response, sock = self._response, self._async
        if response is None or self._presence is GONE or sock.broken:
            return False
        close = self._body is ARRIVING or self._host.closing
        sock.write(response.whole(start, last["body"], close=close))
        if self._finished is not None:
            self._finished.set()
        return not sock.unsent

    def send_part(self, piece: bytes) -> bool:
        response, sock = self._response, self._async
        if response is None or self._presence is GONE or sock.broken:
            return False
        sock.write(response.part(piece))
        return not sock.unsent

    async def caught_up(self) -> None:
        if self._presence is not GONE:
            await self._async.drain()
        if self._presence is GONE or self._async.broken:
            self.client_left()
            await trio.lowlevel.checkpoint()  # where the application is cancelled
            raise ClientDisconnected("the client has left")
