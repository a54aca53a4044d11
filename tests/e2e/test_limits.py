"""Overload against real processes: servers that refuse requests beyond their cap, and real clients.

The servers have no queue: one request more than they can run is answered 503 and counted, so
`rejected` is 0 only if the router has respected their caps.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from support.load import Load, Result, ask, burst
from support.mock_process import MockProcess, mock_processes, restarted
from support.router_process import RouterProcess, chat, router_process, servers_toml, until

FRONTS = ["lane", "hypercorn"]
CAP = 2
MOCK = (
    *("--model", "m", "--ttft", "0.02", "--token-delay", "0.01"),
    *("--max-num-seqs", str(CAP), "--max-num-queued-reqs", "0"),
)
SHORT, LONG = chat(max_tokens=5), chat(max_tokens=20_000)


def with_limits(urls: Any, settings: dict[str, Any] | None = None, **limits: Any) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**ONLY_CAP, **limits}.items()]
    return "\n".join([servers_toml(urls, **(settings or {})), "[limits]", *lines, ""])


ONLY_CAP = {"max_in_flight": CAP}


@contextlib.contextmanager
def fleet(
    directory: Path, count: int = 1, front: str = "lane", **limits: Any
) -> Iterator[tuple[list[MockProcess], RouterProcess]]:
    with mock_processes(count, *MOCK) as mocks:
        # A busy machine must not make a server look down: its running requests would exceed the
        # cap.
        patient = {"health_check_timeout": 10}
        config = with_limits([mock.url for mock in mocks], patient, **limits)
        with router_process(config, directory, "--front", front) as router:
            yield mocks, router


def queued(router: RouterProcess) -> float:
    return router.metric("vllm_router_queue_length")


class Connection:
    """A request whose client can disconnect at any time."""

    def __init__(self, router: RouterProcess, body: dict[str, Any], **headers: str) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", router.port, timeout=60)
        fields = {"content-type": "application/json", **headers}
        self._http.request("POST", "/v1/chat/completions", json.dumps(body), fields)

    def answer(self) -> http.client.HTTPResponse:
        return self._http.getresponse()

    def leave(self) -> None:
        self._http.close()


@contextlib.contextmanager
def occupied(router: RouterProcess, waiting: int = 0) -> Iterator[list[Connection]]:
    """Fill one server and queue `waiting` requests; yields all clients, then disconnects."""
    connections: list[Connection] = []
    try:
        for place in range(CAP + waiting):
            connections.append(Connection(router, LONG))
            if place < CAP:
                until(lambda: router.metric("vllm_router_server_leases") > place, "a place")  # noqa: B023
        until(lambda: queued(router) == waiting, "the queue")
        yield connections
    finally:
        for connection in connections:
            connection.leave()


@pytest.mark.parametrize("front", FRONTS)
async def test_limits_cap_is_never_exceeded(tmp_path, front):
    with fleet(tmp_path, 3, front) as (mocks, router):
        plain = await burst(router.url, SHORT, 60)
        streams = await burst(router.url, chat(max_tokens=5, stream=True), 60)
        assert [result for result in plain + streams if not result.ok] == []
        assert [mock.stats()["rejected"] for mock in mocks] == [0, 0, 0]
        assert min(mock.stats()["done"] for mock in mocks) >= 20
        assert router.metric("vllm_router_queue_wait_seconds_count") >= 60
        assert queued(router) == 0


def test_limits_full_queue_is_429_with_retry_after(tmp_path):
    with fleet(tmp_path, queue_size=2) as (mocks, router):
        with occupied(router, waiting=2):
            got = router.post("/v1/chat/completions", SHORT)
            assert got.status_code == 429
            assert got.headers["x-vllm-router-error"] == "queue_full"
            assert 1 <= int(got.headers["retry-after"]) <= 30
            assert got.json()["error"]["type"] == "rate_limit_error"
            assert mocks[0].stats()["total"] == CAP
        until(lambda: router.metric("vllm_router_requests_in_flight") == 0, "an empty router")
        until(lambda: mocks[0].stats()["running"] == 0, "an idle engine")
        assert router.post("/v1/chat/completions", SHORT).status_code == 200


@pytest.mark.parametrize("front", FRONTS)
def test_limits_client_disconnect_frees_place_in_queue(tmp_path, front):
    with fleet(tmp_path, front=front, queue_size=2) as (mocks, router):
        with occupied(router, waiting=2) as connections:
            connections[-1].leave()
            until(lambda: queued(router) == 1, "its place")
            left = Connection(router, SHORT)
            until(lambda: queued(router) == 2, "the next one")
            left.leave()
            until(lambda: queued(router) == 1, "its place")
            assert router.metric("vllm_router_client_disconnects_total", phase="queue") == 2
        until(lambda: mocks[0].stats()["running"] == 0, "an idle engine")
        assert router.metric("vllm_router_server_leases") == 0


def test_limits_client_deadline_is_kept(tmp_path):
    with fleet(tmp_path) as (mocks, router):
        headers = {"x-request-timeout": "0.5"}
        with occupied(router):
            began = time.monotonic()
            waited = router.post("/v1/chat/completions", SHORT, headers=headers)
            assert time.monotonic() - began >= 0.5
            assert waited.status_code == 504
            assert mocks[0].stats()["total"] == CAP
        until(lambda: mocks[0].stats()["running"] == 0, "an idle engine")
        cut = router.post("/v1/chat/completions", LONG, headers=headers)
        assert (cut.status_code, cut.json()["error"]["code"]) == (504, "total_timeout")
        until(lambda: mocks[0].stats()["running"] == 0, "the end of what was cut")
        bad = router.post("/v1/chat/completions", SHORT, headers={"x-request-timeout": "soon"})
        assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_request_timeout")


def test_limits_priorities_and_keys_decide_order(tmp_path):
    keys = "".join(f'[[auth.keys]]\nname = "{name}"\nkey = "sk-{name}"\n' for name in "ab")
    with mock_processes(1, *MOCK) as mocks:
        config = with_limits([mocks[0].url], max_in_flight=1) + keys
        with router_process(config, tmp_path) as router:

            def send(name: str, number: int, **more: Any) -> Connection:
                before = queued(router)
                body = chat(max_tokens=3, seed=number, **more)
                connection = Connection(router, body, authorization=f"Bearer sk-{name}")
                until(lambda: queued(router) > before, "its place")
                return connection

            first = Connection(router, LONG, authorization="Bearer sk-a")
            until(lambda: router.metric("vllm_router_server_leases") == 1, "the first")
            order = (("a", 1), ("a", 2), ("a", 3), ("b", 4), ("b", 5))
            waiting = [send(name, number) for name, number in order]
            waiting.append(send("a", 6, priority=5))
            waiting.append(send("b", 7, priority=-5))
            first.leave()
            assert [one.answer().status for one in waiting] == [200] * 7
            log = mocks[0].log("/v1/chat/completions")
            seeds = [json.loads(entry["body"]).get("seed") for entry in log]
            assert [seed for seed in seeds if seed] == [7, 1, 4, 2, 5, 3, 6]
            for connection in waiting:
                connection.leave()


async def test_limits_killed_server_loses_no_request_and_exceeds_no_cap(tmp_path):
    with fleet(tmp_path, 3, queue_timeout=20) as (mocks, router):
        async with Load(router.url, SHORT, 30) as load:
            await load.wait_for(60)
            mocks[1].kill()
            await load.wait_for(100)
        assert load.bad() == []
        assert [mocks[n].stats()["rejected"] for n in (0, 2)] == [0, 0]


async def test_limits_requests_wait_while_only_server_restarts(tmp_path):
    with fleet(tmp_path, queue_timeout=30) as (mocks, router):
        mocks[0].kill()
        until(lambda: router.state(mocks[0].url) == "down", "its fall")
        results: list[Result] = []

        async def clients() -> None:
            results.extend(await burst(router.url, SHORT, 20))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(clients)
            await trio.to_thread.run_sync(until, lambda: queued(router) == 20, "the crowd")
            mocks[0].close()
            mocks[0] = await trio.to_thread.run_sync(restarted, mocks[0], *MOCK)
        assert Counter(result.status for result in results) == {200: 20}
        assert mocks[0].stats()["rejected"] == 0


def test_limits_reload_with_higher_cap_admits_waiters(tmp_path):
    with mock_processes(1, "--model", "m") as mocks:
        with router_process(with_limits([mocks[0].url]), tmp_path) as router:
            with occupied(router, waiting=3):
                router.config.write_text(with_limits([mocks[0].url], max_in_flight=4))
                until(lambda: queued(router) == 1, "a raised cap")
                router.config.write_text(servers_toml([mocks[0].url]))
                mocks[0].wait_for(running=CAP + 3)
                assert "vllm_router_queue_limit" not in router.get("/metrics").text


def test_limits_model_removed_ends_wait_with_error(tmp_path):
    with fleet(tmp_path) as (_, router), mock_processes(1, "--model", "n") as new:
        with occupied(router, waiting=2) as connections:
            router.config.write_text(with_limits([new[0].url]))
            answers = [one.answer() for one in connections[CAP:]]
            assert [(one.status, json.load(one)["error"]["code"]) for one in answers] == [
                (404, "model_not_found")
            ] * 2


@pytest.mark.parametrize("front", FRONTS)
async def test_limits_waiters_are_served_while_router_drains(tmp_path, front):
    with fleet(tmp_path, front=front) as (mocks, router):
        results: list[Result] = []

        async def clients() -> None:
            results.extend(await burst(router.url, chat(max_tokens=30), 12))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(clients)
            await trio.to_thread.run_sync(until, lambda: queued(router) == 12 - CAP, "the crowd")
            router.process.terminate()
        assert Counter((result.status, result.ended) for result in results) == {(200, "done"): 12}
        assert await trio.to_thread.run_sync(router.process.wait, 60) == 0
        assert mocks[0].stats()["rejected"] == 0


@pytest.mark.parametrize("front", FRONTS)
async def test_limits_endless_waiters_get_503_when_router_stops(tmp_path, front):
    with mock_processes(1, *MOCK) as mocks:
        config = with_limits([mocks[0].url], {"drain_timeout": 0.5})
        with router_process(config, tmp_path, "--front", front) as router:
            with occupied(router, waiting=2) as connections:
                router.process.terminate()
                answers = [one.answer() for one in connections[CAP:]]
                codes = [json.load(one)["error"]["code"] for one in answers]
                assert codes == ["router_stopping"] * 2
            assert await trio.to_thread.run_sync(router.process.wait, 60) == 0


async def test_limits_crowd_before_full_queue_leaks_nothing(tmp_path):
    with fleet(tmp_path, queue_size=4) as (mocks, router):
        with occupied(router, waiting=4):
            held = router.metric("vllm_router_request_body_bytes_held")
            descriptors = router.descriptors()
            async with httpx.AsyncClient(base_url=router.url, trust_env=False) as client:
                body = chat(max_tokens=1, text="x" * 10_000)
                statuses = Counter([(await ask(client, body)).status for _ in range(300)])
                assert statuses == {429: 300}
            assert router.metric("vllm_router_requests_in_flight") == CAP + 4
            assert router.metric("vllm_router_request_body_bytes_held") == held
            until(lambda: router.descriptors() <= descriptors + 2, "its descriptors")
            assert mocks[0].stats()["total"] == CAP
