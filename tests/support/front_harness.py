"""A front on a loopback port with a test application, and clients that send raw bytes."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import h11
import trio

from vllm_router.http.asgi_types import Message, Receive, Scope, Send
from vllm_router.http.server.limits import Limits
from vllm_router.http.server.listener import Listener
from vllm_router.routing.paths import is_inference

# Seconds; a hang guard: everything that a test waits for takes milliseconds.
PATIENCE = 60

CHAT = "/v1/chat/completions"

HOST = f"127.{1 + (os.getpid() >> 16)}.{os.getpid() >> 8 & 255}.{1 + os.getpid() % 254}"
"""A loopback address of this process. The kernel reuses the ports of 127.0.0.1, and a router of
another test may still probe a server that had the same port there: one connection too many."""


class Application:
    """The test application; the last part of the path selects its behaviour.

    It counts its calls.
    """

    def __init__(self) -> None:
        self.started = 0
        self.active = 0
        self.completed = 0
        self.requests: list[tuple[str, bytes, bytes]] = []
        """Method, raw path and body of every request that was read to its end."""
        self.release = trio.Event()
        self.received = 0
        self.parts = 0
        """Pieces of a flood that it has begun to send."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._echo(receive, send)
            return
        self.started += 1
        self.active += 1
        try:
            # Hypercorn does not cancel, so the application watches for the disconnect.
            if "vllm_router.cancel_on_disconnect" in scope["extensions"]:
                await self._http(scope, receive, send)
            else:
                await self._watched(scope, receive, send)
            self.completed += 1
        finally:
            self.active -= 1

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> None:
        to_app, messages = trio.open_memory_channel(2)
        last = None
        left = trio.Event()

        async def hold_last(message: Message) -> None:
            nonlocal last
            if message["type"] == "http.response.body" and not message.get("more_body"):
                last = message
            else:
                await send(message)

        async def watch() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                await to_app.send(message)
            left.set()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await self._http(scope, messages.receive, hold_last)
            nursery.cancel_scope.cancel()
        if left.is_set():
            raise ConnectionError("the client has left")
        if last is not None:
            await send(last)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["path"].rsplit("/", 1)[-1]
        if kind == "early":
            await answer(send, 413, b'{"too": "large"}')
            return
        if kind == "hang":
            await self.release.wait()
        if kind == "unread":
            await self.release.wait()
        body = b""
        more = True
        while more:
            message = await receive()
            body += message["body"]
            self.received = len(body)
            more = message["more_body"]
        self.requests.append((scope["method"], scope["raw_path"], body))
        if kind == "stream":
            await start(send, 200, (b"content-type", b"text/event-stream"))
            for number in range(5):
                await part(send, b"data: %d\n\n" % number)
            await self.release.wait()
            await send({"type": "http.response.body", "body": b""})
        elif kind == "flood":
            await start(send, 200)
            while True:
                self.parts += 1
                await part(send, bytes(65536))
        elif kind == "truncated":
            await start(send, 200)
            await part(send, b"half of ")
        elif kind == "short":
            await start(send, 200, (b"content-length", b"100"))
            await part(send, b"half of ")
        elif kind == "broken":
            raise ValueError("a bug in the application")
        elif kind == "nothing":
            pass
        elif kind == "empty":
            await answer(send, 204, b"")
        elif kind == "unchanged":
            await start(send, 304, (b"etag", b'"a"'), (b"content-length", b"5"))
            await send({"type": "http.response.body", "body": b""})
        elif kind == "injected":
            await start(send, 200, (b"x-a", b"b\r\nx-c: d"))
            await send({"type": "http.response.body", "body": b""})
        else:
            seen = {"path": scope["path"], "query": scope["query_string"].decode()}
            seen |= {"version": scope["http_version"], "scheme": scope["scheme"]}
            seen |= {"method": scope["method"], "body": body.decode("latin-1")}
            await answer(send, 200, json.dumps(seen).encode())

    async def _echo(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})


async def start(send: Send, status: int, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})


