"""Responses of real vLLM servers in each API, and what clients of the router get then.

The servers are full, stopped, paused or asked to abort.

    VLLM_LAB=/path/to/start.sh scripts/test -m real tests/real/test_real_answers.py
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from real.lab import DEVELOPMENT, MODEL, RealServer, real_servers
from support.api_clients import ENDS, KINDS, PATHS, ask, body
from support.router_process import RouterProcess, router_process, servers_toml, until

pytestmark = pytest.mark.real


@contextlib.contextmanager
def router(servers: list[RealServer], directory: Path, **settings: Any) -> Iterator[RouterProcess]:
    # Two cores that compute may keep a check waiting for a second.
    settings = {"health_check_timeout": 5.0, **settings}
    config = servers_toml([server.url for server in servers], capacity=32, **settings)
    with router_process(config, directory) as process:
        try:
            yield process
        finally:
            print(process.text)  # pytest shows it where a test failed


@pytest.fixture(scope="module")
def servers() -> Iterator[list[RealServer]]:
    with real_servers(2, "--max-num-seqs", "2", environment=DEVELOPMENT) as started:
        yield started


def load(server: RealServer) -> int:
    return int(httpx.get(f"{server.url}/load").json()["server_load"])


def total(servers: list[RealServer], metric: str) -> float:
    return sum(server.metric(metric) for server in servers)


def wait_for_tokens(servers: list[RealServer], count: int) -> None:
    wanted = total(servers, "vllm:generation_tokens_total") + count
    until(lambda: total(servers, "vllm:generation_tokens_total") >= wanted, "tokens")


def in_flight(process: RouterProcess, server: RealServer) -> int:
    return int(process.servers()[server.url]["in_flight"])


def test_real_opened_requests_survive_server_death(servers: list[RealServer], tmp_path: Path):
    """A paused server sends heads and opening events, and nothing else; then it is killed."""
    victim = servers[0]
    httpx.post(f"{victim.url}/pause")
    try:
        with router(servers, tmp_path) as process, ThreadPoolExecutor(32) as pool:
            asked = [
                pool.submit(ask, process.url, api, 5, stream=stream, text=f"{api} {number}")
                for number in range(4)
                for api, stream in KINDS
            ]
            until(lambda: in_flight(process, victim) >= len(KINDS), "requests on the paused server")
            victim.kill()
            answers = [future.result(timeout=90) for future in asked]
    finally:
        victim.revive()
    for got in answers:
        assert (got.status, got.whole, got.error) == (200, True, ""), got
        assert got.text, got
        if got.stream:
            assert got.body.count(ENDS[got.api]) == 1
            assert got.body.count(b"event: response.created") == (got.api == "responses")
            assert got.body.count(b"event: message_start") == (got.api == "messages")
            assert got.body.count(b'"role":"assistant","content":""') == (got.api == "chat")
    assert {got.headers["x-vllm-router-attempts"] for got in answers} == {"1", "2"}


def test_real_queue_of_stopping_server_is_answered_elsewhere(
    servers: list[RealServer], tmp_path: Path
):
    """In all three ways in which vLLM may end: aborts, errors or silence.

    The engine is paused, so that the queue exists for as long as the test needs it.
    """
    victim = servers[0]
    httpx.post(f"{victim.url}/pause?mode=keep")
    try:
        with (
            router(servers, tmp_path, idle_timeout=5, policy="round_robin") as process,
            ThreadPoolExecutor(16) as pool,
        ):
            asked = [
                pool.submit(ask, process.url, api, 5, stream=stream, text=f"{api} {number}")
                for number in range(2)
                for api, stream in KINDS
            ]
            until(lambda: load(victim) >= len(KINDS), "requests in the queue of one server")
            victim.terminate()
            answers = [future.result(timeout=90) for future in asked]
    finally:
        victim.revive()
    for got in answers:
        assert (got.status, got.whole, got.error) == (200, True, ""), got
        assert got.text, got
        assert not got.aborted
    assert "2" in {got.headers["x-vllm-router-attempts"] for got in answers}


def test_real_abort_with_tokens_passes_uncounted(servers: list[RealServer], tmp_path: Path):
    """Clients that want partial responses get them, once, and no server is counted as failing."""
    begun = threading.Semaphore(0)
    with router(servers, tmp_path) as process, ThreadPoolExecutor(8) as pool:
        for api in PATHS:
            before = total(servers, "vllm:request_success_total")
            asked = [
                pool.submit(ask, process.url, api, 1900, stream=stream, begun=begun)
                for stream in (True, False)
            ]
            assert begun.acquire(timeout=60)
            until(lambda: sum(map(load, servers)) == 2, "both answers in progress")
            wait_for_tokens(servers, 50)
            for server in servers:
                httpx.post(f"{server.url}/abort_requests", json={})
            for got in [future.result(timeout=90) for future in asked]:
                assert (got.status, got.whole, got.error) == (200, True, ""), got
                assert got.text, got
                assert got.headers["x-vllm-router-attempts"] == "1"
                assert got.aborted == (api != "responses"), got
                if got.stream:
                    assert got.body.count(ENDS[api]) == 1
                    assert b'"error"' not in got.body
            until(lambda: sum(map(load, servers)) == 0, "the end of both")
            after = total(servers, "vllm:request_success_total")
            assert after - before <= 2
        assert {each["state"] for each in process.servers().values()} == {"up"}


def json_bodies(model: str) -> dict[str, bytes]:
    text = json.dumps(body("chat", 2, stream=False) | {"model": model})
    plus = text[:-1]
    return {
        "plain": text.encode(),
        "byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "UTF-16": text.encode("utf-16"),
        "UTF-16LE": text.encode("utf-16-le"),
        "UTF-16BE": text.encode("utf-16-be"),
        "UTF-32": text.encode("utf-32"),
        "NaN": (plus + ', "x": NaN}').encode(),
        "Infinity": (plus + ', "x": [-Infinity]}').encode(),
        "lone surrogate": (plus + r', "x": "\ud800"}').encode(),
        "surrogate bytes": plus.encode() + b', "user": "\xed\xa0\x80"}',
        "beyond a double": (plus + ', "x": 1e400}').encode(),
        "long integer": (plus + f', "x": {"9" * 4000}' + "}").encode(),
        "last of two models": b'{"model": "nope", ' + text[1:].encode(),
        "escaped key": text.replace('"model"', r'"\u006dodel"').encode(),
        "capitals": (plus + ', "MODEL": "nope"}').encode(),
        "deep": (plus + f', "x": {"[" * 500}{"]" * 500}' + "}").encode(),
    }


@pytest.fixture(scope="module")
def aliased(
    servers: list[RealServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RouterProcess]:
    """A router whose clients say `small` for the model."""
    config = servers_toml([server.url for server in servers], capacity=32)
    config += f'[models]\nsmall = "{MODEL}"\n'
    with router_process(config, tmp_path_factory.mktemp("aliased")) as process:
        yield process


@pytest.mark.parametrize("case", json_bodies(""))
def test_real_json_that_vllm_reads_is_read(
    servers: list[RealServer], aliased: RouterProcess, case: str
):
    """The alias is applied, which proves that the model was read."""
    headers = {"content-type": "application/json"}
    path = "/v1/chat/completions"
    with httpx.Client(timeout=60) as client:
        direct = client.post(
            f"{servers[0].url}{path}", content=json_bodies(MODEL)[case], headers=headers
        )
        through = client.post(
            f"{aliased.url}{path}", content=json_bodies("small")[case], headers=headers
        )
    assert (direct.status_code, through.status_code) == (200, 200), through.text
    assert through.json()["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    "sent",
    [
        b'{"model": "small", "messages": [{"role": "user", "content": "gr\xfcn"}]}',
        b'{"model": "small", "messages": [], }',
        b'{"model": "small"} x',
        b"\xff\xfe\xfd",
    ],
)
def test_real_json_that_vllm_refuses_is_400(
    servers: list[RealServer], aliased: RouterProcess, sent: bytes
):
    headers = {"content-type": "application/json"}
    path = "/v1/chat/completions"
    with httpx.Client(timeout=60) as client:
        direct = client.post(f"{servers[0].url}{path}", content=sent, headers=headers)
        through = client.post(f"{aliased.url}{path}", content=sent, headers=headers)
    assert (direct.status_code, through.status_code) == (400, 400)
    said = through.json()
    assert said.get("detail") or said["error"]["message"]


def test_real_conversation_leaves_server_paused_directly(servers: list[RealServer], tmp_path: Path):
    """The first client that disconnects without a byte is the evidence.

    Later requests are answered, including the probation request: after 5 s without a token it is
    retried elsewhere.
    """
    paused = servers[0]
    httpx.post(f"{paused.url}/pause")
    try:
        with router(servers, tmp_path, policy="round_robin") as process:
            left = [
                got
                for _ in range(3)
                if not (got := ask(process.url, "chat", 3, stream=True, timeout=4.0)).whole
            ]
            assert len(left) == 1
            assert process.state(paused.url) == "silent"
            for number in range(12):
                got = ask(process.url, "chat", 3, stream=number % 2 == 0, timeout=30.0)
                assert got.whole, got.error
                assert got.text
            httpx.post(f"{paused.url}/resume")
            until(
                lambda: (
                    ask(process.url, "chat", 3, stream=False).whole
                    and process.state(paused.url) == "up"
                ),
                "the server that goes on",
                60,
            )
    finally:
        httpx.post(f"{paused.url}/resume")


def test_real_server_paused_through_router_gets_no_request(
    servers: list[RealServer], tmp_path: Path
):
    paused = servers[0]
    with router(servers, tmp_path, allow_engine_control=True) as process:
        name = process.servers()[paused.url]["name"]
        try:
            assert process.administrate("POST", f"/pause?server={name}").status_code == 200
            assert process.state(paused.url) == "paused"
            for number in range(10):
                got = ask(process.url, "chat", 3, stream=number % 2 == 0, timeout=20.0)
                assert (got.whole, got.headers["x-vllm-router-attempts"]) == (True, "1"), got
        finally:
            assert process.administrate("POST", f"/resume?server={name}").status_code == 200
        until(lambda: process.state(paused.url) == "up", "the server that goes on")
