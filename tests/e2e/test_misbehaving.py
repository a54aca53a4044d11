"""Real processes that reproduce observed faults of vLLM servers, under load."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trio

from support.load import Load, burst
from support.mock_process import MockProcess, mock_processes, restarted
from support.router_process import RouterProcess, chat, router_process, servers_toml, until

MOCK = ("--model", "m", "--ttft", "0.02", "--token-delay", "0.01")
PATH = "/v1/chat/completions"


def name_of(mock: MockProcess) -> str:
    return mock.url.removeprefix("http://")


async def becomes(router: RouterProcess, mock: MockProcess, *states: str) -> None:
    await trio.to_thread.run_sync(
        until, lambda: router.state(mock.url) in states, f"{mock.url} to be {' or '.join(states)}"
    )


async def test_sleeping_server_is_left_and_taken_back_on_wake(tmp_path):
    with (
        mock_processes(3, *MOCK) as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path) as router,
    ):
        async with Load(router.url, chat(max_tokens=10), 20) as load:
            await load.wait_for(40)
            mocks[0].post("/sleep?level=1")
            await becomes(router, mocks[0], "asleep")
            await load.wait_for(40)
            mark = len(load.results)
            await load.wait_for(40)
            assert name_of(mocks[0]) not in {r.server for r in load.results[mark:]}
            mocks[0].post("/wake_up")
            await becomes(router, mocks[0], "up")
            await load.wait_for(40)
        assert load.bad() == []


@pytest.mark.parametrize("how", [404, "hang"])
async def test_server_without_metrics_serves_its_share(tmp_path, how):
    with (
        mock_processes(2, *MOCK) as mocks,
        router_process(
            servers_toml((m.url for m in mocks), health_check_timeout=2), tmp_path
        ) as router,
    ):
        mocks[0].set(metrics=how)
        stale = lambda: not router.servers()[mocks[0].url]["metrics_fresh"]  # noqa: E731
        await trio.to_thread.run_sync(until, stale, "its figures to be old")
        async with Load(router.url, chat(max_tokens=10), 10) as load:
            await load.wait_for(150)
        assert load.bad() == []
        served = Counter(result.server for result in load.results)
        assert 0.1 < served[name_of(mocks[0])] / served.total() < 0.9
        assert router.state(mocks[0].url) == "up"
        transitions = router.metric("vllm_router_server_transitions_total")
        assert transitions == 2


async def test_server_failing_inference_with_good_health_is_left(tmp_path):
    config = lambda mocks: servers_toml((m.url for m in mocks), first_byte_timeout=3)  # noqa: E731
    with (
        mock_processes(3, *MOCK) as mocks,
        router_process(config(mocks), tmp_path) as router,
    ):
        async with Load(router.url, chat(max_tokens=10), 12, pause=0.01) as load:
            await load.wait_for(30)
            mocks[0].set(mode="hang")
            await becomes(router, mocks[0], "silent", "ejected")
            stuck = len(load.bad())
            await load.wait_for(150)
            trials = len(load.bad()) - stuck
            mocks[0].set(mode="ok")
            await becomes(router, mocks[0], "up")
            up = time.monotonic()
            await load.wait_for(60)
        # Requests that hung on it get 504: how far the server has come is unknown.
        assert {(result.status, result.ended) for result in load.bad()} == {(504, "done")}
        # Each client may be there when it begins to hang; later only the trials are.
        assert stuck <= 12
        assert stuck + trials <= 24
        # A trial from before its return may still hang.
        assert [result for result in load.bad() if result.began > up] == []


async def test_half_of_fleet_down_fails_no_request(tmp_path):
    with (
        mock_processes(4, *MOCK) as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path) as router,
    ):
        async with Load(router.url, chat(max_tokens=20), 40) as load:
            await load.wait_for(80)
            for mock in mocks[:2]:
                mock.process.send_signal(signal.SIGKILL)
            for mock in mocks[:2]:
                await becomes(router, mock, "down", "ejected")
            await load.wait_for(120)
        lost = [result for result in load.bad() if result.status != 502]
        assert lost == []
        # Only requests that were on both: a request that crashed two servers goes to no third.
        assert len(load.bad()) <= 10


async def test_all_of_fleet_down_recovers(tmp_path):
    with (
        mock_processes(3, *MOCK) as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path) as router,
    ):
        async with Load(router.url, chat(max_tokens=10), 20, pause=0.02) as load:
            await load.wait_for(60)
            for mock in mocks:
                mock.process.send_signal(signal.SIGKILL)
            for mock in mocks:
                await becomes(router, mock, "down")
            down = time.monotonic()
            await load.wait_for(60)
            # A request from before may have been on two servers that were killed: 502.
            assert {r.status for r in load.results if r.began > down} == {503}
            for place, mock in enumerate(mocks):
                mock.close()
                mocks[place] = await trio.to_thread.run_sync(lambda m=mock: restarted(m, *MOCK))
            for mock in mocks:
                await becomes(router, mock, "up")
            await load.wait_for(20)
            mark = len(load.results)
            await load.wait_for(100)
        assert [result for result in load.results[mark:] if not result.ok] == []
        served = Counter(result.server for result in load.results[mark:])
        assert len(served) == 3


@pytest.mark.parametrize("fate", ["abort", "error", "silence"])
async def test_server_sigterm_fails_no_request_in_any_shutdown_mode(tmp_path, fate):
    with (
        mock_processes(3, *MOCK, "--sigterm", fate) as mocks,
        router_process(
            servers_toml((m.url for m in mocks), health_check_timeout=2), tmp_path
        ) as router,
    ):
        async with Load(router.url, chat(max_tokens=30), 20) as load:
            await load.wait_for(40)
            mocks[1].terminate()
            await becomes(router, mocks[1], "down", "ejected")
            await load.wait_for(80)
        assert load.bad() == []


async def test_server_in_shutdown_grace_is_no_sinkhole(tmp_path):
    with (
        mock_processes(3, *MOCK, "--shutdown-timeout", "20") as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path) as router,
    ):
        async with Load(router.url, chat(max_tokens=10), 20) as load:
            await load.wait_for(40)
            mocks[0].terminate()
            await becomes(router, mocks[0], "ejected")
            await load.wait_for(200)
        assert load.bad() == []


async def test_streams_ended_before_first_token_are_retried(tmp_path):
    with (
        mock_processes(3, *MOCK) as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path) as router,
    ):
        mocks[0].set(mode="no_token")
        results = await burst(router.url, chat(stream=True, max_tokens=5), 30)
        assert all(result.ok for result in results)
        assert {result.text.count('"finish_reason":"length"') for result in results} == {1}
        assert router.metric("vllm_router_retries_total", reason="empty_answer") > 0
        await becomes(router, mocks[0], "ejected")


async def test_trickling_response_is_no_failure(tmp_path):
    with (
        mock_processes(2, *MOCK) as mocks,
        router_process(servers_toml((m.url for m in mocks), idle_timeout=5), tmp_path) as router,
    ):
        for mock in mocks:
            mock.set(mode="trickle", trickle_ms=2)
        for stream in (True, False):
            results = await burst(router.url, chat(stream=stream, max_tokens=3), 2)
            assert all(result.ok for result in results)
            assert min(result.seconds for result in results) > 0.3
        assert {server["state"] for server in router.servers().values()} == {"up"}


async def test_errors_of_one_client_eject_no_server(tmp_path):
    with (
        mock_processes(2, *MOCK) as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path) as router,
    ):
        for mock in mocks:
            mock.set(mode=500, only_body="breaks the tokenizer")
        bad = await burst(router.url, chat(text="breaks the tokenizer"), 60)
        assert {result.status for result in bad} == {500}
        assert {server["state"] for server in router.servers().values()} == {"up"}
        good = await burst(router.url, chat(), 10)
        assert all(result.ok for result in good)


# -- what the operator's guide promises ----------------------------------------------------------


@pytest.mark.parametrize("fate", ["killed", "stopped", "error event"])
def test_guide_client_gets_whole_answer_after_broken_stream(tmp_path, fate):
    guide = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    (code,) = re.findall(r"^```python\n(import openai.*?)^```", guide, re.MULTILINE | re.DOTALL)
    sigterm = "error" if fate == "error event" else "abort"
    with (
        mock_processes(2, *MOCK, "--token-delay", "0.03", "--sigterm", sigterm) as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path) as router,
    ):
        there: dict[str, Any] = {}
        exec(code.replace("http://router:8888", router.url), there)
        asked = []

        def harm() -> None:
            until(lambda: any(mock.stats()["running"] for mock in mocks), "the stream")
            (busy,) = [mock for mock in mocks if mock.stats()["running"]]
            asked.append(busy)
            until(lambda: busy.stats()["generation_tokens"] >= 5, "some tokens")
            busy.kill() if fate == "killed" else busy.terminate()

        thread = threading.Thread(target=harm)
        thread.start()
        with there["client"]:
            text = there["generate"]([{"role": "user", "content": "Hello"}])
        thread.join()
        (other,) = [mock for mock in mocks if mock not in asked]
        assert other.stats()["done"] == 1
        assert text


# -- names ---------------------------------------------------------------------------------------

_SITE = """
import os, socket
_ask = socket.getaddrinfo
def _answer(host, *args, **kwargs):
    if host in ("moving.test", b"moving.test"):
        with open(os.environ["MOVING"]) as file:
            host = file.read()
    return _ask(host, *args, **kwargs)