async def part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def answer(send: Send, status: int, body: bytes) -> None:
    length = [(b"content-length", b"%d" % len(body))] if status != 204 else []
    await start(send, status, (b"content-type", b"application/json"), *length)
    await send({"type": "http.response.body", "body": body})


@dataclass
class Running:
    front: Listener
    app: Application
    port: int


@asynccontextmanager
async def running(kind: str = "lane", **options: Any) -> AsyncIterator[Running]:
    """A front of one kind, `lane` or `hypercorn`; stopped at the end, when nothing may be left."""
    app = options.pop("app", None) or Application()
    options.setdefault("limits", QUICK)
    front = Listener(app, lane=kind == "lane", **{"accepts": is_inference, **options})
    (_, port), *_ = front.open(HOST, 0)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(front.serve)
            yield Running(front, app, port)
            front.abort()
        assert front.connections == 0


# Short enough for a test to wait, long enough not to expire by accident.
QUICK = Limits(linger=0.3, max_linger=2.0)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    reason: str = ""
    complete: bool = True
    fields: list[tuple[str, str]] = field(default_factory=list)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json()["error"]["code"]


class Client:
    """One connection; h11 parses the responses."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._h11 = h11.Connection(h11.CLIENT)
        self._data = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def reply(self, method: str = "POST") -> Reply:
        """The next response; raises h11.RemoteProtocolError if it is invalid."""
        connection = h11.Connection(h11.CLIENT)
        connection.send(h11.Request(method=method, target="/", headers=[("host", "a")]))
        connection.send(h11.EndOfMessage())
        reply = None
        connection.receive_data(self._data) if self._data else None
        while True:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError:
                if reply is None:
                    raise
                reply.complete = False
                return reply
            if event is h11.NEED_DATA:
                try:
                    connection.receive_data(bytes(await self.stream.receive_some(65536)))
                except trio.BrokenResourceError:
                    if reply is None:
                        raise
                    reply.complete = False
                    return reply
            elif isinstance(event, h11.Response):
                fields = [(name.decode(), value.decode()) for name, value in event.headers]
                reason = bytes(event.reason).decode()
                reply = Reply(event.status_code, dict(fields), b"", reason, fields=fields)
            elif isinstance(event, h11.Data):
                assert reply is not None
                reply.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert reply is not None
                self._data = connection.trailing_data[0]
                return reply

    async def rest(self) -> bytes:
        """The bytes until the server closes. Raises BrokenResourceError for a reset."""
        data = self._data
        while more := await self.stream.receive_some(65536):
            data += more
        return bytes(data)

    async def closed(self) -> bool:
        """Whether the server closes or resets without another byte."""
        try:
            return await self.rest() == b""
        except trio.BrokenResourceError:
            return True


@asynccontextmanager
async def connected(port: int, *, buffer: int | None = None) -> AsyncIterator[Client]:
    """A client; with `buffer`, its receive buffer is limited to about that many bytes."""
    sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    await sock.connect((HOST, port))
    async with trio.SocketStream(sock) as stream:
        yield Client(stream)


def post(path: str = CHAT, body: bytes = b"{}", *extra: bytes, version: str = "1.1") -> bytes:
    lines = [b"POST %b HTTP/%b" % (path.encode(), version.encode()), b"Host: a"]
    lines += [b"Content-Length: %d" % len(body), *extra]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def get(path: str, *extra: bytes) -> bytes:
    return b"\r\n".join([b"GET %b HTTP/1.1" % path.encode(), b"Host: a", *extra]) + b"\r\n\r\n"


def chunked(path: str, *chunks: bytes) -> bytes:
    head = b"POST %b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" % path.encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"


async def soon(condition: Callable[[], object]) -> None:
    """Wait until `condition()` holds; the test's time limit bounds it."""
    while not condition():
        await trio.sleep(0.005)


def reset_on_close(client: Client) -> None:
    """Make closing this client send a reset."""
    linger = (1).to_bytes(4, "little") + bytes(4)
    assert isinstance(client.stream, trio.SocketStream)
    client.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def silence(name: str) -> None:
    logging.getLogger(name).disabled = True
