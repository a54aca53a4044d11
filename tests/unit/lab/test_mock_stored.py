"""Stored responses of the simulated server: conversations, background requests, cancellation."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from support.mock_memory import Answer, Client, Mock, running_mock

PATH = "/v1/responses"
BODY: dict[str, Any] = {"model": "tiny", "input": "Hello", "max_output_tokens": 4}


async def respond(mock: Mock, **more: Any) -> Answer:
    return await mock.ask("POST", PATH, {**BODY, **more})


async def retrieve(mock: Mock, identity: str, query: str = "") -> Answer:
    return await mock.ask("GET", f"{PATH}/{identity}{query}")


async def background_stream(mock: Mock) -> tuple[Client, Answer]:
    """A client of a background stream that has got the first event."""
    client = await mock.client()
    await client.send("POST", PATH, {**BODY, "background": True, "stream": True})
    started = await client.head()
    await client.chunk(started)
    return client, started


def kinds(answer: Answer) -> list[str]:
    return [event["type"] for event in answer.events if isinstance(event, dict)]


async def test_mock_stored_response_is_retrieved_and_continued(autojump_clock):
    async with running_mock(enable_responses_api_store=True) as mock:
        first = (await respond(mock)).json
        assert (await retrieve(mock, first["id"])).json["output"] == first["output"]
        second = await respond(mock, previous_response_id=first["id"], input="and?")
        assert second.status == 200
        # The conversation before it is a part of the prompt.
        assert second.json["usage"]["input_tokens"] > first["usage"]["input_tokens"]
        assert (await respond(mock, previous_response_id="resp_none")).status == 404


@pytest.mark.parametrize(("enabled", "store"), [(False, True), (True, False)])
async def test_mock_response_that_is_not_stored_is_unknown(autojump_clock, enabled, store):
    async with running_mock(enable_responses_api_store=enabled) as mock:
        identity = (await respond(mock, store=store)).json["id"]
        unknown = await retrieve(mock, identity)
        assert unknown.status == 404
        assert f"'{identity}' not found" in unknown.json["error"]["message"]


async def test_mock_background_response_is_queued_then_complete(autojump_clock):
    async with running_mock(enable_responses_api_store=True, token_delay=1.0) as mock:
        queued = (await respond(mock, background=True)).json
        assert queued["status"] == "queued"
        assert (await retrieve(mock, queued["id"])).json["status"] == "queued"
        await trio.sleep(10)
        # vLLM's status of an answer that has reached its limit of tokens.
        assert (await retrieve(mock, queued["id"])).json["status"] == "incomplete"


async def test_mock_background_stream_is_played_to_every_client(autojump_clock):
    async with running_mock(enable_responses_api_store=True, token_delay=1.0) as mock:
        client, started = await background_stream(mock)
        identity = started.events[0]["response"]["id"]
        # A client that joins while events are still to come, one that has seen some, one later.
        late: list[Answer] = []

        async def join(query: str) -> None:
            late.append(await retrieve(mock, identity, query))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(join, "?stream=true")
            nursery.start_soon(join, "?stream=true&starting_after=1")
            await client.rest(started)
        await join("?stream=true")
        whole = kinds(started)
        assert whole[0] == "response.created"
        assert sorted(map(len, map(kinds, late))) == [len(whole) - 2, len(whole), len(whole)]
        assert all(whole[-len(kinds(one)) :] == kinds(one) for one in late)


async def test_mock_background_follower_that_leaves_is_forgotten(autojump_clock):
    async with running_mock(enable_responses_api_store=True, token_delay=1.0) as mock:
        client, _ = await background_stream(mock)
        (stored,) = mock.server.responses.by_id.values()
        assert len(stored.background.followers) == 1
        await client.aclose()
        await trio.sleep(10)
        assert stored.background.followers == []
        assert stored.status == "done"


async def test_mock_background_response_is_cancelled_once(autojump_clock):
    async with running_mock(enable_responses_api_store=True, token_delay=1.0) as mock:
        identity = (await respond(mock, background=True, max_output_tokens=1000)).json["id"]
        await trio.sleep(3)
        cancelled = await mock.ask("POST", f"{PATH}/{identity}/cancel")
        assert (cancelled.status, cancelled.json["status"]) == (200, "cancelled")
        await trio.sleep(2)  # the engine's step ends
        assert (await mock.stats())["running"] == 0
        again = await mock.ask("POST", f"{PATH}/{identity}/cancel")
        assert again.status == 400
        assert (await retrieve(mock, identity)).json["status"] == "cancelled"


async def test_mock_plain_response_has_no_events_to_play(autojump_clock):
    async with running_mock(enable_responses_api_store=True) as mock:
        identity = (await respond(mock)).json["id"]
        assert (await retrieve(mock, identity, "?stream=true")).status == 400


@pytest.mark.parametrize(
    ("enabled", "body", "param"),
    [
        (True, {"background": True, "store": False}, "background"),
        (False, {"background": True}, "background"),
    ],
)
async def test_mock_background_needs_a_store(autojump_clock, enabled, body, param):
    async with running_mock(enable_responses_api_store=enabled) as mock:
        refused = await respond(mock, **body)
        assert (refused.status, refused.json["error"]["param"]) == (400, param)


async def test_mock_has_no_other_paths_of_stored_responses(autojump_clock):
    async with running_mock(enable_responses_api_store=True) as mock:
        assert (await mock.ask("GET", f"{PATH}/a/input_items")).status == 404