socket.getaddrinfo = _answer
"""


def moving(directory: Path) -> type[RouterProcess]:
    """A router for which the address of `moving.test` is in the file `address`."""
    (directory / "sitecustomize.py").write_text(_SITE)

    class Router(RouterProcess):
        environment = {  # noqa: RUF012
            "PYTHONPATH": f"{directory}:{Path(__file__).parents[2]}",
            "MOVING": str(directory / "address"),
        }

    return Router


async def test_server_name_that_moves_is_followed(tmp_path):
    with mock_processes(1, *MOCK, "--host", "127.0.0.1") as [old]:
        new = MockProcess(*MOCK, "--host", "127.0.0.2", port=old.port)
        try:
            new.wait()
            (tmp_path / "address").write_text("127.0.0.1")
            config = servers_toml([f"http://moving.test:{old.port}"])
            with router_process(config, tmp_path, kind=moving(tmp_path)) as router:
                assert router.post(PATH, chat()).status_code == 200
                assert (old.stats()["done"], new.stats()["done"]) == (1, 0)
                (tmp_path / "address").write_text("127.0.0.2")
                old.kill()
                until(lambda: router.post(PATH, chat()).status_code == 200, "an answer")
                assert new.stats()["done"] >= 1
                until(
                    lambda: {s["state"] for s in router.servers().values()} == {"up"}, "it to be up"
                )
        finally:
            new.close()
