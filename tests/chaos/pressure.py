"""Slow, disconnecting and many clients (L1 to L9)."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import socket
import struct
import subprocess
import time
from dataclasses import replace
from itertools import pairwise

import h2.connection
import httpx
import trio

from chaos.harness import MOCK, Card, fleet, off_loop, percentile, rss_mb, running, scenario
from chaos.harness import waited as wait_for
from chaos.rivals import NAMES, rival
from chaos.stalled import stalled_reader
from support.load import Load, ask
from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, chat, raw_exchange

PATH = "/v1/chat/completions"
QUICK = ("--model", "m", "--ttft", "0.02", "--token-delay", "0.002", "--max-num-seqs", "2000")


def in_flight(router: RouterProcess) -> float:
    return router.metric("vllm_router_requests_in_flight")


@scenario("L1", "stalled readers beside 20 normal clients", p0=True)
async def stalled_readers(card: Card) -> None:
    count = card.size(100, 500)
    stall = card.size(12, 40)
    # One write per response: 2 MB exceed all kernel buffers.
    with fleet(card, mock=(*QUICK, "--token-delay", "0"), write_stall_timeout=stall) as (_, router):
        async with Load(router.url, chat(max_tokens=4), 20, pause=0.02) as load:
            await load.wait_for(200)
            before = percentile(result.seconds for result in load.results)
            base, most, peak, mark = rss_mb(router), 0.0, 0.0, len(load.results)
            readers = []
            for _ in range(count):
                readers.append(await off_loop(stalled_reader, router.port, 8000))
                await trio.sleep(0.01)
            last, flat = time.monotonic(), []
            while time.monotonic() - last < stall + 20:
                memory, passed = rss_mb(router), time.monotonic() - last
                most = max(most, memory)
                if 2 < passed < stall * 0.8:
                    flat.append(memory)
                now = await off_loop(in_flight, router)
                peak = max(peak, now)
                if now <= 20:
                    break
                await trio.sleep(0.2)
            took = time.monotonic() - last
            after = percentile(result.seconds for result in load.results[mark:])
        for reader in readers:
            reader.close()
        card.note("in flight at most", f"{peak:.0f}, of {count} readers")
        card.most("RSS added", most - base, 100, " MB")
        spread = (max(flat) - min(flat)) / 2
        card.most(f"RSS in {stall * 0.8 - 2:.0f} s: ±", spread, 2, " MB")
        card.most("p99 of the others", after / before, 2.0, "×")
        card.most("failed of the others", len(load.bad()), 0)
        card.most("all gone", took, stall + 5, " s")
        card.equal("in flight at the end", await off_loop(in_flight, router), 0)


@scenario("L3", "slow headers and slow bodies", p0=True)
async def slow_senders(card: Card) -> None:
    heads, bodies = card.size(100, 500), card.size(60, 300)
    took: dict[str, list[float]] = {"head": [], "body": []}
    answers: list[bytes] = []
    with fleet(card, body_timeout=5) as (_, router):

        async def slow(kind: str) -> None:
            stream = await trio.open_tcp_stream("127.0.0.1", router.port)
            began = time.monotonic()
            start = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
            end = b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
            got = b""

            async def drip() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    while True:
                        await stream.send_all(b"X-A: b\r\n" if kind == "head" else b" ")
                        await trio.sleep(1)

            async with stream, trio.open_nursery() as nursery:
                await stream.send_all(start + (b"" if kind == "head" else end))
                nursery.start_soon(drip)
                with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(30):
                    while piece := await stream.receive_some():
                        got += piece
                nursery.cancel_scope.cancel()
            took[kind].append(time.monotonic() - began)
            if kind == "body":
                answers.append(got[9:12])

        async with Load(router.url, chat(max_tokens=4), 10, pause=0.02) as load:
            await load.wait_for(200)
            before, mark = percentile(r.seconds for r in load.results), len(load.results)
            async with trio.open_nursery() as nursery:
                for kind, count in (("head", heads), ("body", bodies)):
                    for _ in range(count):
                        nursery.start_soon(slow, kind)
                        await trio.sleep(0.005)  # else this process is the bottleneck
            after = percentile(result.seconds for result in load.results[mark:])
        card.most("heads closed", max(took["head"]), 10, " s")
        card.most("bodies closed", max(took["body"]), 7, " s")
        card.equal("bodies answered", set(answers), {b"408"})
        card.most("p99 of the others", after / before, 2.0, "×")
        card.most("failed of the others", len(load.bad()), 0)
    await _slowhttptest(card)


TOOL = {
    "headers": ("-H", "-c", "500", "-r", "250", "-i", "3", "-t", "POST", "-x", "24"),
    "bodies": ("-B", "-c", "300", "-r", "150", "-i", "3", "-t", "POST", "-x", "24", "-s", "8192"),
    "readers": ("-X", "-c", "300", "-r", "150", "-w", "512", "-y", "1024", "-n", "5", "-z", "32"),
}


async def _slowhttptest(card: Card) -> None:
    """The same with the usual tool, if it is installed, against both fronts."""
    tool = shutil.which("slowhttptest")
    if tool is None:
        card.note("slowhttptest", "not installed")
        return
    for front in ("lane", "hypercorn"):
        arguments = ("--front", front)
        with fleet(card, 1, arguments=arguments, body_timeout=5, write_stall_timeout=10) as (_, r):
            for kind, options in TOOL.items():
                path = "/static/app.js" if kind == "readers" else PATH
                command = [tool, *options, "-p", "3", "-l", "15", "-u", r.url + path]

                def run(command: list[str] = command) -> str:
                    done = subprocess.run(
                        command, capture_output=True, text=True, stdin=subprocess.DEVNULL
                    )
                    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", done.stdout)

                said = await off_loop(run)
                available = set(re.findall(r"service available:\s+(\w+)", said))
                card.equal(f"slowhttptest, {front}, {kind}: service available", available, {"YES"})
                ended = re.search(r"ended on (\d+)", said)
                if kind != "readers":
                    # Clients that read a little now and then are served, slowly.
                    seconds = int(ended[1]) if ended else 99
                    card.most(f"slowhttptest, {front}, {kind}: all closed", seconds, 12, " s")


# Bytes sent, whether streamed, the delay until the client disconnects, and how.
LEAVING = (
    ("half a head", False, 0.1, "FIN"),
    ("half a body", False, 0.1, "FIN"),
    ("all", False, 0.3, "FIN"),
    ("all", False, 0.3, "RST"),
    ("slow", True, 0.3, "FIN"),
    ("all", True, 0.3, "FIN"),
    ("all", True, 0.3, "RST"),
)


async def _leave(port: int, sent: str, stream: bool, seconds: float, how: str) -> None:
    body = json.dumps(chat(max_tokens=3000, stream=stream)).encode()
    slow = "X-Mock-Ttft-Ms: 5000\r\n" if sent == "slow" else ""
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{slow}"
    data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    if sent.startswith("half"):
        data = data[: 40 if sent.endswith("head") else -10]
    connection = await trio.open_tcp_stream("127.0.0.1", port)
    await connection.send_all(data)
    with trio.move_on_after(seconds):
        while await connection.receive_some():
            pass
    if how == "RST":
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.socket.close()


async def _leave_all(port: int, mocks: list[MockProcess], repeat: int) -> float:
    """All seven ways; returns the longest time until the engines were idle."""
    longest = 0.0
    for way in LEAVING:
        async with trio.open_nursery() as nursery:
            for _ in range(repeat):
                nursery.start_soon(_leave, port, *way)
        longest = max(longest, await wait_for(lambda: running(mocks) == 0, "idle engines", 40))
    return longest


@scenario("L5", "clients that leave: 7 ways, and at random", p0=True)
async def leaving(card: Card) -> None:
    slow = ("--model", "m", "--token-delay", "0.005")
    with fleet(card, mock=slow) as (mocks, router):
        card.most("engines idle after", await _leave_all(router.port, mocks, 20), 0.5, " s")
        rng = random.Random(3)
        async with trio.open_nursery() as nursery:
            for _ in range(card.size(200, 1000)):
                sent, stream, _, how = rng.choice(LEAVING)
                nursery.start_soon(_leave, router.port, sent, stream, rng.random(), how)
                await trio.sleep(0.005)
        card.most(
            "idle after random ones",
            await wait_for(lambda: running(mocks) == 0, "idle engines"),
            0.5,
            " s",
        )
        card.equal("in flight", in_flight(router), 0)
        leases = {server["in_flight"] for server in router.servers().values()}
        card.equal("leases", leases, {0})
        card.equal("states", {router.state(mock.url) for mock in mocks}, {"up"})
    for name in NAMES:
        with (
            mock_processes(3, *slow) as mocks,
            rival(name, [m.url for m in mocks], card.directory) as url,
        ):
            if url is None:
                card.note(name, "not installed")
                continue
            try:
                took = await _leave_all(int(url.rsplit(":", 1)[1]), mocks, 20)
                card.note(name, f"idle after {took:.2f} s")
            except TimeoutError:
                card.note(name, "engines not idle after 40 s")


@scenario("L7", "connections closed by request, HTTP/1.0, long keep-alive")
async def closing(card: Card) -> None:
    count = card.size(300, 2000, 20_000)
    with fleet(card) as (_, router):
        longest, open_ = 0.0, 0
        for line in (b"HTTP/1.1\r\nHost: a\r\nConnection: close", b"HTTP/1.0\r\nHost: a"):
            for _ in range(count // 2):
                began = time.monotonic()
                answer = raw_exchange(router.port, b"GET /livez " + line + b"\r\n\r\n", 1.0)
                took = time.monotonic() - began
                longest = max(longest, took)
                open_ += took >= 1.0 or b" 200 " not in answer[:15]
        card.equal(f"not closed of {count}", open_, 0)
        card.most("longest", longest, 1.0, " s")
        with router.client() as client:
            codes = [client.post(PATH, json=chat(max_tokens=1)) for _ in range(count // 4)]
        card.equal("keep-alive", {answer.status_code for answer in codes}, {200})


@scenario("L8", "silent prefill, also with comments of the engine")
async def silence(card: Card) -> None:
    seconds = card.size(25, 40, 120)
    every = card.size(11, 15)
    (card.directory / "other").mkdir()
    other = replace(card, directory=card.directory / "other")
    with (
        fleet(card) as (mocks, router),
        fleet(other, 1, (*MOCK, "--sse-keep-alive", str(every))) as (_, talkative),
    ):
        results = []
        comments: list[float] = []

        async def silent() -> None:
            options = {"base_url": router.url, "timeout": seconds + 60, "trust_env": False}
            async with httpx.AsyncClient(**options) as client:
                results.append(await ask(client, chat(stream=True), headers))

        async def commented() -> None:
            body = json.dumps(chat(stream=True)).encode()
            head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
            head += "Content-Type: application/json\r\n"
            head += f"X-Mock-Ttft-Ms: {seconds * 1000}\r\nContent-Length: {len(body)}\r\n\r\n"
            began = time.monotonic()
            received = b""
            async with await trio.open_tcp_stream("127.0.0.1", talkative.port) as stream:
                await stream.send_all(head.encode() + body)
                while piece := await stream.receive_some():
                    received += piece
                    comments.extend([time.monotonic() - began] * piece.count(b"\n: "))
            comments.append(time.monotonic() - began)
            card.equal("with comments: its end", received.count(b"data: [DONE]"), 1)

        headers = {"x-mock-ttft-ms": str(seconds * 1000)}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(silent)
            nursery.start_soon(commented)
        card.equal(f"{seconds} s without a byte", [result.ok for result in results], [True])
        card.equal("comments", len(comments) - 1, (seconds - 1) // every)
        gaps = [after - before for before, after in pairwise([0.0, *comments])]
        card.most("longest silence between comments", max(gaps), every + 0.5, " s")
        card.equal("states", {router.state(mock.url) for mock in mocks}, {"up"})
        await _leave(router.port, "slow", True, 1.0, "FIN")
        took = await wait_for(lambda: running(mocks) == 0, "idle engines")
        card.most("cancelled", took, 0.5, " s")


@scenario("L9", "200 feed clients, 20 of them stalled, under load")
async def feed(card: Card) -> None:
    request = (
        b"GET /ws/load HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n"
    )
    gaps: list[float] = []
    with fleet(card) as (_, router):

        async def live() -> None:
            stream = await trio.open_tcp_stream("127.0.0.1", router.port)
            async with stream:
                await stream.send_all(request)
                await stream.receive_some()
                while True:
                    began = time.monotonic()
                    if not await stream.receive_some():
                        gaps.append(999)
                        return
                    gaps.append(time.monotonic() - began)

        async with Load(router.url, chat(max_tokens=4), 50, pause=0.1) as load:
            await trio.sleep(5)
            before, mark, base = percentile(r.seconds for r in load.results), 0, rss_mb(router)
            async with trio.open_nursery() as nursery:
                for _ in range(180):
                    nursery.start_soon(live)
                stalled = []
                for _ in range(20):
                    sock = socket.socket()
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                    sock.connect(("127.0.0.1", router.port))
                    sock.sendall(request)
                    stalled.append(sock)
                await trio.sleep(2)
                mark = len(load.results)
                await trio.sleep(28)
                clients = await off_loop(router.metric, "vllm_router_feed_clients")
                after = percentile(result.seconds for result in load.results[mark:])
                added = rss_mb(router) - base
                nursery.cancel_scope.cancel()
            for sock in stalled:
                sock.close()
        card.most("update gap p99", percentile(gaps), 1.5, " s")
        card.most("RSS added", added, 20, " MB")
        card.most("HTTP p99", after / before, 1.1, "×")
        card.equal("feed clients left after 30 s", clients, 180.0)


NO_WINDOW = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000006040000000000000400000000")
"""The preface of HTTP/2, and a SETTINGS frame by which the client takes nothing of any answer."""


def _http2(port: int, streams: int, body: bytes, *, whole: bool) -> socket.socket:
    """A connection with `streams` requests on it; their bodies end only if `whole`."""
    peer = h2.connection.H2Connection()
    peer.initiate_connection()
    peer.clear_outbound_data_buffer()
    fields = [(":method", "POST"), (":path", PATH), (":scheme", "http"), (":authority", "a")]
    for number in range(streams):
        peer.send_headers(2 * number + 1, [*fields, ("content-type", "application/json")])
        peer.send_data(2 * number + 1, body if whole else body[:10], end_stream=whole)
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(NO_WINDOW + peer.data_to_send())
    return sock


@scenario("L11", "HTTP/2 clients that take nothing of their answers, and bodies that never end")
async def http2_slow(card: Card) -> None:
    count, streams, stall = card.size(5, 20), 25, 5
    long = json.dumps(chat(stream=True, max_tokens=8000)).encode()
    arguments = (*QUICK, "--token-delay", "0")
    with fleet(card, mock=arguments, write_stall_timeout=stall, body_timeout=stall) as (_, router):
        for what, body, whole in (("answers", long, True), ("bodies", long, False)):
            base, most, began = rss_mb(router), 0.0, time.monotonic()
            open_ = [
                await off_loop(lambda: _http2(router.port, streams, body, whole=whole))  # noqa: B023
                for _ in range(count)
            ]
            asked = time.monotonic() - began
            peak = await off_loop(in_flight, router)
            while await off_loop(in_flight, router) and time.monotonic() - began < stall + 30:
                most = max(most, rss_mb(router))
                await trio.sleep(0.1)
            took = time.monotonic() - began - asked
            card.note(f"{what}: in flight at most", f"{peak:.0f}, of {count * streams}")
            card.most(f"{what}: all gone", took, stall + 5, " s")
            card.most(f"{what}: RSS added", most - base, 100, " MB")
            alive = await off_loop(router.post, PATH, chat(max_tokens=1))
            card.equal(f"{what}: others afterwards", alive.status_code, 200)
            for sock in open_:
                sock.close()
