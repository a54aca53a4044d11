"""A large fleet: 200 simulated servers in one process, and a router before them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.mock_process import mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml, until

COUNT = 200
FAST = ("--model", "m", "--ttft", "0", "--token-delay", "0")


class Large:
    """A router that is ready, and the URLs of its servers."""

    def __init__(self, router: RouterProcess, urls: list[str]) -> None:
        self.router, self.urls = router, urls


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    with mock_processes(1, "--count", str(COUNT), *FAST) as (mock,):
        urls = mock.urls(COUNT)
        # Idle servers are asked every 20 seconds: none of the tests waits for that.
        config = servers_toml(urls, idle_probes_per_second=10)
        with router_process(config, tmp_path_factory.mktemp("many")) as router:
            yield Large(router, urls)


def test_many_servers_are_all_up_and_take_requests(large: Large):
    router = large.router
    assert len(set(large.urls)) == COUNT
    until(lambda: router.get("/health").json()["healthy_servers"] == COUNT, "all servers")

    def ask(number: int) -> str:
        answer = router.post("/v1/chat/completions", chat(text=f"{number}"))
        assert answer.status_code == 200
        return answer.headers["x-vllm-router-server"]

    with ThreadPoolExecutor(8) as threads:
        used = set(threads.map(ask, range(60)))
    assert len(used) > 10


def test_many_servers_are_on_every_page(large: Large):
    router = large.router
    explained = router.get("/explain?model=m").json()
    assert len(explained["candidates"]) == COUNT
    assert explained["picked"] in {one["server"] for one in explained["candidates"]}
    lines = router.get("/metrics").text.splitlines()
    assert sum(line.startswith("vllm_router_server_up{") for line in lines) == COUNT
    assert len(router.servers()) == COUNT
