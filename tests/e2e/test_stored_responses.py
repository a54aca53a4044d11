"""Stored responses with the SDK of OpenAI: conversations, background requests, cancellation."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from support.lazy_import import LazyImport
from support.mock_process import MockProcess, mock_processes
from support.router_process import router_process, servers_toml, until

openai = LazyImport("openai")

SERVERS = ("--enable-responses-api-store", "--token-delay", "0.001", "--ttft", "0")
FRONTS = {
    "lane": (("--front", "lane"), 25),
    "hypercorn": (("--front", "hypercorn"), 25),
    "workers": (("--workers", "2"), 100),
}
"""The arguments, and the number of conversations."""

Running = tuple[Any, int]
"""A client of a running router, and the number of conversations."""


@pytest.fixture(scope="module")
def mocks() -> Iterator[list[MockProcess]]:
    with mock_processes(3, "--model", "m", *SERVERS) as processes:
        yield processes


@pytest.fixture(scope="module", params=FRONTS)
def routed(
    request: pytest.FixtureRequest,
    mocks: list[MockProcess],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    arguments, count = FRONTS[request.param]
    config = servers_toml([mock.url for mock in mocks], policy="round_robin")
    with router_process(config, tmp_path_factory.mktemp("stored"), *arguments) as router:
        url = f"{router.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            yield client, count


def test_stored_conversations_of_two_turns_all_succeed(routed: Running) -> None:
    client, count = routed

    def converse(number: int) -> None:
        streamed = number % 2 == 1
        if streamed:
            events = list(
                client.responses.create(
                    model="m", input=f"hello {number}", max_output_tokens=3, stream=True
                )
            )
            first = events[0].response.id  # type: ignore[union-attr]
        else:
            first = client.responses.create(
                model="m", input=f"hello {number}", max_output_tokens=3
            ).id
        second = client.responses.create(
            model="m", input="and?", previous_response_id=first, max_output_tokens=3
        )
        assert second.previous_response_id == first
        assert client.responses.retrieve(second.id).output_text == second.output_text

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(converse, range(count)))


def test_stored_background_response_is_retrieved(routed: Running) -> None:
    client = routed[0]
    started = [
        client.responses.create(model="m", input=f"b {n}", background=True, max_output_tokens=5)
        for n in range(6)
    ]
    assert {one.status for one in started} == {"queued"}
    for one in started:
        until(
            lambda one=one: client.responses.retrieve(one.id).status == "incomplete",  # type: ignore[misc]
            "the result",
        )
    stream = client.responses.create(
        model="m", input="b", background=True, stream=True, max_output_tokens=5
    )
    events = list(stream)
    identifier = events[0].response.id  # type: ignore[union-attr]
    again = list(client.responses.retrieve(identifier, stream=True, starting_after=1))
    assert [event.type for event in again] == [event.type for event in events[2:]]


def test_stored_background_response_is_cancelled(routed: Running, mocks: list[MockProcess]) -> None:
    client = routed[0]
    started = [
        client.responses.create(
            model="m", input=f"c {n}", background=True, max_output_tokens=30_000
        )
        for n in range(6)
    ]
    for one in started:
        assert client.responses.cancel(one.id).status == "cancelled"
        assert client.responses.retrieve(one.id).status == "cancelled"
    until(lambda: sum(mock.get("/mock/stats")["running"] for mock in mocks) == 0, "idle engines")


def test_stored_response_unknown_everywhere_is_404(routed: Running) -> None:
    client = routed[0]
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.retrieve("resp_none")
    assert caught.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="m", input="x", previous_response_id="resp_none")
    assert caught.value.code == "previous_response_not_found"
    assert caught.value.param == "previous_response_id"
