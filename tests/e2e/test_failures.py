"""Real servers that crash, hang, refuse and return, under real load."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter

import httpx
import pytest
import trio

from support.load import Load, ask, burst
from support.mock_process import mock_processes, restarted
from support.router_process import chat, router_process, servers_toml, until

FRONTS = ["lane", "hypercorn"]
MOCK = ("--model", "m", "--ttft", "0.02", "--token-delay", "0.01")


@pytest.mark.parametrize("front", FRONTS)
async def test_killed_one_of_three_fails_no_unstarted_response(tmp_path, front):
    with (
        mock_processes(3, *MOCK) as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path, "--front", front) as router,
    ):
        async with Load(router.url, chat(max_tokens=30), 50) as load:
            await load.wait_for(100)
            mocks[1].freeze()
            await trio.to_thread.run_sync(
                until, lambda: router.servers()[mocks[1].url]["in_flight"] > 0, "a request on it"
            )
            mocks[1].kill()
            await trio.to_thread.run_sync(
                until, lambda: router.state(mocks[1].url) in ("down", "ejected"), "the ejection"
            )
            await load.wait_for(100)
        assert load.bad() == []
        assert router.metric("vllm_router_retries_total") > 0

        mocks[1].close()
        mocks[1] = restarted(mocks[1], *MOCK)
        until(lambda: router.state(mocks[1].url) == "up", "its return")


async def test_killed_three_of_four_fails_no_unstarted_response(tmp_path):
    with (
        mock_processes(4, *MOCK) as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path) as router,
    ):
        results = []

        async def keep_asking(client: httpx.AsyncClient, number: int) -> None:
            for turn in range(12):
                body = chat(max_tokens=10, text=f"{number}.{turn}")
                results.append(await ask(client, body))

        async with httpx_client(router.url) as client, trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(keep_asking, client, number)
            while len(results) < 60:
                await trio.sleep(0.01)
            for mock in mocks[:3]:
                mock.kill()
        assert [result for result in results if not result.ok] == []
        assert {result.server for result in results[-20:]} == {mocks[3].url.removeprefix("http://")}


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
@pytest.mark.parametrize("front", FRONTS)
async def test_killed_server_streams_end_with_one_error_event(tmp_path, front, http2):
    with (
        mock_processes(3, "--model", "m", "--token-delay", "0.03") as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path, "--front", front) as router,
    ):
        results = []
        async with trio.open_nursery() as nursery:

            async def streams() -> None:
                body = chat(stream=True, max_tokens=100)
                results.extend(await burst(router.url, body, 30, http2=http2))

            nursery.start_soon(streams)
            while mocks[0].stats()["generation_tokens"] < 30:
                await trio.sleep(0.01)
            mocks[0].kill()
        doomed = mocks[0].url.removeprefix("http://")
        lost = [result for result in results if result.ended == "error event"]
        assert lost
        assert {result.server for result in lost} == {doomed}
        assert Counter(result.ended for result in results)["done"] == 30 - len(lost)
        for result in results:
            if result.ended == "error event":
                assert result.text.count('"upstream_error"') == 1
                assert "[DONE]" not in result.text
                assert result.text.endswith("}\n\n")


async def test_frozen_server_is_taken_out_and_taken_back(tmp_path):
    config_of = lambda mocks: servers_toml(  # noqa: E731
        (m.url for m in mocks), first_byte_timeout=30, health_check_timeout=2
    )
    with (
        mock_processes(3, *MOCK) as mocks,
        router_process(config_of(mocks), tmp_path) as router,
    ):
        async with Load(router.url, chat(max_tokens=30), 30) as load:
            await load.wait_for(60)
            mocks[2].freeze()
            await trio.to_thread.run_sync(
                until, lambda: router.state(mocks[2].url) == "down", "the frozen server's fall"
            )
            await load.wait_for(60)
            before = len(load.results)
            await load.wait_for(60)
            names = Counter(result.server for result in load.results[before:])
            assert len(names) == 2
            mocks[2].thaw()
            await trio.to_thread.run_sync(
                until, lambda: router.state(mocks[2].url) == "up", "its return"
            )
            await load.wait_for(150)
        assert load.bad() == []


async def test_client_error_storm_ejects_no_server(tmp_path):
    with (
        mock_processes(2, *MOCK) as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path) as router,
    ):
        bad = {"model": "m", "messages": "not a list"}
        results = await burst(router.url, bad, 60)
        assert {result.status for result in results} == {400}
        assert {server["state"] for server in router.servers().values()} == {"up"}


async def test_full_server_is_passed_over_and_two_pass_their_503(tmp_path):
    with (
        mock_processes(2, *MOCK) as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path) as router,
    ):
        mocks[0].set(mode=503)
        results = await burst(router.url, chat(), 20)
        assert all(result.ok for result in results)
        assert router.state(mocks[0].url) in ("full", "up")

        mocks[1].set(mode=503)
        answer = router.post("/v1/chat/completions", chat())
        assert answer.status_code == 503
        assert "x-vllm-router-error" not in answer.headers
        assert answer.headers["x-vllm-router-attempts"] == "2"

        for mock in mocks:
            mock.set(mode="ok")
        until(lambda: router.post("/v1/chat/completions", chat()).status_code == 200, "an answer")
        assert not [line for line in router.log if "ejected" in line]


async def test_burst_on_idle_servers_spreads_evenly(tmp_path):
    with (
        mock_processes(3, "--model", "m", "--ttft", "3600") as mocks,
        router_process(servers_toml((m.url for m in mocks), capacity=10), tmp_path) as router,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(burst, router.url, chat(max_tokens=1), 30)

            def shares() -> list[int]:
                return [mock.stats()["running"] for mock in mocks]

            await trio.to_thread.run_sync(until, lambda: sum(shares()) == 30, "all of the burst")
            assert shares() == pytest.approx([10, 10, 10], abs=1)
            nursery.cancel_scope.cancel()


async def test_model_on_one_server_is_routed_there(tmp_path):
    with (
        mock_processes(2, *MOCK) as mocks,
        mock_processes(1, *MOCK, "--model", "special") as [special],
        router_process(servers_toml(m.url for m in [*mocks, special]), tmp_path) as router,
    ):
        results = await burst(router.url, chat(model="special"), 20)
        assert all(result.ok for result in results)
        assert {result.server for result in results} == {special.url.removeprefix("http://")}
        ids = {card["id"] for card in router.get("/v1/models").json()["data"]}
        assert ids == {"m", "special"}


async def test_fleet_down_is_reported_at_once_and_recovers(tmp_path):
    with (
        mock_processes(2, *MOCK) as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path) as router,
    ):
        for mock in mocks:
            mock.kill()
        until(lambda: {router.state(m.url) for m in mocks} == {"down"}, "both to be down")
        answer = router.post("/v1/chat/completions", chat())
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "no_server_available"
        mocks[0].close()
        mocks[0] = restarted(mocks[0], *MOCK)
        until(lambda: router.post("/v1/chat/completions", chat()).status_code == 200, "an answer")


@pytest.mark.parametrize("front", FRONTS)
async def test_client_disconnect_frees_server(tmp_path, front):
    with (
        mock_processes(2, "--model", "m", "--token-delay", "0.02") as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path, "--front", front) as router,
    ):
        descriptors = router.descriptors()

        async def leave_after(seconds: float, body: dict, headers: str = "") -> None:
            content = json.dumps(body)
            stream = await trio.open_tcp_stream("127.0.0.1", router.port)
            async with stream:
                await stream.send_all(
                    f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n{headers}"
                    "Content-Type: application/json\r\n"
                    f"Content-Length: {len(content)}\r\n\r\n{content}".encode()
                )
                with trio.move_on_after(seconds):
                    while await stream.receive_some():
                        pass

        slow_head = "x-mock-ttft-ms: 5000\r\n"
        long_ = chat(max_tokens=2000)
        for body, headers in (
            (long_, slow_head),  # waiting for a plain answer
            (long_ | {"stream": True}, slow_head),  # waiting for the first event
            (long_ | {"stream": True}, ""),  # in mid-stream
        ):
            await leave_after(0.3, body, headers)
            # Their responses would take 40 s.
            until(lambda: sum(m.stats()["running"] for m in mocks) == 0, "the engines to be idle")

        async with trio.open_nursery() as nursery:
            for number in range(200):
                body = long_ | {"stream": number % 3 != 0}
                nursery.start_soon(leave_after, 0.004 * number, body)
        until(lambda: sum(m.stats()["running"] for m in mocks) == 0, "the engines to be idle")
        until(lambda: router.metric("vllm_router_requests_in_flight") == 0, "nothing in flight")
        assert {server["in_flight"] for server in router.servers().values()} == {0}
        assert {server["state"] for server in router.servers().values()} == {"up"}
        assert router.metric("vllm_router_client_disconnects_total") >= 200
        until(lambda: router.descriptors() <= descriptors + 6, "the descriptors to be closed")


def httpx_client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=60, trust_env=False)


async def test_sigterm_drains_and_ends_late_streams_with_error(tmp_path):
    config = lambda mocks: servers_toml((m.url for m in mocks), drain_timeout=4)  # noqa: E731
    with (
        mock_processes(2, "--model", "m", "--token-delay", "0.02") as mocks,
        router_process(config(mocks), tmp_path) as router,
    ):
        results = []

        async def stream(tokens: int) -> None:
            async with httpx_client(router.url) as client:
                results.append(await ask(client, chat(stream=True, max_tokens=tokens)))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(stream, 40)
                nursery.start_soon(stream, 2000)
            while sum(m.stats()["running"] for m in mocks) < 10:
                await trio.sleep(0.01)
            router.signal(signal.SIGTERM)
            code = await trio.to_thread.run_sync(router.process.wait, 60)
        assert code == 0
        ended = Counter(result.ended for result in results)
        assert ended == {"done": 5, "error event": 5}
        assert all("router_stopping" in r.text for r in results if r.ended == "error event")


@pytest.mark.parametrize("workers", [(), ("--workers", "2")], ids=["alone", "workers"])
async def test_sigterm_twice_exits_at_once(tmp_path, workers):
    config = lambda mocks: servers_toml((m.url for m in mocks), drain_timeout=300)  # noqa: E731
    with (
        mock_processes(1, "--model", "m", "--token-delay", "0.02") as mocks,
        router_process(config(mocks), tmp_path, *workers) as router,
    ):
        results, begun = [], trio.Event()
        async with trio.open_nursery() as nursery:

            async def stream() -> None:
                async with httpx_client(router.url) as client:
                    body = chat(stream=True, max_tokens=2000)
                    results.append(await ask(client, body, on_chunk=begun.set))

            nursery.start_soon(stream)
            await begun.wait()
            while mocks[0].stats()["running"] < 1:
                await trio.sleep(0.01)
            os.kill(router.process.pid, signal.SIGINT)
            await trio.to_thread.run_sync(
                until, lambda: any("draining" in line for line in router.log), "the drain"
            )
            os.kill(router.process.pid, signal.SIGINT)
            assert await trio.to_thread.run_sync(router.process.wait, 60) == 0
        assert [one.ended for one in results] == ["error event"]
        assert "router_stopping" in results[0].text
        router.wait_for_text("200 stopped")
