"""Memory cost of large bodies, many connections and many requests (L2, L6, L10)."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import time
from collections import Counter
from pathlib import Path

import trio

from chaos.guarded import Engine
from chaos.harness import Card, fleet, off_loop, rss_mb, scenario, waited
from chaos.stalled import stalled_reader
from support.router_process import RouterProcess, chat, router_process, servers_toml

PATH = "/v1/chat/completions"
QUICK = ("--model", "m", "--ttft", "0", "--token-delay", "0", "--max-num-seqs", "4000")
MB = 1_000_000


def peak_mb(router: RouterProcess) -> float:
    """The peak resident memory since `forget_peak`."""
    for line in Path(f"/proc/{router.process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / MB
    raise AssertionError("no VmHWM")


def forget_peak(router: RouterProcess) -> None:
    Path(f"/proc/{router.process.pid}/clear_refs").write_text("5")


def image(size: int) -> bytes:
    """A chat request of about `size` bytes, nearly all of them an image."""
    url = "data:image/png;base64," + "A" * size
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return json.dumps(
        {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}
    ).encode()


async def upload(
    port: int, body: bytes, *, chunked: bool = False, seconds: float = 60
) -> tuple[str, bytes]:
    """The status and the head of the response; "" after a timeout."""
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{framing}\r\n"
    received = b""
    with trio.move_on_after(seconds):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:

            async def send() -> None:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await stream.send_all(f"{head}Content-Type: application/json\r\n\r\n".encode())
                    view = memoryview(body)
                    for start in range(0, len(body), MB):
                        piece = bytes(view[start : start + MB])
                        if chunked:
                            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
                        await stream.send_all(piece)
                    if chunked:
                        await stream.send_all(b"0\r\n\r\n")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                with contextlib.suppress(trio.BrokenResourceError):
                    while piece := await stream.receive_some(65536):
                        received += piece
                nursery.cancel_scope.cancel()
    return received[9:12].decode(), received.partition(b"\r\n\r\n")[0].lower()


@scenario("L2", "large bodies: 64 MB, 20 of 40 MB, and a server that reads nothing", p0=True)
async def large_bodies(card: Card) -> None:
    size, count, budget = (10, 12, 80) if card.quick else (40, 20, 512)
    most = 110 if card.quick else 700
    engines = [Engine() for _ in range(3)]
    config = servers_toml((engine.url for engine in engines), max_bodies_mb=budget)
    with router_process(config, card.directory) as router:
        base = rss_mb(router)
        one = image(60 * MB)
        forget_peak(router)
        card.equal("one of 60 MB", (await upload(router.port, one))[0], "200")
        card.most("RSS of it", peak_mb(router) - base, 1.5 * 60, " MB")
        for chunked in (False, True):
            got, _ = await upload(router.port, image(65 * MB), chunked=chunked)
            card.equal(f"65 MB, {'chunked' if chunked else 'Content-Length'}", got, "413")
        body = image(size * MB)
        codes: Counter[str] = Counter()
        unexplained = 0

        async def one_of_many() -> None:
            nonlocal unexplained
            code, head = await upload(router.port, body)
            codes[code] += 1
            unexplained += code == "503" and b"retry-after:" not in head

        forget_peak(router)
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(one_of_many)
        card.note(f"{count} of {size} MB with a budget of {budget} MB", dict(codes))
        card.equal("other answers than 200 and 503", codes.keys() - {"200", "503"}, set())
        card.equal("503 without Retry-After", unexplained, 0)
        card.most("peak RSS", peak_mb(router) - base, most, " MB")
        lag = await off_loop(router.metric, "vllm_router_event_loop_lag_seconds")
        card.most("loop lag", lag * 1000, 150, " ms")
        forget_peak(router)
        for engine in engines:
            engine.reads.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one_of_many)
            await trio.sleep(5)
            for engine in engines:
                engine.reads.set()
        peak = peak_mb(router) - base
        card.most("peak RSS, servers that read nothing", peak, most, " MB")
        took = await waited(lambda: rss_mb(router) <= base + 60, "its memory", 30)
        card.most("RSS back to base + 60 MB", took, 30, " s")
    for engine in engines:
        engine.shutdown()


@scenario("L10", "1,000 readers that stall and 1,000 connections that are idle", p0=True)
async def many_connections(card: Card) -> None:
    count = card.size(200, 1000)
    with fleet(card, mock=QUICK, write_stall_timeout=20) as (_, router):
        before = rss_mb(router)
        idle = [socket.create_connection(("127.0.0.1", router.port)) for _ in range(count)]
        await trio.sleep(1)
        alone = rss_mb(router) - before
        card.most(f"RSS for each of {count} idle", alone / count * 1000, 30, " KB")
        readers = [await off_loop(stalled_reader, router.port, 8000) for _ in range(count)]
        await trio.sleep(5)
        added = rss_mb(router) - before - alone
        card.most("RSS for each stalled reader", added / count * 1000, 200, " KB")
        began = time.monotonic()
        with router.client() as client:
            codes = {client.post(PATH, json=chat(max_tokens=1)).status_code for _ in range(20)}
        card.equal("others meanwhile", codes, {200})
        card.most("each of them", (time.monotonic() - began) / 20 * 1000, 250, " ms")
        flat = rss_mb(router)
        await trio.sleep(5)
        card.most("RSS added in 5 s", rss_mb(router) - flat, 2, " MB")
        gone = lambda: router.metric("vllm_router_requests_in_flight") == 0  # noqa: E731
        card.most("readers gone", await waited(gone, "the readers' end", 60), 25, " s")
        for sock in (*idle, *readers):
            sock.close()


class Soak:
    """Clients that keep their connections, stream, and sometimes disconnect."""

    def __init__(self, port: int, total: int) -> None:
        self.left = total
        self.codes: Counter[str] = Counter()
        self._port = port
        self._rng = random.Random(4)

    async def client(self) -> None:
        stream: trio.SocketStream | None = None
        while self.left > 0:
            self.left -= 1
            if stream is None:
                stream = await trio.open_tcp_stream("127.0.0.1", self._port)
            streamed, leaves = self._rng.random() < 0.3, self._rng.random() < 0.05
            body = json.dumps(chat(stream=streamed, max_tokens=4)).encode()
            head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            await stream.send_all(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if leaves:
                await trio.sleep(self._rng.random() * 0.02)
                self.codes["left"] += 1
                await stream.aclose()
                stream = None
                continue
            code = await self._answer(stream)
            self.codes[code] += 1
            if code != "200":
                await stream.aclose()
                stream = None
        if stream is not None:
            await stream.aclose()

    async def _answer(self, stream: trio.SocketStream) -> str:
        received = b""
        with contextlib.suppress(trio.BrokenResourceError):
            while piece := await stream.receive_some(65536):
                received += piece
                head, end, body = received.partition(b"\r\n\r\n")
                if not end:
                    continue
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
                if len(body) >= int(length) if length else body.endswith(b"0\r\n\r\n"):
                    return received[9:12].decode()
        return "cut"


def _states(router: RouterProcess) -> list[str]:
    return [server["state"] for server in router.servers().values()]


@scenario("L6", "soak of mixed requests: streams, leaving, failures, reloads", p0=True)
async def soak(card: Card) -> None:
    total = card.size(2000, 8000, 200_000)
    with fleet(card, mock=QUICK, capacity=50) as (mocks, router):
        # One server alone: a request that two servers failed is not retried on a third.
        mocks[0].set(mode="500", fraction=0.03)
        urls = [mock.url for mock in mocks]
        reloads = 0

        async def reload() -> None:
            nonlocal reloads
            while True:
                await trio.sleep(30 if card.long else 2)
                reloads += 1
                text = servers_toml(urls[: 3 - reloads % 2], 50, max_retries=3 + reloads % 2)
                await trio.to_thread.run_sync(router.config.write_text, text)

        def series() -> set[str]:
            lines = router.get("/metrics").text.splitlines()
            found = {line.rpartition(" ")[0] for line in lines if line[:1] != "#"}
            # A server that a reload has just taken back has no series of requests yet.
            return {line for line in found if 'server="' not in line or "_server_" in line} | {
                re.sub(r'server="[^"]*"', "server", line) for line in found
            }

        codes: Counter[str] = Counter()
        marks = []
        warm = max(total // 10, min(4000, total // 2))
        for part in (warm, total - warm):
            work = Soak(router.port, part)
            async with trio.open_nursery() as reloading:
                reloading.start_soon(reload)
                async with trio.open_nursery() as nursery:
                    for _ in range(24):
                        nursery.start_soon(work.client)
                reloading.cancel_scope.cancel()
            codes += work.codes
            router.config.write_text(servers_toml(urls, 50))
            await waited(lambda: _states(router) == ["up"] * 3, "all servers", 30)
            await trio.sleep(4)  # idle connections to servers are closed after 3 s
            await off_loop(router.post, PATH, chat(max_tokens=1))
            marks.append((rss_mb(router), router.descriptors(), await off_loop(series)))
        card.note(f"{total} requests, {reloads} reloads", dict(codes))
        card.equal("other than answered or left", codes.keys() - {"200", "left"}, set())
        before, after = marks
        card.most("RSS added after the first of them", after[0] - before[0], 5, " MB")
        card.most("descriptors added", after[1] - before[1], 3)
        new = after[2] - before[2]
        card.most("series added", len(new), 10)
        if len(new) > 10:
            card.note("such as", sorted(new)[:40:4])
        card.equal("in flight", router.metric("vllm_router_requests_in_flight"), 0)
        leases = {server["in_flight"] for server in router.servers().values()}
        card.equal("leases", leases, {0})
