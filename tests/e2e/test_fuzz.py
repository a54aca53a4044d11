"""Malformed requests: the router answers or closes the connection, and leaks nothing.

FUZZ_EXAMPLES=10000 sends that many to each front.
"""

from __future__ import annotations

import random
import re
import select
import socket

import pytest

from support.fuzzing import EXAMPLES
from support.mock_process import mock_processes
from support.router_process import chat, router_process, servers_toml, until

GOOD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    b'Content-Length: 63\r\n\r\n{"model":"m","max_tokens":1,"messages":[{"role":"user","conten'
)
PIECES = [
    b"GET",
    b"POST",
    b" ",
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b"HTTP/1.1",
    b"HTTP/2.0",
    b"/v1/chat/completions",
    b"/v1/../sleep",
    b"/v1/%2e%2e/sleep",
    b"//sleep",
    b"http://a/v1/models",
    b"*",
    b"Host: a",
    b"Host: b",
    b"Content-Length: 5",
    b"Content-Length: -1",
    b"Content-Length: 99999999999999999999",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip",
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Upgrade: h2c",
    b"Expect: 100-continue",
    b"5\r\nhello\r\n",
    b"0\r\n\r\n",
    b"ffffffffffffffffff\r\n",
    b"{",
    b'{"model":',
    b'"m"',
    b"[" * 200,
    b"\xff\xfe",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


def malformed(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        data = bytearray(GOOD)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[place] = rng.randrange(256)
                case 1:
                    del data[place : place + rng.randint(1, 20)]
                case _:
                    data[place:place] = rng.choice(PIECES)
        return bytes(data)
    separators = [b"", b" ", b"\r\n", b"\r\n\r\n"]
    return b"".join(rng.choice(PIECES) + rng.choice(separators) for _ in range(rng.randint(1, 14)))


def statuses(answer: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3})", answer)]


def send_all(port: int, inputs: list[bytes], rng: random.Random) -> list[bytes]:
    """Send each on its own connection, all at the same time.

    Returns the bytes received until silence, which begins after the first refusal: a hundred inputs
    always have one.
    """
    answers = [b""] * len(inputs)
    numbers = {}
    for number, data in enumerate(inputs):
        sock = socket.create_connection(("127.0.0.1", port))
        cut = rng.randrange(len(data) + 1)
        sock.sendall(data[:cut])
        sock.sendall(data[cut:])
        sock.setblocking(False)
        numbers[sock] = number
    while numbers:
        refused = any(b" 400 " in answer for answer in answers)
        ready, _, _ = select.select(list(numbers), [], [], 0.25 if refused else 60.0)
        if not ready:
            break
        for sock in ready:
            try:
                piece = sock.recv(65536)
            except ConnectionResetError:
                piece = b""
            answers[numbers[sock]] += piece
            if not piece:
                numbers.pop(sock)
                sock.close()
    for sock in numbers:  # it waits for the rest of a request
        sock.close()
    return answers


@pytest.mark.parametrize("front", ["lane", "hypercorn"])
def test_fuzz_malformed_requests_leak_nothing(tmp_path, front):
    rng = random.Random(7)
    with (
        mock_processes(2, "--model", "m", "--ttft", "0", "--token-delay", "0") as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path, "--front", front) as router,
    ):
        descriptors = router.descriptors()
        seen: set[int] = set()
        for _ in range(max(1, EXAMPLES // 100)):
            inputs = [malformed(rng) for _ in range(100)]
            for data, answer in zip(inputs, send_all(router.port, inputs, rng), strict=True):
                for status in statuses(answer):
                    seen.add(status)
                    assert status < 500 or status in (501, 505), (data, answer)
        assert 400 in seen
        assert router.post("/v1/chat/completions", chat()).status_code == 200
        targets = {entry["path"] for mock in mocks for entry in mock.log()}
        assert not [target for target in targets if "sleep" in target]
        until(lambda: router.descriptors() <= descriptors + 4, "the descriptors to be closed")
        until(lambda: router.metric("vllm_router_requests_in_flight") == 0, "nothing in flight")
        assert {server["state"] for server in router.servers().values()} == {"up"}
