"""HTTP/1.1 connections of the simulated server, parsed by llhttp.

One task per connection reads. Everything else is synchronous: a complete request is passed to the
handler, which answers with `write` and `finish`, at once or from the engine's task. Writing is one
non-blocking system call; a flushing task sends what the kernel does not accept.
"""

from __future__ import annotations

import math
import os
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol
from urllib.parse import unquote

import httptools
import trio

_RECEIVE_BYTES = 65536
_BAD_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"connection: close\r\n\r\nInvalid HTTP request received."
)
# os.write works for sockets where both are integer descriptors.
_DIRECT = os.name == "posix"
_NO_HEADERS: dict[bytes, bytes] = {}


class Incoming:
    """One received request; header names are in lower case."""

    __slots__ = (
        "arrived",
        "body",
        "connection_id",
        "headers",
        "http10",
        "keep_alive",
        "method",
        "mock",
        "number",
        "target",
    )

    def __init__(
        self, method: str, target: bytes, headers: list[tuple[bytes, bytes]], number: int
    ) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.body = b""
        self.number = number  # 1 for the first request on its connection
        self.connection_id = 0
        self.arrived = 0.0
        self.keep_alive = True
        self.http10 = False
        self.mock = _NO_HEADERS  # the X-Mock-* headers, without that prefix

    @property
    def path(self) -> str:
        path = self.target.partition(b"?")[0].decode("latin-1")
        return unquote(path) if "%" in path else path

    @property
    def query(self) -> str:
        return self.target.partition(b"?")[2].decode("latin-1")

    def header(self, name: bytes) -> str | None:
        """The first header with this lower-case name."""
        for key, value in self.headers:
            if key == name:
                return value.decode("latin-1")
        return None


class Answerer(Protocol):
    """The exchange in progress on a connection; notified once if the client disconnects early."""

    def lost(self) -> None: ...


class Connection:
    """`run` is its task; all other methods are synchronous, and have no effect once closed."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        number: int,
        handler: Callable[[Connection, Incoming], None],
        start_soon: Callable[[Callable[[], Awaitable[None]]], None],
        keep_alive: float,
    ) -> None:
        self.number = number
        self.answerer: Answerer | None = None
        self.closed = False
        self.busy = False
        self._stream = stream
        self._socket = stream.socket if isinstance(stream, trio.SocketStream) else None
        self._handler = handler
        self._start_soon = start_soon
        self._keep_alive = keep_alive
        self._parser = httptools.HttpRequestParser(self)
        self._idle = trio.CancelScope()
        self._ready: deque[Incoming] = deque()
        self._served = 0
        self._pending = b""
        self._flushing = False
        self._draining = False
        self._end = ""
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._mock = _NO_HEADERS
        self._body: list[bytes] = []

    @property
    def idle(self) -> bool:
        return not self.busy and not self.closed

    async def run(self) -> None:
        """Read until the client disconnects, a limit is reached or the server closes."""
        try:
            with self._idle:
                while not self.closed:
                    data = await self._stream.receive_some(_RECEIVE_BYTES)
                    if not data:
                        break
                    self._stay()
                    if not self._end:
                        self._feed(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # reset by the client, or closed by this server
        finally:
            self._lost()
            with trio.CancelScope(shield=True, deadline=trio.current_time()):
                await trio.aclose_forcefully(self._stream)

    def write(self, data: bytes) -> None:
        """Send what the kernel accepts now, and the rest from a separate task."""
        if self.closed or self._end:
            return
        if self._socket is not None and _DIRECT and not self._pending and not self._flushing:
            try:
                sent = os.write(self._socket.fileno(), data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.close("fin")
                return
            if sent == len(data):
                return
            data = data[sent:]
        self._pending += data
        if not self._flushing:
            self._flushing = True
            self._start_soon(self._flush)

    def finish(self, *, keep_alive: bool) -> None:
        """The response is complete: take the next request, or close when everything is sent."""
        self.answerer = None
        self.busy = False
        if self.closed:
            return
        if not keep_alive:
            self.close("fin")
            return
        self._rest()
        self._drain()

    def close(self, how: str) -> None:
        """`fin` or `rst`, after the pending data. In memory, both are an end of stream."""
        if self.closed or self._end:
            return
        if self._flushing:
            self._end = how
            return
        self.closed = True
        self._pending = b""
        if self._socket is None:
            self._start_soon(self._abandon)
            return
        try:
            if how == "rst":
                self._socket.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
            else:
                # close() alone resets a connection with unread input.
                self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the client has closed it already
        self._socket.close()

    def _rest(self) -> None:
        """Start the idle timeout, unless a response is still in progress."""
        if self._served and not self.busy and not self._flushing:
            self._idle.deadline = trio.current_time() + self._keep_alive

    def _stay(self) -> None:
        """Stop the idle timeout: like uvicorn, wait without limit for the rest of a request."""
        if self._idle.deadline != math.inf:
            self._idle.deadline = math.inf

    async def _abandon(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def _flush(self) -> None:
        try:
            while self._pending and not self.closed:
                data, self._pending = self._pending, b""
                await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._flushing, self._end = False, ""
            self.close("fin")
            return
        self._flushing = False
        self._rest()
        if self._end:
            how, self._end = self._end, ""
            self.close(how)

    def _lost(self) -> None:
        self.closed = True
        self._ready.clear()
        if self.answerer is not None:
            answerer, self.answerer = self.answerer, None
            answerer.lost()

    def _feed(self, data: bytes | bytearray) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # vLLM supports no upgrade and ignores the header
        except httptools.HttpParserError:
            self.write(_BAD_REQUEST)
            self.close("fin")
            return
        self._drain()

    def _drain(self) -> None:
        """Handle the received requests in order; they must not nest."""
        if self._draining:
            return
        self._draining = True
        try:
            while self._ready and not self.busy and not self.closed:
                self.busy = True
                self._stay()
                self._served += 1
                request = self._ready.popleft()
                request.number = self._served
                self._handler(self, request)
        finally:
            self._draining = False

    # httptools' callbacks

    def on_message_begin(self) -> None:
        self._target = b""
        self._headers = []
        self._mock = _NO_HEADERS
        self._body = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._headers.append((name, value))
        if name.startswith(b"x-mock-"):
            if self._mock is _NO_HEADERS:
                self._mock = {}
            self._mock[name[7:]] = value

    def on_headers_complete(self) -> None:
        if any(
            name == b"expect" and value.lower() == b"100-continue" for name, value in self._headers
        ):
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        parser = self._parser
        request = Incoming(parser.get_method().decode(), self._target, self._headers, 0)
        request.connection_id = self.number
        request.arrived = trio.current_time()
        request.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        request.keep_alive = parser.should_keep_alive()
        request.http10 = parser.get_http_version() == "1.0"
        request.mock = self._mock
        self._ready.append(request)
