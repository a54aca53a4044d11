"""nginx, HAProxy and Caddy in front of the router: real processes, plain and as in `deploy/`.

The engine is scripted: it sends the next piece of a stream only when the client has received the
previous one.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import h11
import pytest
import trio
import trio_websocket

from support.proxies_in_front import PLAIN, RECOMMENDED, proxy
from support.router_process import RouterProcess, chat, router_process, servers_toml

PATIENCE_S = 60.0
"""For anything that must happen."""

SCALE = 25
"""The proxies' times of half a minute and more are so many times shorter here."""

SILENCE_S = 4.0
"""As long as 100 s in a proxy whose times are scaled."""

MODELS = b'{"object":"list","data":[{"id":"m","object":"model","max_model_len":4096}]}'
EVENT = 'data: {{"id":"c","choices":[{{"index":0,"delta":{{"content":"{text}"}}}}]}}\n\n'
FINISH = b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = FINISH + b"data: [DONE]\n\n"
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
)


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str) -> bytes:
    return EVENT.format(text=text).encode()


class Generation:
    """One inference request; the test writes its response."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.left = trio.Event()

    async def wait_for_end(self) -> None:
        """Wait until the router cancels it."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await self._stream.receive_some():
                pass
        self.left.set()

    async def begin(self, text: str) -> None:
        await self._stream.send_all(HEAD + chunked(event(text)))

    async def send(self, *pieces: bytes) -> None:
        await self._stream.send_all(b"".join(map(chunked, pieces)))

    async def end(self) -> None:
        await self._stream.send_all(b"0\r\n\r\n")
        await self._stream.aclose()

    async def die(self) -> None:
        """In the middle of its response."""
        await self._stream.aclose()


class Engine:
    """A server controlled by the test."""

    def __init__(self) -> None:
        self.url = ""
        self._report, self._reports = trio.open_memory_channel[Generation](10)

    async def generation(self) -> Generation:
        """The next inference request."""
        return await self._reports.receive()

    async def handle(self, stream: trio.SocketStream) -> None:
        async with stream:
            received = b""
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while True:
                    while b"\r\n\r\n" not in received:
                        data = await stream.receive_some()
                        if not data:
                            return
                        received += data
                    head, _, received = received.partition(b"\r\n\r\n")
                    if head.startswith(b"POST "):
                        break
                    path = head.split(b" ")[1]
                    body = MODELS if path == b"/v1/models" else b""
                    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b"
                    await stream.send_all(answer % (len(body), body))
                found = re.search(rb"content-length: (\d+)", head)
                assert found
                while len(received) < int(found[1]):
                    received += await stream.receive_some()
            generation = Generation(stream)
            await self._report.send(generation)
            await generation.wait_for_end()


@contextlib.asynccontextmanager
async def engine() -> AsyncIterator[Engine]:
    served = Engine()
    async with trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(trio.serve_tcp, served.handle, 0)
        served.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        yield served
        nursery.cancel_scope.cancel(reason="test over")


def scaled(text: str) -> str:
    """The configuration with its long times scaled down."""

    def shorter(found: re.Match[str]) -> str:
        seconds = int(found[1])
        return f"{math.ceil(seconds * 1000 / SCALE)}ms" if seconds >= 30 else found[0]

    return re.sub(r"\b(\d+)s\b", shorter, text)


PROXIES = [f"{name} {kind}" for name in PLAIN for kind in ("plain", "recommended")]


def configuration(which: str) -> tuple[str, str]:
    """The proxy's name and configuration."""
    name, _, kind = which.partition(" ")
    return name, PLAIN[name] if kind == "plain" else RECOMMENDED[name].read_text()


class Broken(Exception):
    """The response ended before its announced end."""


