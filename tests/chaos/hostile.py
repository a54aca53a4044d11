"""Bad input and attacks (B1 to B8)."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import struct
import subprocess
import time
from collections import Counter

import h2.connection
import h2.exceptions
import trio

from chaos.harness import Card, fleet, off_loop, percentile, rss_mb, running, scenario, waited
from e2e.test_fuzz import malformed, send_all, statuses
from property.test_front_fuzz import HANDSHAKE, PREFACE, literal
from support.router_process import RouterProcess, chat, raw_exchange

PATH = "/v1/chat/completions"
ALLOWED = {"/health", "/metrics", "/v1/models", "/version", "/server_info", PATH}


FRONTS = ("lane", "hypercorn")


def malformed_frames(rng: random.Random) -> bytes:
    """HTTP/2 with prior knowledge: valid frame headers with random contents."""
    data = PREFACE
    for _ in range(rng.randint(1, 6)):
        stream = rng.choice((0, 1, 1, 3, 5, 2**31 - 1))
        if rng.random() < 0.5:
            payload = b"".join(
                literal(name, rng.choice((b"GET", b"CONNECT", b"/", b"", b"\xff", PATH.encode())))
                for name in (b":method", b":path", b":scheme", b":authority", b":protocol", b"te")
                if rng.random() < 0.7
            )
            kind, flags = 1, rng.choice((4, 5))
        else:
            payload = rng.randbytes(rng.randint(0, 60))
            kind, flags = rng.randint(0, 11), rng.choice((0, 1, 4, 5, 0x24))
        size = len(payload) + rng.choice((0, 0, 0, 0, 1, 16384))
        data += size.to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
    return data


def malformed_websocket(rng: random.Random) -> bytes:
    """Handshakes that are invalid, too large, or followed by invalid frames."""
    data = bytearray(HANDSHAKE.replace(b"/ws ", b"/ws/load "))
    for _ in range(rng.choice((0, 0, 1, 2))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data) + rng.randbytes(rng.randint(0, 60))


KINDS = {"HTTP/1": malformed, "HTTP/2": malformed_frames, "websocket": malformed_websocket}


@scenario("B1", "malformed requests, HTTP/2 frames and websockets", p0=True)
async def killers(card: Card) -> None:
    for front in FRONTS:
        await _killers(card, front)


async def _killers(card: Card, front: str) -> None:
    rng = random.Random(1)
    with fleet(card, arguments=("--front", front)) as (_, router):
        before, took, bad = rss_mb(router), [], set()
        rounds = card.size(3, 12, 34)
        for number in range(3 * rounds):
            make = tuple(KINDS.values())[number % 3]
            inputs = [make(rng) for _ in range(100)]
            for answer in send_all(router.port, inputs, rng):
                bad |= {status for status in statuses(answer) if status >= 500}
            began = time.monotonic()
            router.get("/livez")
            took.append(time.monotonic() - began)
        card.note(f"{front}: inputs of each kind", 100 * rounds)
        card.equal(f"{front}: 5xx", bad - {501, 505}, set())
        card.most(f"{front}: RSS added", rss_mb(router) - before, 20, " MB")
        card.most(f"{front}: probe p99", percentile(took) * 1000, 100, " ms")
        card.equal(f"{front}: alive", router.process.poll(), None)
        failed = [line for line in router.log if "connection failed" in line]
        card.equal(f"{front}: connections that failed", failed[:2], [])


def _head(body: bytes, more: str = "") -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@scenario("B3", "pipelining and abort, h2c upgrade, rapid reset", p0=True)
async def floods(card: Card) -> None:
    for front in FRONTS:
        await _floods(card, front)


async def _floods(card: Card, front: str) -> None:
    with fleet(card, arguments=("--front", front)) as (mocks, router):
        body = json.dumps(chat(max_tokens=500)).encode()
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", router.port)) as sock:
                sock.sendall(_head(body) * 5)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await waited(lambda: running(mocks) == 0, "idle engines")
        in_flight = router.metric("vllm_router_requests_in_flight")
        card.equal(f"{front}: in flight", in_flight, 0)
        upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"
        for path in (b"/livez", PATH.encode()):
            raw = b"GET %b HTTP/1.1\r\nHost: a\r\n%b\r\n" % (path, upgrade.encode())
            switched = b" 101 " in raw_exchange(router.port, raw, 1)
            card.equal(f"{front}: h2c on {path.decode()}", switched, False)
        for at_once in (True, False):
            sent = sum(len(mock.log(PATH)) for mock in mocks)
            reset = _rapid_reset(router.port, body, at_once=at_once)
            how = "each stream" if at_once else "streams, 50 together"
            card.note(f"{front}: reset {how}, until it closed", reset)
            await waited(lambda: running(mocks) == 0, "idle engines")
            began = sum(len(mock.log(PATH)) for mock in mocks) - sent
            card.most(f"{front}: requests begun by them", began, 5 if at_once else 150)
        card.equal(f"{front}: alive", router.get("/livez").status_code, 200)


def _rapid_reset(port: int, body: bytes, *, at_once: bool) -> int:
    """Whole requests that are reset: in the same packet, or after the start of the response.

    Returns how many were sent until the connection was closed.
    """
    client = h2.connection.H2Connection()
    client.initiate_connection()
    headers = [(":method", "POST"), (":path", PATH), (":scheme", "http"), (":authority", "a")]
    headers += [("content-type", "application/json")]
    done = 0
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(client.data_to_send())
            for number in range(0, 2000, 50):
                streams = [2 * (number + offset) + 1 for offset in range(50)]
                for stream in streams:
                    client.send_headers(stream, headers)
                    client.send_data(stream, body, end_stream=True)
                    if at_once:
                        client.reset_stream(stream)
                        sock.sendall(client.data_to_send())
                sock.sendall(client.data_to_send())
                if not at_once:
                    time.sleep(0.05)  # until their responses have begun
                    for stream in streams:
                        client.reset_stream(stream)
                    sock.sendall(client.data_to_send())
                done = number + 50
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while received := sock.recv(65536):
                        client.receive_data(received)
                    break  # closed
                sock.setblocking(True)
    except (OSError, h2.exceptions.ProtocolError):
        pass  # refused, as intended
    return done


TARGETS = (
    "/v1/../pause",
    "/v1/%2e%2e/pause",
    "/v1/%2E%2E%2Fpause",
    "/v1/./../pause",
    "//pause",
    "/pause",
    "/pause/",
    "/PAUSE",
    "/%70ause",
    "/v1/models/..;/sleep",
    "/sleep?level=1",
    "/sleep#a",
    "/v1/load_lora_adapter",
    "/v1/load_lora_adapter/",
    "/v1/%6coad_lora_adapter",
    "/v1//load_lora_adapter",
    "/v1/chat/completions/../../../sleep",
    "/v1\\..\\sleep",
    "/collective_rpc",
    "http://a/sleep",
    "http://a//sleep",
    "http://a/v1/../sleep",
    "a:80",
    "*",
)


@scenario("B5", "paths and methods outside the allowlist", p0=True)
async def allowlist(card: Card) -> None:
    for front in FRONTS:
        await _allowlist(card, front)


async def _allowlist(card: Card, front: str) -> None:
    with fleet(card, 1, arguments=("--front", front)) as ([mock], router):
        tried = 0
        for target in TARGETS:
            for method in ("POST", "GET", "PUT", "CONNECT", "TRACE", "OPTIONS"):
                head = f"{method} {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
                raw_exchange(router.port, f"{head}Content-Length: 2\r\n\r\n{{}}".encode(), 1)
                tried += 1
        reached = {entry["path"].split("?")[0] for entry in mock.log()} - ALLOWED
        card.note(f"{front}: tried", tried)
        card.equal(f"{front}: reached the engine", sorted(reached), [])


@scenario("B8", "random models, paths and user agents")
async def cardinality(card: Card) -> None:
    with fleet(card) as (mocks, router):
        rng = random.Random(2)

        def series() -> int:
            return sum(line[:1] != "#" for line in router.get("/metrics").text.splitlines())

        router.post(PATH, chat(model="unknown"))
        raw_exchange(router.port, _head(b"{}").replace(b"completions", b"x"), 0.3)
        before, lines = series(), len(router.log)
        count = card.size(200, 1000, 10_000)
        answers: Counter[str] = Counter()
        for number in range(count):
            body = json.dumps(chat(model=f"m{rng.random()}")).encode()
            agent = "a\x1b[31m\tb" if number % 2 else "x" * 3000
            raw = _head(body, f"User-Agent: {agent}\r\nConnection: close\r\n")
            raw = raw.replace(b"chat/completions", b"x%d" % number) if number % 3 else raw
            answers[raw_exchange(router.port, raw, 2)[9:12].decode()] += 1
        card.note("answers", dict(answers))
        card.most("series added", series() - before, 10)
        await trio.sleep(1)  # the log is written off the loop
        requests = sum(f" {PATH}" in line or " /v1/x" in line for line in router.log[lines:])
        card.equal("log lines", requests, count)
        control = [line for line in router.log if any(ord(c) < 32 for c in line)]
        card.equal("lines with control bytes", len(control), 0)
        card.equal("engines", {mock.stats()["running"] for mock in mocks}, {0})
        await _promtool(card, router)


async def _promtool(card: Card, router: RouterProcess) -> None:
    program = shutil.which("promtool")
    if program is None:
        card.note("promtool", "not installed")
        return
    page = (await off_loop(router.get, "/metrics")).text

    def check() -> subprocess.CompletedProcess[str]:
        command = [program, "check", "metrics"]
        return subprocess.run(command, input=page, capture_output=True, text=True)

    done = await off_loop(check)
    card.equal("promtool check metrics", (done.returncode, done.stderr[-200:]), (0, ""))
