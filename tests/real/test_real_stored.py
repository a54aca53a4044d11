"""Stored responses of real vLLM servers through the router.

VLLM_LAB=/path/to/start.sh scripts/test -m real
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from real.lab import DEVELOPMENT, MODEL, RealServer, real_servers
from support.lazy_import import LazyImport
from support.router_process import router_process, servers_toml, until

openai = LazyImport("openai")

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def servers() -> Iterator[list[RealServer]]:
    with real_servers(2, environment=DEVELOPMENT) as started:
        yield started


@pytest.fixture(scope="module", params=[(), ("--workers", "2")], ids=["one", "workers"])
def client(
    request: pytest.FixtureRequest,
    servers: list[RealServer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[openai.OpenAI]:
    urls = [server.url for server in servers]
    config = servers_toml(urls, capacity=8, health_check_timeout=10.0, policy="round_robin")
    with router_process(config, tmp_path_factory.mktemp("stored"), *request.param) as router:
        url = f"{router.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client


def test_real_stored_conversations_of_two_turns_all_succeed(client: openai.OpenAI) -> None:
    def converse(number: int) -> None:
        first = client.responses.create(model=MODEL, input=f"hello {number}", max_output_tokens=3)
        second = client.responses.create(
            model=MODEL, input="and?", previous_response_id=first.id, max_output_tokens=3
        )
        assert second.previous_response_id == first.id
        for one in (first, second):
            assert client.responses.retrieve(one.id).output_text == one.output_text

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(converse, range(100)))


def test_real_stored_stream_is_continued(client: openai.OpenAI) -> None:
    for _ in range(6):
        events = list(
            client.responses.create(model=MODEL, input="hi", max_output_tokens=3, stream=True)
        )
        first = events[0].response.id  # type: ignore[union-attr]
        assert client.responses.create(
            model=MODEL, input="and?", previous_response_id=first, max_output_tokens=3
        ).output


def test_real_background_response_is_retrieved_and_cancelled(client: openai.OpenAI) -> None:
    for number in range(6):
        short = client.responses.create(
            model=MODEL, input=f"b {number}", background=True, max_output_tokens=3
        )
        long = client.responses.create(
            model=MODEL, input=f"c {number}", background=True, max_output_tokens=1900
        )
        assert client.responses.cancel(long.id).status == "cancelled"
        assert client.responses.retrieve(long.id).status == "cancelled"
        until(
            lambda short=short: client.responses.retrieve(short.id).status == "incomplete",  # type: ignore[misc]
            "the result",
        )


def test_real_response_unknown_everywhere_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.retrieve("resp_none")
    assert caught.value.code == "response_not_found"