class Answer:
    """A streamed chat as a client sees it, byte by byte."""

    def __init__(self, stream: trio.SocketStream, port: int) -> None:
        self._stream = stream
        self._port = port
        self._http = h11.Connection(h11.CLIENT)

    async def ask(self, *, streamed: bool = True) -> None:
        """Send the request."""
        body = json.dumps(chat(stream=streamed)).encode()
        fields = [
            ("host", f"127.0.0.1:{self._port}"),
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
        ]
        request = h11.Request(method="POST", target="/v1/chat/completions", headers=fields)
        sent = self._http.send(request), self._http.send(h11.Data(body))
        self._http.send(h11.EndOfMessage())
        await self._stream.send_all(b"".join(part or b"" for part in sent))

    async def head(self) -> h11.Response:
        event = await self._event()
        assert isinstance(event, h11.Response)
        return event

    async def piece(self) -> bytes:
        """The next bytes; empty at the end. Raises Broken."""
        event = await self._event()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def until(self, text: bytes) -> bytes:
        """Read until `text` has come; returns the bytes read."""
        received = b""
        while text not in received:
            piece = await self.piece()
            assert piece, received
            received += piece
        return received

    async def _event(self) -> Any:
        while True:
            try:
                event = self._http.next_event()
                if event is not h11.NEED_DATA:
                    return event
                self._http.receive_data(await self._stream.receive_some())
            except (h11.RemoteProtocolError, trio.BrokenResourceError) as error:
                raise Broken(str(error)) from None


class Setup:
    """An engine, a router, and a proxy in front; `url` is the proxy's."""

    def __init__(self, server: Engine, router: RouterProcess, url: str) -> None:
        self.engine, self.router, self.url = server, router, url

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Answer]:
        """Leaving the block closes the connection."""
        port = int(self.url.rpartition(":")[2])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            yield Answer(stream, port)

    @contextlib.asynccontextmanager
    async def stream(self) -> AsyncIterator[tuple[Answer, Generation]]:
        """A streamed chat whose first piece has arrived."""
        async with self.client() as answer:
            await answer.ask()
            generation = await self.engine.generation()
            await generation.begin("first")
            head = await answer.head()
            assert head.status_code == 200
            assert dict(head.headers)[b"content-type"].startswith(b"text/event-stream")
            await answer.until(b"first")
            yield answer, generation


@contextlib.asynccontextmanager
async def setup(
    which: str, directory: Path, *arguments: str, shorter: bool = False
) -> AsyncIterator[Setup]:
    name, text = configuration(which)
    text = scaled(text) if shorter else text
    with trio.fail_after(3 * PATIENCE_S):
        async with engine() as server:
            # The engine runs on this loop, so blocking waits for the router run in a thread.
            config = servers_toml([server.url], failure_threshold=1000)
            around = router_process(config, directory, *arguments)
            router = await trio.to_thread.run_sync(around.__enter__)
            try:
                front = proxy(name, text, router.port, directory)
                url = await trio.to_thread.run_sync(front.__enter__)
                try:
                    yield Setup(server, router, url)
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(front.__exit__, None, None, None)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(around.__exit__, None, None, None)


async def until_over(answer: Answer) -> bytes:
    """All bytes until the end, announced or not."""
    received = b""
    with contextlib.suppress(Broken):
        while piece := await answer.piece():
            received += piece
    return received


async def until_broken(answer: Answer) -> bytes:
    """All bytes before the break; fails if there is no break."""
    received = b""
    with pytest.raises(Broken):
        while piece := await answer.piece():
            received += piece
    return received


async def check_pieces_arrive_one_by_one(here: Setup) -> None:
    async with here.stream() as (answer, generation):
        for number in range(4):
            await generation.send(event(f"piece {number}"))
            await answer.until(f"piece {number}".encode())
        await generation.send(DONE)
        await generation.end()
        rest = b""
        while piece := await answer.piece():
            rest += piece
        assert rest.endswith(DONE)


