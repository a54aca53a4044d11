"""Responses of the simulated server that are no plain answers.

They are empty, unfinished, framed or compressed differently, or fail with another engine's errors.
"""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest
import trio

from support.mock_memory import Answer, Client, Mock, running_mock
from vllm_router.lab.mock.foreign import ERRORS

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 6},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 6},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6},
}
APIS = sorted(BODIES)
CHAT = "/v1/chat/completions"
OPENINGS = {
    "/v1/chat/completions": ["chat.completion.chunk"],
    "/v1/completions": [],
    "/v1/responses": ["response.created", "response.in_progress"],
    "/v1/messages": ["message_start"],
}


async def ask(mock: Mock, path: str, *, stream: bool = True) -> Answer:
    return await mock.ask("POST", path, BODIES[path] | {"stream": stream})


async def until_closed(mock: Mock, path: str, *, stream: bool = True) -> tuple[Answer, bytes]:
    """The head, and all bytes after it; the server must close."""
    client: Client = await mock.client()
    await client.send("POST", path, BODIES[path] | {"stream": stream})
    answer = await client.head()
    return answer, await client.everything()


def kinds(answer: Answer) -> list[str]:
    """The types of the events."""
    return [
        event if isinstance(event, str) else event.get("type", event.get("object"))
        for event in answer.events
    ]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("path", APIS)
async def test_mock_wire_empty_answer_has_head_only(path, stream, autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="empty")
        answer = await ask(mock, path, stream=stream)
        assert (await mock.stats())["failed"] == 1
    assert (answer.status, answer.body) == (200, b"")
    assert answer["content-length"] == (None if stream else "0")


@pytest.mark.parametrize("path", APIS)
async def test_mock_wire_stream_of_opening_events_ends_after_them(path, autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="opening")
        assert kinds(await ask(mock, path)) == OPENINGS[path]


@pytest.mark.parametrize("path", APIS)
async def test_mock_wire_early_opening_precedes_first_token(path, autojump_clock):
    async with running_mock(ttft=60.0) as mock:
        await mock.set(early_opening=True)
        client = await mock.client()
        await client.send("POST", path, BODIES[path] | {"stream": True})
        answer = await client.head()
        with trio.move_on_after(30) as waited:
            await client.rest(answer)
        assert waited.cancelled_caught
        assert kinds(answer) == OPENINGS[path]
        await client.rest(answer)
    assert kinds(answer).count("message_start") == (path == "/v1/messages")


@pytest.mark.parametrize("path", APIS)
async def test_mock_wire_early_opening_can_be_all_of_a_dying_server(path, autojump_clock):
    async with running_mock() as mock:
        await mock.set(early_opening=True, mode="midclose", after=0)
        client = await mock.client()
        await client.send("POST", path, BODIES[path] | {"stream": True})
        answer = await client.head()
        with pytest.raises(EOFError):
            await client.rest(answer)
    assert kinds(answer) == OPENINGS[path]


@pytest.mark.parametrize("path", APIS)
async def test_mock_wire_unfinished_stream_has_tokens_without_end(path, autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="unfinished", after=3)
        found = kinds(await ask(mock, path))
    assert not {"[DONE]", "message_stop", "response.completed"} & set(found)
    deltas = ("chat.completion.chunk", "text_completion", "content_block_delta")
    wanted = 3 + (path == CHAT)
    assert sum(kind in deltas or kind.endswith("text.delta") for kind in found) == wanted


@pytest.mark.parametrize("path", APIS)
async def test_mock_wire_unfinished_json_is_half_of_promised_length(path, autojump_clock):
    async with running_mock() as mock:
        whole = await ask(mock, path, stream=False)
        await mock.set(mode="unfinished")
        half = await ask(mock, path, stream=False)
    assert len(half.body) == len(whole.body) // 2
    with pytest.raises(json.JSONDecodeError):
        json.loads(half.body)


@pytest.mark.parametrize("path", APIS)
async def test_mock_wire_end_without_token_equals_aborted_request(path, autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="no_token")
        stream, plain = await ask(mock, path), await ask(mock, path, stream=False)
    assert plain.status == 200
    assert '_tokens": 0' in json.dumps(plain.json["usage"])
    ends = {
        "/v1/chat/completions": ["chat.completion.chunk", "[DONE]"],
        "/v1/completions": ["[DONE]"],
        "/v1/responses": ["response.created", "response.in_progress", "response.completed"],
        "/v1/messages": ["message_start", "message_delta", "message_stop"],
    }
    assert kinds(stream) == ends[path]


@pytest.mark.parametrize("path", APIS)
async def test_mock_wire_valid_empty_answer_has_reason_and_token(path, autojump_clock):
    async with running_mock() as mock:
        await mock.set(output_tokens=0)
        stream, plain = await ask(mock, path), await ask(mock, path, stream=False)
    counts = {"completion_tokens": 1, "output_tokens": 1}
    assert counts.items() & plain.json["usage"].items()
    texts = json.dumps([stream.events, plain.json])
    assert '"stop"' in texts or '"end_turn"' in texts or '"completed"' in texts
    assert not {"content_block_delta", "response.output_text.delta"} & set(kinds(stream))
    assert "completions" not in path or stream.text == ""


