"""An ASGI server for HTTP/1.1: strict, small, and cheap per request.

One connection is two tasks. The *reader* waits for bytes all the time, so that it sees the client
leave while the application waits for an engine; the *handler* runs the application, one request
after the other. Neither a task, nor a nursery, nor a cancel scope is made per request: when the
client leaves, the connection's scope is cancelled, and the application with it (ASGI extension
`vllm_router.cancel_on_disconnect`).

A client that closes its sending side has left: there is no telling it from one that is gone.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import dataclass

import trio

from vllm_router.http1.answer import Message
from vllm_router.http1.connection import READ_SIZE, App, Connection, Scope
from vllm_router.http1.headers import RefusalTold

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
    max_unread_body: int = 262144
    """Bytes of a body that wait for the application before reading pauses."""
    max_read_ahead: int = 65536
    """Bytes behind the current request (pipelining) before reading pauses."""
    linger: float = 2.0
    """Silence, when closing on a client that still sends, before it is cut off."""
    max_linger: float = 30.0
    """The most that such a client is listened to."""

    def tick(self) -> float:
        """How often deadlines are looked at."""
        shortest = min(self.header_timeout, self.keep_alive_timeout, self.body_read_timeout)
        return min(0.5, shortest / 4)


class Server:
    """What connections share: the application, the limits, and the one task that watches time.

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

        One task for all connections: a scope around every read would cost a request more than
        its parsing does.
        """
        tick = self.limits.tick()
        while True:
            if not self._connections:
                self._occupied = trio.Event()
                await self._occupied.wait()
            await trio.sleep(tick)
            now = trio.current_time()
            for connection in self._connections:
                if connection.deadline <= now:
                    connection.expire()
                elif connection.paused and connection.hung_up():
                    connection.client_left()


_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class SocketConnection(Connection):
    """A connection on a bare non-blocking socket, which `run` closes."""

    __slots__ = ("_socket",)

    def __init__(
        self,
        server: Server,
        sock: socket.socket,
        client: tuple[str, int] | None = None,
        address: tuple[str, int] | None = None,
    ) -> None:
        super().__init__(server, client, address)
        self._socket = sock

    async def _read(self) -> bytes:
        sock = self._socket
        while True:
            # Waiting first saves the system call that would fail.
            await trio.lowlevel.wait_readable(sock)
            try:
                return sock.recv(READ_SIZE)
            except BlockingIOError:
                continue
            except OSError:
                return b""

    def _write_now(self, data: bytes) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    async def _write_rest(self, data: memoryview) -> None:
        sock = self._socket
        while data:
            await trio.lowlevel.wait_writable(sock)
            try:
                data = data[sock.send(data) :]
            except BlockingIOError:
                continue

    def hung_up(self) -> bool:
        return _hung_up(self._socket.fileno())

    def has_input(self) -> bool:
        return _has_input(self._socket.fileno())

    async def _end_output(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    async def _close(self, *, reset: bool) -> None:
        if reset:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._socket.close()


class StreamConnection(Connection):
    """A connection on a Trio stream (TLS, memory), which `run` closes."""

    __slots__ = ("_fileno", "_stream", "scheme")

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

    async def _read(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(READ_SIZE))
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
            return b""

    def _write_now(self, data: bytes) -> int:
        return 0

    async def _write_rest(self, data: memoryview) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as error:
            raise OSError(str(error)) from error

    def hung_up(self) -> bool:
        return self._fileno is not None and _hung_up(self._fileno)

    def has_input(self) -> bool:
        return self._fileno is not None and _has_input(self._fileno)

    async def _end_output(self) -> None:
        # TLS ends both directions at once; what the client still sends is read and dropped.
        if isinstance(self._stream, trio.abc.HalfCloseableStream):
            try:
                await self._stream.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise OSError(str(error)) from error

    async def _close(self, *, reset: bool) -> None:
        if reset:
            await trio.aclose_forcefully(self._stream)
        else:
            with trio.move_on_after(1):
                await self._stream.aclose()


def _events(fileno: int, mask: int) -> bool:
    poll = select.poll()
    poll.register(fileno, mask)
    return bool(poll.poll(0))


def _hung_up(fileno: int) -> bool:
    return _events(fileno, select.POLLRDHUP)


def _has_input(fileno: int) -> bool:
    return _events(fileno, select.POLLIN)
