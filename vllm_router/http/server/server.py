"""An ASGI server for HTTP/1.1: strict, small, and cheap per request.

One connection is one task: it reads a request, runs the application, writes the answer. Neither a
task, nor a nursery, nor a cancel scope is made per request. While the application waits for an
engine nobody reads, yet the client may leave: its wire hears of that from the kernel, the
connection's scope is cancelled, and the application with it (ASGI extension
`vllm_router.cancel_on_disconnect`).

A client that closes its sending side has left: there is no telling it from one that is gone.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import trio

from vllm_router.http.headers import RefusalTold
from vllm_router.http.io.wires import READ_SIZE, Wire
from vllm_router.http.request_head import Head
from vllm_router.http.server.connection import (
    CANCEL_ON_DISCONNECT,
    HEAD_MEMO,
    OUTLET,
    App,
    ClientGone,
    Connection,
    Scope,
)
from vllm_router.http.server.delivered import delivered
from vllm_router.http.server.response_writer import Message
from vllm_router.http.server.tls_stream import end_tls

__all__ = [
    "App",
    "Connection",
    "Limits",
    "Message",
    "Scope",
    "Server",
    "SocketConnection",
    "StreamConnection",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a client may take. Times in seconds."""

    max_head_bytes: int = 61440
    """Of request line and fields together; 431 beyond."""
    header_timeout: float = 9.0
    """From the first byte of a head to its last; 408 after."""
    keep_alive_timeout: float = 75.0
    """Silence between requests, or before the first."""
    body_read_timeout: float = 60.0
    """Silence within a body; 408 after."""
    min_body_rate: float = 500.0
    """Bytes per second a body must average once `body_read_timeout` has passed; 408 below."""
    write_stall_timeout: float = 60.0
    """How long sent bytes may stay unacknowledged (TCP_USER_TIMEOUT), then the connection ends."""
    websocket_stall_timeout: float = 20.0
    """The same for websockets, where something is sent all the time."""
    max_read_ahead: int = 65536
    """Bytes of a TLS connection that wait for the application before reading pauses; of others the
    kernel keeps what is not asked for."""
    linger: float = 2.0
    """Silence, when closing on a client that still sends, before it is cut off."""
    max_linger: float = 30.0
    """The most that such a client is listened to."""

    def tick(self) -> float:
        """How often deadlines are looked at."""
        shortest = min(self.header_timeout, self.keep_alive_timeout, self.body_read_timeout)
        return min(0.5, shortest / 4)