@pytest.mark.parametrize("path", APIS)
async def test_mock_wire_answer_may_end_with_its_connection(path, autojump_clock):
    async with running_mock() as mock:
        whole = await ask(mock, path)
        await mock.set(framing="close")
        head, body = await until_closed(mock, path)
        assert (head["transfer-encoding"], head["content-length"]) == (None, None)
        assert head["connection"] == "close"
        assert body.count(b"data: ") == whole.body.count(b"data: ")
        head, body = await until_closed(mock, path, stream=False)
        assert json.loads(body)["model"] == "tiny"


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
async def test_mock_wire_answer_ending_with_connection_may_be_truncated(stream, autojump_clock):
    async with running_mock() as mock:
        await mock.set(framing="close", mode="midclose", after=3)
        head, body = await until_closed(mock, CHAT, stream=stream)
    assert head["content-length"] is None
    if stream:
        assert body.count(b"data: ") == 1 + 3
        assert b"[DONE]" not in body
    else:
        with pytest.raises(json.JSONDecodeError):
            json.loads(body)


@pytest.mark.parametrize("path", APIS)
async def test_mock_wire_compressed_stream_can_be_read_event_by_event(path, autojump_clock):
    async with running_mock(token_delay=1.0) as mock:
        await mock.set(packing="gzip")
        answer = await ask(mock, path)
    assert answer["content-encoding"] == "gzip"
    reader = zlib.decompressobj(wbits=31)
    pieces = [reader.decompress(chunk) for chunk in answer.chunks]
    assert reader.eof
    assert len([piece for piece in pieces if piece]) > 5
    assert all(piece.endswith(b"\n\n") for piece in pieces if piece)


async def test_mock_wire_compressed_stream_may_be_cut(autojump_clock):
    async with running_mock() as mock:
        await mock.set(packing="gzip")
        plain = await ask(mock, CHAT, stream=False)
        assert json.loads(gzip.decompress(plain.body))["model"] == "tiny"
        await mock.set(packing="gzip", mode="midclose", after=2)
        client = await mock.client()
        await client.send("POST", CHAT, BODIES[CHAT] | {"stream": True})
        answer = await client.head()
        with pytest.raises(EOFError):
            await client.rest(answer)
    text = zlib.decompressobj(wbits=31).decompress(answer.body)
    assert text.count(b"data: ") == 1 + 2


async def test_mock_wire_tokens_may_have_null_error(autojump_clock):
    async with running_mock() as mock:
        await mock.set(null_error=True)
        answer = await ask(mock, CHAT)
    assert {event["error"] for event in answer.events[:-1]} == {None}
    assert len(answer.text.split()) == 6


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("error", sorted(ERRORS))
async def test_mock_wire_other_engines_error_ends_stream_around_tokens(
    error, after, autojump_clock
):
    async with running_mock() as mock:
        await mock.set(mode="error_event", error=error, after=after)
        answer = await ask(mock, CHAT)
        assert (await mock.stats())["failed"] == 1
    before, found, rest = answer.body.partition(ERRORS[error].event)
    assert found
    assert before.count(b"data: ") == (1 + 3 if after else 0)
    assert rest == b"data: [DONE]\n\n"


@pytest.mark.parametrize("error", ["code_400", "tgi_validation", "anthropic_invalid", "two_lines"])
async def test_mock_wire_other_engines_error_may_be_whole_answer(error, autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="error_event", error=error)
        answer = await ask(mock, CHAT, stream=False)
    assert answer.status == 200
    assert answer.json["error"]


@pytest.mark.parametrize(
    "switches", [{"error": "nonsense"}, {"framing": "open"}, {"packing": "br"}]
)
async def test_mock_wire_unknown_fault_is_refused(switches, autojump_clock):
    async with running_mock() as mock:
        assert (await mock.ask("POST", "/mock/set", switches)).status == 400
        wrong = await mock.ask("POST", CHAT, BODIES[CHAT], "x-mock-error: nonsense")
        assert wrong.status == 400


async def test_mock_wire_decorations_apply_to_chosen_requests_only(autojump_clock):
    async with running_mock() as mock:
        await mock.set(packing="gzip", next=1, only_path=CHAT)
        other = await ask(mock, "/v1/completions", stream=False)
        first = await ask(mock, CHAT, stream=False)
        second = await ask(mock, CHAT, stream=False)
    packed = [answer["content-encoding"] for answer in (other, first, second)]
    assert packed == [None, "gzip", None]


FAILURES = {
    "/v1/chat/completions": b"[DONE]\n\n",
    "/v1/completions": b"[DONE]\n\n",
    "/v1/messages": b'"error"',
}


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("path", APIS)
async def test_mock_wire_dead_engine_has_error_text_of_each_api(path, after, autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="error_event", after=after)
        client = await mock.client()
        await client.send("POST", path, BODIES[path] | {"stream": True})
        answer = await client.head()
        try:
            await client.rest(answer)
            cut = False
        except EOFError:
            cut = True
        assert (await mock.stats())["failed"] == 1
    assert cut == (path == "/v1/responses")
    assert FAILURES.get(path, b"response.") in answer.body
    deltas = [kind for kind in kinds(answer) if kind and "delta" in kind]
    assert len(deltas) == (after if path in ("/v1/responses", "/v1/messages") else 0)


@pytest.mark.parametrize(
    ("path", "error"),
    [("/v1/messages", "anthropic_invalid"), ("/v1/responses", "responses_failed")],
)
async def test_mock_wire_other_engines_error_ends_apis_without_done(path, error, autojump_clock):
    async with running_mock() as mock:
        await mock.set(mode="error_event", error=error, after=2)
        answer = await ask(mock, path)
    assert answer.body.endswith(ERRORS[error].event)
