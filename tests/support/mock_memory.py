"""Simulated servers in memory, and a client that keeps every byte: for tests in virtual time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio
import trio.testing

from vllm_router.lab.mock import MockOptions, MockServer
from vllm_router.lab.mock.state import ServerState


class MemoryListener(trio.abc.Listener[trio.abc.Stream]):
    """Accepts the connections of `connect`."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[trio.abc.Stream](1000)

    async def connect(self, pair: Any = trio.testing.memory_stream_pair) -> trio.abc.Stream:
        ours, theirs = pair()
        await self._send.send(theirs)
        return ours

    async def accept(self) -> trio.abc.Stream:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise trio.ClosedResourceError from None

    async def aclose(self) -> None:
        self._send.close()
        self._receive.close()
        await trio.lowlevel.checkpoint()


class Answer:
    """A response head and, once read, its body; `chunks` with their framing."""

    def __init__(self, head: bytes) -> None:
        line, *fields = head.decode("latin-1").split("\r\n")
        self.head = head
        self.status = int(line.split()[1])
        parts = (field.partition(": ") for field in fields)
        self.headers = [(name, value) for name, _, value in parts]
        self.body = b""
        self.chunks: list[bytes] = []

    def __getitem__(self, name: str) -> str | None:
        return dict(self.headers).get(name)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of the SSE events; `[DONE]` and comments stay strings."""
        events = []
        for event in self.body.decode().split("\n\n"):
            for line in event.split("\n"):
                if line.startswith("data: {"):
                    events.append(json.loads(line[6:]))
                elif line.startswith("data: "):
                    events.append(line[6:])
                elif line.startswith(":"):
                    events.append(line)
        return events

    @property
    def text(self) -> str:
        """The generated text of a chat or completion stream."""
        return "".join(
            choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            for event in self.events
            if isinstance(event, dict)
            for choice in event.get("choices", ())
        )


class Client:
    """One connection. Reads raise EOFError if it ends before the answer does."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._buffer = b""

    async def send(
        self,
        method: str,
        path: str,
        body: Any = b"",
        *headers: str,
        kind: str = "application/json",
        host: str = "mock",
    ) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", f"host: {host}", *headers]
        if body:
            lines += [f"content-type: {kind}", f"content-length: {len(body)}"]
        await self.stream.send_all("\r\n".join([*lines, "", ""]).encode() + body)

    async def head(self) -> Answer:
        while b"\r\n\r\n" not in self._buffer:
            await self._more()
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        return Answer(head)

    async def rest(self, answer: Answer) -> Answer:
        if answer["transfer-encoding"] == "chunked":
            while await self.chunk(answer):
                pass
        else:
            size = int(answer["content-length"] or 0)
            while len(self._buffer) < size:
                await self._more()
            answer.body, self._buffer = self._buffer[:size], self._buffer[size:]
        return answer

    async def chunk(self, answer: Answer) -> bytes:
        """The next chunk; empty at the end of the body."""
        while b"\r\n" not in self._buffer:
            await self._more()
        line, rest = self._buffer.split(b"\r\n", 1)
        size = int(line, 16)
        while len(rest) < size + 2:
            await self._more()
            line, rest = self._buffer.split(b"\r\n", 1)
        assert rest[size : size + 2] == b"\r\n"
        self._buffer = rest[size + 2 :]
        if size:
            answer.chunks.append(rest[:size])
        answer.body += rest[:size]
        return rest[:size]

    async def ask(
        self, method: str, path: str, body: Any = b"", *headers: str, **how: Any
    ) -> Answer:
        await self.send(method, path, body, *headers, **how)
        return await self.rest(await self.head())

    async def everything(self) -> bytes:
        """All bytes until the server closes."""
        try:
            while True:
                await self._more()
        except EOFError:
            return self._buffer

    async def aclose(self) -> None:
        await self.stream.aclose()

    async def _more(self) -> None:
        data = await self.stream.receive_some(65536)
        if not data:
            raise EOFError
        self._buffer += data


class Mock:
    """A running simulated server; `client()` opens a connection to it."""

    def __init__(self, server: ServerState, listener: MemoryListener) -> None:
        self.server = server
        self.listener = listener
        self.ended = trio.Event()

    async def client(self, pair: Any = trio.testing.memory_stream_pair) -> Client:
        return Client(await self.listener.connect(pair))

    async def ask(
        self, method: str, path: str, body: Any = b"", *headers: str, **how: Any
    ) -> Answer:
        """One request on a connection of its own."""
        client = await self.client()
        try:
            return await client.ask(method, path, body, *headers, **how)
        finally:
            await client.aclose()

    async def set(self, **switches: Any) -> None:
        answer = await self.ask("POST", "/mock/set", switches)
        assert answer.status == 200, answer.body

    async def stats(self) -> dict[str, Any]:
        return (await self.ask("GET", "/mock/stats")).json

    async def metrics(self) -> dict[str, float]:
        text = (await self.ask("GET", "/metrics")).body.decode()
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    async def gauge(self, name: str, engine: int = 0) -> float:
        model = self.server.options.models[0]
        return (await self.metrics())[f'vllm:{name}{{engine="{engine}",model_name="{model}"}}']


@asynccontextmanager
async def running_mock(**options: Any) -> AsyncIterator[Mock]:
    """Defaults without any delay, so that a test names the times that it uses."""
    plain: dict[str, Any] = {
        "name": "m1",
        "models": ("tiny",),
        "ttft": 0.0,
        "prefill_tokens_per_second": 0.0,
        "token_delay": 0.0,
        "batch_slowdown": 0.0,
    }
    server = MockServer(MockOptions(**(plain | options)))
    mock = Mock(server.state, MemoryListener())

    async def serve(**how: Any) -> None:
        await server.serve(listeners=[mock.listener], **how)
        mock.ended.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve))
        yield mock
        nursery.cancel_scope.cancel()
    assert server.state.counts.bugs == 0