class Server:
    """What connections share: the application, the limits, and who watches the time for all.

    `accepts(method, path)` says which requests are served here; None means all of them. While
    `closing` is true, every answer is the last one of its connection. `told` hears of the requests
    that were refused before there was a head to be served.
    """

    def __init__(
        self,
        app: App,
        *,
        accepts: Callable[[str, bytes], bool] | None = None,
        limits: Limits | None = None,
        told: RefusalTold | None = None,
    ) -> None:
        self.app = app
        self.accepts = accepts
        self.told = told
        self.limits = limits or Limits()
        self.now: Callable[[], float] = trio.current_time
        """That, without its two detours once a loop runs."""
        self.draining = False
        self.closing = False
        self.requests = 0
        self.refused = 0
        self._connections: set[Connection] = set()
        self._occupied = trio.Event()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    def add(self, connection: Connection) -> None:
        self.now = trio.lowlevel.current_clock().current_time
        self._connections.add(connection)
        self._occupied.set()

    def discard(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def drain(self) -> None:
        """Close idle connections now, and the others after their answer."""
        self.draining = self.closing = True
        for connection in self._connections:
            connection.close_if_idle()

    def close_idle(self, seconds: float) -> None:
        """Close the connections that have waited so long for a request."""
        moment = trio.current_time() - seconds
        for connection in self._connections:
            connection.close_if_idle_since(moment)

    def abort(self) -> None:
        """End every connection now, whatever it is doing."""
        for connection in self._connections:
            connection.abort()

    async def watch(self) -> None:
        """Enforce the timeouts, until cancelled.

        One task for all connections: a scope around every read would cost a request more than its
        parsing does.
        """
        while True:
            if not self._connections:
                self._occupied = trio.Event()
                await self._occupied.wait()
            await trio.sleep(self.limits.tick())
            now = trio.current_time()
            for connection in self._connections:
                if connection.deadline <= now:
                    connection.expire()
                elif connection.left_unseen():
                    connection.client_left()


_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class SocketConnection(Connection):
    """A connection on a bare non-blocking socket, which `run` closes."""

    __slots__ = ("_socket", "_wire")

    def __init__(
        self,
        server: Server,
        sock: socket.socket,
        client: tuple[str, int] | None = None,
        address: tuple[str, int] | None = None,
    ) -> None:
        super().__init__(server, client, address)
        self._socket = sock
        self._wire = Wire(sock, self._news)

    async def _serve(self) -> None:
        await self._answer_all()
        if not self._gone:
            await self._wire.caught_up()
            if self._handed_over is not None:
                self._wire.leave()

    def _news(self) -> None:
        """The client has closed its side, or takes nothing any more."""
        if self._wire.broken:
            self.client_left()
        else:
            self.hang_up()

    def _read(self, size: int = READ_SIZE) -> Coroutine[Any, Any, bytes]:
        return self._wire.read(size)

    def _write_now(self, data: bytes) -> bool:
        wire = self._wire
        if wire.broken:
            raise BrokenPipeError
        wire.write(data)
        return not wire.late

    async def _write_rest(self, data: bytes) -> None:
        await self._wire.caught_up()
        if self._wire.broken:
            raise BrokenPipeError

    def extensions(self, head: Head) -> dict[str, Any]:
        return {CANCEL_ON_DISCONNECT: {}, HEAD_MEMO: head.memo, OUTLET: self}

    def whole_body(self) -> bytes | None:
        """See proxy.types.Outlet."""
        if self._body_open or self._delivered or self._gone or self._refusal is not None:
            return None
        pieces, self._delivered = self._pieces, True
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return body

    def send_whole(self, start: Message, last: Message) -> bool:
        """See proxy.types.Outlet."""
        answer, wire = self._answer, self._wire
        if answer is None or self._gone or wire.broken:
            return False
        answer.hold(start)
        wire.write(answer.encode(last, close=self._body_open or self._server.closing))
        if self._finished is not None:
            self._finished.set()
        return not wire.late

    def send_part(self, piece: bytes) -> bool:
        """See proxy.types.Outlet."""
        answer, wire = self._answer, self._wire
        if answer is None or self._gone or wire.broken:
            return False
        wire.write(answer.part(piece))
        return not wire.late

    async def caught_up(self) -> None:
        """See proxy.types.Outlet."""
        if not self._gone:
            await self._wire.caught_up()
        if self._gone or self._wire.broken:
            self.client_left()
            await trio.lowlevel.checkpoint()  # where the application is cancelled
            raise ClientGone("the client has left")

    def has_input(self) -> bool:
        return self._wire.has_input()

    def has_output(self) -> bool:
        return self._wire.late

    async def _end_output(self) -> None:
        with trio.move_on_after(self._limits.linger):
            await self._wire.caught_up()
        self._socket.shutdown(socket.SHUT_WR)

    async def _close(self, *, reset: bool) -> None:
        if reset:
            with trio.move_on_after(self._limits.linger):
                await self._wire.caught_up()
                await delivered(self._socket, self._limits.linger)
        self._wire.leave()
        if reset:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._socket.close()


class StreamConnection(Connection):
    """A connection on a Trio stream (TLS, memory), which `run` closes.

    Its end shows only to who reads, so a second task reads ahead.
    """

    __slots__ = (
        "_arrived",
        "_ended",
        "_fileno",
        "_news",
        "_pumping",
        "_room",
        "_stream",
        "scheme",
    )

    def __init__(
        self,
        server: Server,
        stream: trio.abc.Stream,
        client: tuple[str, int] | None = None,
        address: tuple[str, int] | None = None,
        *,
        scheme: str = "http",
        fileno: int | None = None,
    ) -> None:
        super().__init__(server, client, address)
        self._stream = stream
        self._fileno = fileno
        self.scheme = scheme
        self._arrived = bytearray()
        self._ended = False
        self._pumping = False
        self._news = trio.Event()
        self._room = trio.Event()

    async def _serve(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._pumping = True
                nursery.start_soon(self._pump)
                await self._answer_all()
                nursery.cancel_scope.cancel()
        finally:
            self._pumping = False
        if self._handed_over is not None:
            self._handed_over += self._arrived

    async def _pump(self) -> None:
        while not self._ended:
            data = await self._receive_some()
            self._arrived += data
            self._ended = not data
            self._news.set()
            while len(self._arrived) >= self._limits.max_read_ahead:
                self._room = trio.Event()
                await self._room.wait()
        self.hang_up()

    async def _receive_some(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(READ_SIZE))
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
            return b""

    async def _read(self, size: int = READ_SIZE) -> bytes:
        while self._pumping and not self._arrived and not self._ended:
            self._news = trio.Event()
            await self._news.wait()
        if not self._arrived and not self._ended:
            return await self._receive_some()
        data = bytes(self._arrived)
        self._arrived.clear()
        self._room.set()
        return data

    def left_unseen(self) -> bool:
        full = len(self._arrived) >= self._limits.max_read_ahead
        return full and self._fileno is not None and _events(self._fileno, select.POLLRDHUP)

    def _write_now(self, data: bytes) -> bool:
        return False

    async def _write_rest(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as error:
            raise OSError(str(error)) from error

    def has_input(self) -> bool:
        if self._arrived:
            return True
        return self._fileno is not None and _events(self._fileno, select.POLLIN)

    async def _end_output(self) -> None:
        try:
            if isinstance(self._stream, trio.SSLStream):
                # What the client still sends is read and dropped as it is.
                with trio.move_on_after(self._limits.linger):
                    self._stream = await end_tls(self._stream)
            elif isinstance(self._stream, trio.abc.HalfCloseableStream):
                await self._stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise OSError(str(error)) from error

    async def _close(self, *, reset: bool) -> None:
        if reset:
            stream = self._stream
            if isinstance(stream, trio.SSLStream):
                stream = stream.transport_stream
            if isinstance(stream, trio.SocketStream):
                await delivered(stream.socket, self._limits.linger)
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            await trio.aclose_forcefully(self._stream)
        else:
            with trio.move_on_after(1):
                await self._stream.aclose()


def _events(fileno: int, mask: int) -> bool:
    poll = select.poll()
    poll.register(fileno, mask)
    return bool(poll.poll(0))
