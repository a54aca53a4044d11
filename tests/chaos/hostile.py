"""Bad input and attacks (B1 to B8)."""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from collections import Counter

import h2.connection
import h2.exceptions
import trio

from chaos.harness import Card, fleet, percentile, rss_mb, running, scenario, waited
from router_process import chat, raw_exchange
from test_e2e_fuzz import malformed, send_all, statuses

PATH = "/v1/chat/completions"
ALLOWED = {"/health", "/metrics", "/v1/models", "/version", "/server_info", PATH}


@scenario("B1", "malformed requests, a subset", p0=True)
async def killers(card: Card) -> None:
    rng = random.Random(1)
    with fleet(card) as (_, router):
        before, took, bad = rss_mb(router), [], set()
        for _ in range(card.size(5, 20, 100)):
            inputs = [malformed(rng) for _ in range(100)]
            for answer in send_all(router.port, inputs, rng):
                bad |= {status for status in statuses(answer) if status >= 500}
            began = time.monotonic()
            router.get("/livez")
            took.append(time.monotonic() - began)
        card.equal("5xx", bad - {501, 505}, set())
        card.most("RSS added", rss_mb(router) - before, 20, " MB")
        card.most("probe p99", percentile(took) * 1000, 100, " ms")
        card.equal("alive", router.process.poll(), None)


def _head(body: bytes, more: str = "") -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@scenario("B3", "pipelining and abort, h2c upgrade, rapid reset", p0=True)
async def floods(card: Card) -> None:
    with fleet(card) as (mocks, router):
        body = json.dumps(chat(max_tokens=500)).encode()
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", router.port)) as sock:
                sock.sendall(_head(body) * 5)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await waited(lambda: running(mocks) == 0, "idle engines")
        card.equal("in flight", router.metric("vllm_router_requests_in_flight"), 0)
        upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"
        for path in (b"/livez", PATH.encode()):
            raw = b"GET %b HTTP/1.1\r\nHost: a\r\n%b\r\n" % (path, upgrade.encode())
            card.equal(
                f"h2c on {path.decode()}", b" 101 " in raw_exchange(router.port, raw, 1), False
            )
        sent = sum(len(mock.log(PATH)) for mock in mocks)
        client = h2.connection.H2Connection()
        client.initiate_connection()
        headers = [(":method", "POST"), (":path", PATH), (":scheme", "http"), (":authority", "a")]
        reset = 0
        try:
            with socket.create_connection(("127.0.0.1", router.port), timeout=5) as sock:
                for number in range(2000):
                    client.send_headers(2 * number + 1, headers)
                    client.reset_stream(2 * number + 1)
                    sock.sendall(client.data_to_send())
                    reset = number + 1
        except (OSError, h2.exceptions.ProtocolError):
            pass  # turned away: what the router should do
        card.note("resets before it closed", reset)
        await waited(lambda: running(mocks) == 0, "idle engines")
        began = sum(len(mock.log(PATH)) for mock in mocks) - sent
        card.most("requests begun by resets", began, 5)
        card.equal("alive", router.get("/livez").status_code, 200)


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
    with fleet(card, 1, arguments=()) as ([mock], router):
        tried = 0
        for target in TARGETS:
            for method in ("POST", "GET", "PUT", "CONNECT", "TRACE", "OPTIONS"):
                head = f"{method} {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
                raw_exchange(router.port, f"{head}Content-Length: 2\r\n\r\n{{}}".encode(), 1)
                tried += 1
        reached = {entry["path"].split("?")[0] for entry in mock.log()} - ALLOWED
        card.note("tried", tried)
        card.equal("reached the engine", sorted(reached), [])


@scenario("B8", "random models, paths and user agents")
async def cardinality(card: Card) -> None:
    with fleet(card) as (mocks, router):
        rng = random.Random(2)

        def series() -> int:
            return sum(line[:1] != "#" for line in router.get("/metrics").text.splitlines())

        router.post(PATH, chat(model="nobody's"))
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
