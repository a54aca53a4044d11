"""Routers that share state through a real Redis, and what happens to requests without it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import pytest
import trio

from support.cli_process import call
from support.load import Load
from support.mock_process import mock_processes
from support.redis_process import RedisProcess, redis_process
from support.router_process import RouterProcess, chat, servers_toml, until

LONG = "The same long beginning of a conversation. " * 200
MOCK = ("--model", "m", "--ttft", "0", "--token-delay", "0.05")
KEYS = """
[auth]
keys = [
  { name = "team", key = "sk-team" },
  { name = "two", key = "sk-two", max_concurrent_requests = 2 },
]
"""


class Fleet(NamedTuple):
    redis: RedisProcess
    urls: list[str]
    routers: list[RouterProcess]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A router of one process and one with two workers, before two servers."""
    directory = tmp_path_factory.mktemp("shared")
    with ExitStack() as ending:
        redis = ending.enter_context(redis_process(directory))
        (mock,) = ending.enter_context(mock_processes(1, *MOCK, "--count", "2"))
        urls = mock.urls(2)
        routers = []
        for name, arguments in (("one", ()), ("two", ("--workers", "2"))):
            table = f'[shared]\nurl = "{redis.url}"\nname = "{name}"\n'
            config = servers_toml(urls, capacity=8) + KEYS + table
            file = directory / f"{name}.toml"
            file.write_text(config)
            routers.append(RouterProcess(file, *arguments))
            ending.callback(routers[-1].close)
        for router in routers:
            router.wait_ready()
        for router in routers:
            until(metric(router, "routers", 2), "all routers to hear of each other")
        yield Fleet(redis, urls, routers)
        for router in routers:
            assert "Traceback" not in router.text, router.text


def metric(router: RouterProcess, name: str, value: float) -> Callable[[], bool]:
    """Whether a metric of the shared state has this value."""
    return lambda: router.metric(f"vllm_router_shared_{name}") == value


def in_state(router: RouterProcess, url: str, state: str) -> Callable[[], bool]:
    return lambda: router.state(url) == state


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def knows(router: RouterProcess, server: str) -> bool:
    """Whether the router expects the long prompt in the cache of a server."""
    found = router.post("/explain", chat(text=LONG), headers=bearer("sk-team")).json()
    parts = {one["server"]: one["parts"] for one in found["candidates"]}
    return parts[server]["cached_tokens"] > 1000


def test_shared_routers_are_shown_by_each_other(shared: Fleet) -> None:
    for router, name in zip(shared.routers, ("two", "one"), strict=True):
        state = router.get("/health").json()["shared"]
        (other,) = state["routers"]
        assert (state["up"], state["store"]) == (True, shared.redis.url)
        assert (other["name"], other["live"], other["same_configuration"]) == (name, True, True)
    shown = call("status", shared.routers[0].url).stdout
    assert re.search(r"^two +shares ", shown, re.MULTILINE), shown


def test_shared_prompts_are_known_to_all_routers(shared: Fleet) -> None:
    answer = shared.routers[0].post(
        "/v1/chat/completions", chat(text=LONG), headers=bearer("sk-team")
    )
    assert answer.status_code == 200
    server = answer.headers["x-vllm-router-server"]
    for router in shared.routers[1:]:
        until(partial(knows, router, server), "the prompt at another router")


def test_shared_drain_is_followed_by_all_routers(shared: Fleet) -> None:
    _, urls, routers = shared
    url, name = urls[0], urls[0].partition("://")[2]
    for number, order in enumerate(("drain", "undrain")):
        done = routers[number].administrate("POST", f"/admin/servers/{name}/{order}")
        assert done.status_code == 200
        wanted = "draining" if order == "drain" else "up"
        for router in routers:
            until(in_state(router, url, wanted), f"the {order} everywhere")


def test_shared_key_limit_holds_for_all_routers(shared: Fleet) -> None:
    slow, quick = chat(max_tokens=2000, stream=True), chat(max_tokens=1)
    with ExitStack() as ending:
        client = ending.enter_context(shared.routers[0].client())
        for _ in range(2):
            stream = client.stream(
                "POST", "/v1/chat/completions", json=slow, headers=bearer("sk-two")
            )
            assert ending.enter_context(stream).status_code == 200
        for router in shared.routers[1:]:
            # Without the other router's requests this key could never be at its limit here.
            until(partial(refused, router, quick), "the limit at another router")
    until(lambda: not refused(shared.routers[1], quick), "the end of both requests")


def refused(router: RouterProcess, body: dict[str, object]) -> bool:
    answer = router.post("/v1/chat/completions", body, headers=bearer("sk-two"))
    if answer.status_code == 200:
        return False
    assert answer.json()["error"]["code"] == "key_concurrency_exceeded", answer.text
    return True


async def test_shared_redis_frozen_and_killed_fails_no_request(shared: Fleet) -> None:
    redis, urls, routers = shared

    async def wait(name: str, value: float) -> None:
        for router in routers:
            await trio.to_thread.run_sync(until, metric(router, name, value), f"{name} {value}")

    body = chat(max_tokens=4, stream=True)
    async with (
        Load(routers[0].url, body, 2, pause=0.01, headers=bearer("sk-team")) as one,
        Load(routers[1].url, body, 2, pause=0.01, headers=bearer("sk-team")) as two,
    ):
        redis.freeze()
        await wait("up", 0)
        await one.wait_for(10)
        await two.wait_for(10)
        redis.thaw()
        await wait("up", 1)
        redis.kill()
        await wait("up", 0)
        await one.wait_for(10)
        await two.wait_for(10)
        name = urls[1].partition("://")[2]
        routers[0].administrate("POST", f"/admin/servers/{name}/drain")
        await trio.to_thread.run_sync(redis.restart)
        await wait("up", 1)
        await wait("routers", 2)
        for router in routers[1:]:
            await trio.to_thread.run_sync(until, in_state(router, urls[1], "draining"), "the drain")
        await one.wait_for(10)
        await two.wait_for(10)
    assert one.bad() == two.bad() == []
    for router in routers:
        router.wait_for_text("shared state is down")
        router.wait_for_text("shared state is up")
    routers[0].administrate("POST", f"/admin/servers/{name}/undrain")
