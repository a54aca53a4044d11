"""The demo: its servers' models and answers, and its own traffic."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from random import Random
from typing import Any

import httpx
import pytest
import trio
from trio.testing import MockClock

from vllm_router.config.schema import Settings
from vllm_router.http.request_ids import DEMO_PREFIX, request_id
from vllm_router.lab.demo import DEMO_MODEL, MORE_MODELS, models_of, start_demo
from vllm_router.lab.demo_traffic import AGENTS, FAULT_SECONDS, HEALTHY, DemoTraffic
from vllm_router.lab.mock import MockOptions
from vllm_router.lab.mock.request import Request
from vllm_router.lab.mock.text import tokens_of

ROUTER = "http://router"
SERVERS = ("http://demo-1", "http://demo-2", "http://demo-3")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_demo_models_are_on_two_servers_where_there_are_two(count: int):
    on = Counter(model for number in range(count) for model in models_of(number, count))
    assert on[DEMO_MODEL] == count
    assert all(on[model] >= min(2, count) for model in MORE_MODELS)


@pytest.mark.parametrize("several", [False, True])
async def test_demo_servers_are_listed_and_answer_by_name(several: bool):
    settings = Settings()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery, httpx.AsyncClient() as client:
            config = await start_demo(nursery, 3, settings, several_models=several)
            assert config.settings is settings
            assert [server.name for server in config.servers] == ["demo-1", "demo-2", "demo-3"]
            # The simulated hardware differs, and so does the capacity that goes with it.
            assert len({server.max_concurrent_requests for server in config.servers}) > 1
            models = set()
            for server in config.servers:
                listed = (await client.get(f"{server.url}/v1/models")).json()["data"]
                models.update(card["id"] for card in listed)
            assert models == ({DEMO_MODEL, *MORE_MODELS} if several else {DEMO_MODEL})
            nursery.cancel_scope.cancel()


def test_mock_answer_is_generated_token_by_token():
    text = "Hello, this is a test."
    request = Request(model="m", prompt=b"x", limit=6, answer=tokens_of(text))
    assert b"".join([*request.take(2), *request.take(9)]).decode().rstrip() == text
    assert request.finish_reason == "length"


def test_mock_answer_must_be_ascii():
    with pytest.raises(ValueError, match="answer: expected ASCII"):
        MockOptions(answer="né")


class Fake:
    """The router and its servers; records what they receive."""

    def __init__(self, servers: tuple[str, ...] = SERVERS) -> None:
        self.servers = servers
        self.chats: list[tuple[float, httpx.Headers, dict[str, Any]]] = []
        self.switches: list[tuple[float, str, dict[str, Any]]] = []

    async def answer(self, request: httpx.Request) -> httpx.Response:
        await trio.sleep(1.0)
        if request.url.path == "/health":
            return httpx.Response(200, json={"servers": [{"url": url} for url in self.servers]})
        body = json.loads(request.content)
        if request.url.path == "/mock/set":
            self.switches.append((trio.current_time(), request.url.host, body))
            return httpx.Response(200)
        self.chats.append((trio.current_time(), request.headers, body))
        if len(self.chats) % 50 == 0:
            raise httpx.RemoteProtocolError("the stream was cut")
        return httpx.Response(200, content=b"data: [DONE]\n\n")

    async def run(self, load: float, seconds: float) -> None:
        transport = httpx.MockTransport(self.answer)
        async with httpx.AsyncClient(transport=transport, trust_env=False, verify=False) as client:
            with trio.move_on_after(seconds):
                await DemoTraffic(ROUTER, load, Random(1), client).run()


@pytest.fixture(scope="module")
def lively() -> Fake:
    """Ten minutes of traffic, in virtual time."""
    fake = Fake()
    trio.run(fake.run, 1.0, 600.0, clock=MockClock(autojump_threshold=0))
    return fake


def test_demo_traffic_is_gentle_and_has_every_model(lively: Fake):
    assert 1.5 < len(lively.chats) / 600 < 6
    models = Counter(body["model"] for _, _, body in lively.chats)
    assert set(models) == {DEMO_MODEL, *MORE_MODELS}
    assert max(models, key=lambda model: models[model]) == DEMO_MODEL


def test_demo_traffic_has_bursts(lively: Fake):
    starts = Counter(int(moment) for moment, _, _ in lively.chats)
    assert max(starts.values()) >= 10


def test_demo_traffic_has_conversations_that_grow(lively: Fake):
    turns: dict[str, list[list[Any]]] = {}
    for _, headers, body in lively.chats:
        if "x-session-id" in headers:
            turns.setdefault(headers["x-session-id"], []).append(body["messages"])
    assert len(turns) >= 2 * AGENTS
    for conversation in turns.values():
        for before, after in itertools.pairwise(conversation):
            assert after[: len(before)] == before


def test_demo_traffic_is_recognised_by_its_request_ids(lively: Fake):
    ids = [headers["x-request-id"].encode() for _, headers, _ in lively.chats]
    assert len(set(ids)) == len(ids)
    assert all(given.startswith(DEMO_PREFIX.encode()) for given in ids)
    assert request_id(ids[0]) == ids[0], "the router keeps them"


def test_demo_breaks_one_server_at_a_time_and_mends_it(lively: Fake):
    assert len(lively.switches) >= 6
    breaks, mends = lively.switches[::2], lively.switches[1::2]
    for (broken_at, broken, fault), (mended_at, mended, healthy) in zip(
        breaks, mends, strict=False
    ):
        assert (broken, healthy) == (mended, HEALTHY)
        assert fault.keys() <= HEALTHY.keys()
        assert mended_at - broken_at == pytest.approx(FAULT_SECONDS + 1)


async def test_demo_with_one_server_never_breaks_it(autojump_clock: MockClock):
    fake = Fake(SERVERS[:1])
    await fake.run(1.0, 200.0)
    assert fake.switches == []
