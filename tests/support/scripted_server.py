"""A vLLM server that follows a script exactly, on loopback or in memory.

    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(ok(b"{}"))

A script runs once per connection, which is closed when it returns. In memory (a socket pair) tests
run in virtual time: bytes written on one side are there at the other side at once.
"""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from vllm_router.errors import ConnectFailed
from vllm_router.http.client.connection import Connection
from vllm_router.http.client.plain_transport import PlainTransport
from vllm_router.http.client.pool import Pool

SSE = b"text/event-stream; charset=utf-8"
JSON = b"application/json"
DONE = b"data: [DONE]\n\n"


class ClientLeft(Exception):
    """The router closed the connection; ends a script silently."""


@dataclass
class Request:
    head: bytes
    body: bytes

    @property
    def line(self) -> bytes:
        return self.head.split(b"\r\n", 1)[0]

    @property
    def fields(self) -> list[tuple[bytes, bytes]]:
        lines = self.head.split(b"\r\n")[1:-2]
        return [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]

    def __getitem__(self, name: bytes) -> bytes | None:
        return dict(self.fields).get(name)


class Talk:
    """One connection, seen from the server."""

    def __init__(self, server: ScriptedServer, sock: trio.socket.SocketType) -> None:
        self.server = server
        self.number = len(server.talks)
        self.left_at = math.nan
        self._sock = sock
        self._buffer = b""

    async def request(self) -> Request:
        """The next whole request. Raises ClientLeft."""
        while b"\r\n\r\n" not in self._buffer:
            await self._more()
        head, _, rest = self._buffer.partition(b"\r\n\r\n")
        request = Request(head + b"\r\n\r\n", b"")
        self._buffer = rest
        length = int(request[b"content-length"] or 0)
        while len(self._buffer) < length:
            await self._more()
        request.body, self._buffer = self._buffer[:length], self._buffer[length:]
        self.server.requests.append(request)
        return request

    async def head(self) -> None:
        """The head of a request, and no more of its body than arrived with it."""
        while b"\r\n\r\n" not in self._buffer:
            await self._more()

    async def _more(self) -> None:
        data = await self._receive()
        if not data:
            raise ClientLeft
        self._buffer += data

    async def _receive(self) -> bytes:
        try:
            data = await self._sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.left_at = trio.current_time()
        return data

    async def send(self, *pieces: bytes) -> None:
        """Send each piece by itself. Raises ClientLeft."""
        for piece in pieces:
            data = memoryview(piece)
            try:
                while data:
                    data = data[await self._sock.send(data) :]
            except OSError:
                self.left_at = trio.current_time()
                raise ClientLeft from None
            await trio.lowlevel.checkpoint()

    async def gone(self) -> None:
        """Wait until the router has closed its side; ignores what it still sends."""
        while await self._receive():
            pass

    def reset(self) -> None:
        """Close with RST."""
        if self._sock.family != socket.AF_UNIX:
            linger = struct.pack("ii", 1, 0)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._sock.close()

    def close(self) -> None:
        self._sock.close()


Script = Callable[[Talk], Awaitable[None]]


class ScriptedServer:
    """Runs `script` for each connection; `requests` and `talks` record all of them."""

    def __init__(self, nursery: trio.Nursery, script: Script | None = None) -> None:
        self.script = script or answering(ok(b"{}"))
        self.requests: list[Request] = []
        self.talks: list[Talk] = []
        self.open = 0
        self.refuses = False
        self.swallows = False
        self.port = 0
        self._nursery = nursery

    def connect(self) -> socket.socket:
        """The client's end of a new connection in memory."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._nursery.start_soon(self._serve, trio.socket.from_stdlib_socket(theirs))
        return ours

    def connection(self) -> Connection:
        return Connection(PlainTransport(self.connect()))

    async def listen(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve on a free port of the loopback interface until cancelled."""
        with trio.socket.socket() as listener:
            await listener.bind(("127.0.0.1", 0))
            listener.listen(50)
            self.port = listener.getsockname()[1]
            task_status.started(self.port)
            while True:
                sock, _ = await listener.accept()
                self._nursery.start_soon(self._serve, sock)

    async def _serve(self, sock: trio.socket.SocketType) -> None:
        talk = Talk(self, sock)
        self.talks.append(talk)
        self.open += 1
        try:
            await self.script(talk)
        except ClientLeft:
            pass
        finally:
            self.open -= 1
            sock.close()


class MemoryPool(Pool):
    """A pool whose connections lead to a scripted server in memory."""

    def __init__(self, server: ScriptedServer) -> None:
        super().__init__("http://server.test:1")
        self.server = server

    @property
    def has_address(self) -> bool:
        return True

    async def open(self) -> Connection:
        await trio.lowlevel.checkpoint()
        if self.server.swallows:
            await trio.sleep_forever()
        if self.server.refuses:
            raise ConnectFailed("[Errno 111] Connection refused")
        self.opened += 1
        return self.server.connection()


# -- what servers say --------------------------------------------------------------------------


def answer(status: int, body: bytes, *fields: bytes, content_type: bytes = JSON) -> bytes:
    """A whole answer with its length."""
    lines = [b"HTTP/1.1 %d X" % status, b"content-type: " + content_type, *fields]
    return b"\r\n".join(lines) + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def ok(body: bytes, *fields: bytes) -> bytes:
    return answer(200, body, *fields)


GOOD = ok(b'{"answer":1}')
"""A short JSON response that counts as an answer."""


def sse_head(*fields: bytes) -> bytes:
    lines = [b"HTTP/1.1 200 OK", b"content-type: " + SSE, b"transfer-encoding: chunked", *fields]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


END = b"0\r\n\r\n"


def event(text: str, finish: str | None = None) -> bytes:
    """A chat chunk as vLLM writes it."""
    reason = f'"{finish}"' if finish else "null"
    return (
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[{"index":0,"delta":'
        b'{"content":"%b"},"finish_reason":%b}]}\n\n' % (text.encode(), reason.encode())
    )


def answering(*pieces: bytes) -> Script:
    """A script that answers every request with these pieces."""

    async def script(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.send(*pieces)

    return script


def streaming(*events: bytes) -> Script:
    """A script that answers every request with a stream of these events."""
    return answering(sse_head(), *[chunk(piece) for piece in events], END)


def once(*pieces: bytes) -> Script:
    """A script that answers one request with these pieces and closes the connection."""

    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(*pieces)

    return script


async def silent(talk: Talk) -> None:
    """Accepts requests and never answers."""
    await talk.gone()
