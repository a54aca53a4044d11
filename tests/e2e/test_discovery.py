"""Servers are found in Kubernetes while requests run: none fails, whatever happens to the API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio

from support.kubernetes_api import endpoint, served_api, slice_of
from support.load import Load
from support.mock_process import pods
from support.router_process import FAST, RouterProcess, chat, router_process, until

MOCK = ("--model", "m", "--ttft", "0.02", "--token-delay", "0.01")


def toml(api: str) -> str:
    lines = [
        "[discovery]",
        f'kubernetes = {{ api = "{api}", namespace = "ml", service = "vllm", port = "http" }}',
        "defaults = { max_concurrent_requests = 8 }",
        "[config]",
        *(f"{key} = {value}" for key, value in FAST.items()),
        'policy = "least_load"',
    ]
    return "\n".join(lines)


def up(router: RouterProcess, *urls: str) -> Callable[[], bool]:
    """Whether exactly these servers are in the fleet, and up."""
    expected = dict.fromkeys(urls, "up")
    return lambda: {url: one["state"] for url, one in router.servers().items()} == expected


async def wait(condition: Callable[[], bool], what: str) -> None:
    await trio.to_thread.run_sync(until, condition, what)


async def test_kubernetes_any_event_under_load_fails_no_request(tmp_path: Path) -> None:
    with pods(3, *MOCK) as mocks, served_api() as served:
        api, port = served.api, mocks[0].port
        first, second, third = (mock.url for mock in mocks)

        def put(name: str, *endpoints: object) -> None:
            served.do(api.put, slice_of(name, endpoints, port=port))

        put("one", "127.0.0.2", "127.0.0.3")
        with router_process(toml(served.url), tmp_path) as router:
            await wait(up(router, first, second), "the listed servers")
            async with Load(router.url, chat(max_tokens=8, stream=True), 8) as load:
                put("two", "127.0.0.4")
                await wait(up(router, first, second, third), "a new pod")
                stopping = endpoint("127.0.0.2", ready=False, serving=True, terminating=True)
                put("one", stopping, "127.0.0.3")
                await wait(up(router, second, third), "a pod that terminates to leave")
                await load.wait_for(20)
                served.do(api.compact)
                served.do(api.expire)
                put("one", endpoint("127.0.0.2"), endpoint("127.0.0.3", ready=None))
                await wait(up(router, first, second, third), "the list after an expired version")
                served.gone(gone=True)
                await wait(
                    lambda: router.metric("vllm_router_discovery_up", source="kubernetes") == 0,
                    "the lost API to be noticed",
                )
                served.do(api.delete, "one")
                served.gone(gone=False)
                await wait(
                    lambda: router.metric("vllm_router_discovery_doubtful") == 1,
                    "the loss of most pods to be doubted",
                )
                assert up(router, first, second, third)()
                put("one", "127.0.0.2")
                await wait(up(router, first, third), "the right set in the end")
                await load.wait_for(20)
            assert load.bad() == []
            health = router.get("/health").json()
            assert health["sources"][0]["problem"] is None
            assert health["servers"][0]["source"] == "kubernetes"
        # At most one list per 200 ms; a busy machine may deliver two of them closer together.
        assert len(api.lists) <= (api.lists[-1] - api.lists[0]) / 0.2 + 3


async def test_workers_have_one_set_of_found_servers(tmp_path: Path) -> None:
    with pods(2, *MOCK) as mocks, served_api() as served:
        one = slice_of("one", ["127.0.0.2"], port=mocks[0].port)
        served.do(served.api.put, one)
        with router_process(toml(served.url), tmp_path, "--workers", "2") as router:
            await wait(up(router, mocks[0].url), "the first pod")
            two = slice_of("two", ["127.0.0.3"], port=mocks[0].port)
            served.do(served.api.put, two)
            await wait(up(router, *(mock.url for mock in mocks)), "the second pod")
            async with Load(router.url, chat(max_tokens=2), 8) as load:
                await wait(lambda: len({one.server for one in load.results}) == 2, "both in use")
                served.do(served.api.delete, "one")
                await wait(up(router, mocks[1].url), "the first pod to leave")
                await load.wait_for(20)
            assert load.bad() == []