async def check_break_is_reported_without_loss(here: Setup, *, whole: bool = False) -> None:
    """The last pieces and the break come at once.

    With `whole`, the proxy ends a truncated response as whole (Caddy before 2.7); then only the
    router's error event shows the truncation.
    """
    async with here.stream() as (answer, generation):
        await generation.send(*[event(f"piece {number}") for number in range(50)])
        await generation.die()
        received = await (until_over(answer) if whole else until_broken(answer))
    for number in range(50):
        assert f'"piece {number}"'.encode() in received
    assert b'data: {"error":' in received
    assert b"[DONE]" not in received


async def check_leaving_frees_the_engine(here: Setup) -> None:
    async with here.stream() as (_, generation):
        pass
    # Some proxies notice a disconnect only when they write.
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while not generation.left.is_set():
            await generation.send(event("more"))
            await trio.sleep(0.05)
    await generation.left.wait()


async def check_leaving_before_the_first_token_frees_the_engine(here: Setup) -> None:
    async with here.client() as answer:
        await answer.ask(streamed=False)
        generation = await here.engine.generation()
    await generation.left.wait()


async def check_silence_lives(here: Setup) -> None:
    async with here.stream() as (answer, generation):
        await trio.sleep(SILENCE_S)
        await generation.send(event("after the silence"))
        await answer.until(b"after the silence")


async def check_silence_is_ended(here: Setup) -> None:
    async with here.stream() as (answer, _):
        await until_broken(answer)


async def check_comments_keep_a_silence_alive(here: Setup) -> None:
    """The comments of `vllm serve --sse-keep-alive-interval`."""
    async with here.stream() as (answer, generation):
        for _ in range(8):
            await trio.sleep(SILENCE_S / 8)
            await generation.send(b": keep-alive\n\n")
        await generation.send(event("after the silence"))
        assert b": keep-alive" in await answer.until(b"after the silence")


async def check_feed_passes(here: Setup) -> None:
    address = here.url.replace("http:", "ws:") + "/ws/load"
    async with trio_websocket.open_websocket_url(address) as websocket:
        assert '"type":"hello"' in await websocket.get_message()


@pytest.mark.parametrize("which", PROXIES)
async def test_proxy_in_front_passes_streams_breaks_and_disconnects(which: str, tmp_path: Path):
    """A long silence is 100 s.

    HAProxy's usual limit of 50 s shows that the scaled times are in use.
    """
    async with setup(which, tmp_path, shorter=True) as here:
        await check_pieces_arrive_one_by_one(here)
        await check_break_is_reported_without_loss(here, whole=which.startswith("caddy"))
        await check_leaving_frees_the_engine(here)
        if which == "haproxy plain":
            await check_silence_is_ended(here)
            await check_comments_keep_a_silence_alive(here)
        else:
            await check_silence_lives(here)
            # HAProxy needs an option for it, which docs/behind-a-proxy.md names.
            await check_leaving_before_the_first_token_frees_the_engine(here)
        if which != "nginx plain":  # it passes no upgrade on
            await check_feed_passes(here)


@pytest.mark.parametrize("arguments", [("--front", "hypercorn"), ("--workers", "2")], ids=str)
async def test_nginx_plain_configuration_streams_in_both_modes(
    arguments: tuple[str, ...], tmp_path: Path
):
    async with setup("nginx plain", tmp_path, *arguments) as here:
        await check_pieces_arrive_one_by_one(here)
        await check_break_is_reported_without_loss(here)


def test_proxy_recommended_times_exceed_router_times():
    """The router decides when a response has taken too long: 600 s and 300 s."""
    for name, path in RECOMMENDED.items():
        text = "\n".join(
            line for line in path.read_text().splitlines() if not line.strip().startswith("#")
        )
        times = [int(one) for one in re.findall(r"\b(\d+)s\b", text)]
        assert times, name
        waits = re.findall(r"(?:read_timeout|send_timeout|client|server|tunnel)\s+(\d+)s", text)
        assert all(int(one) > 600 for one in waits)
