"""A router before routers: headers, conversations, and requests that are counted once at each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, chat, servers_toml, until


class Chain(NamedTuple):
    front: RouterProcess
    behind: list[RouterProcess]
    mocks: list[MockProcess]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """One router before two, each of which has a server of its own."""
    directory: Path = tmp_path_factory.mktemp("chain")
    with ExitStack() as ending:
        mocks = ending.enter_context(mock_processes(2, "--model", "m", "--ttft", "0"))

        def start(name: str, *urls: str) -> RouterProcess:
            file = directory / f"{name}.toml"
            file.write_text(servers_toml(urls, capacity=8))
            router = RouterProcess(file)
            ending.callback(router.close)
            return router

        behind = [start(f"behind-{number}", mock.url) for number, mock in enumerate(mocks)]
        for router in behind:
            router.wait_ready()
        front = start("front", *(router.url for router in behind))
        front.wait_ready()
        yield Chain(front, behind, mocks)
        for router in (front, *behind):
            assert "Traceback" not in router.text, router.text


def test_chain_passes_the_request_id_and_names_each_router_once(chain: Chain) -> None:
    answer = chain.front.post(
        "/v1/chat/completions", chat(max_tokens=1), headers={"x-request-id": "chain-1"}
    )
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "chain-1"
    named = answer.headers.get_list("x-vllm-router-server")
    assert named in [[router.url.partition("://")[2]] for router in chain.behind]
    served = next(mock for mock in chain.mocks if mock.stats()["total"])
    headers = dict(served.last()["headers"])
    assert headers["x-request-id"] == "chain-1"
    assert headers["via"] == "1.1 vllm-router, 1.1 vllm-router"


def test_chain_keeps_conversations_and_counts_each_request_once(chain: Chain) -> None:
    before = sum(mock.stats()["total"] for mock in chain.mocks)
    routers = (chain.front, *chain.behind)
    counted = [router.metric("vllm_router_requests_total") for router in routers]
    with chain.front.client() as client:
        for session in range(6):
            servers = set()
            for _ in range(3):
                answer = client.post(
                    "/v1/chat/completions",
                    json=chat(max_tokens=1, text=f"conversation {session} " * 300),
                )
                assert answer.status_code == 200
                servers.add(answer.headers["x-vllm-router-server"])
            assert len(servers) == 1
    assert sum(mock.stats()["total"] for mock in chain.mocks) - before == 18

    def more(routers: list[RouterProcess], since: float) -> bool:
        return sum(one.metric("vllm_router_requests_total") for one in routers) - since == 18

    until(partial(more, [chain.front], counted[0]), "the requests of the first router")
    until(partial(more, chain.behind, sum(counted[1:])), "the requests of the other routers")
