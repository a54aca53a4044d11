"""Just enough of server-sent events to end a stream honestly."""

from __future__ import annotations

import json

import pytest

from vllm_router.proxy import sse

CHUNK = b'data: {"object":"chat.completion.chunk","choices":[{"delta":{"content":"%b"}}]}\n\n'
ERROR = b'data: {"error": {"message": "boom", "type": "X", "param": null, "code": %d}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    "held",
    [
        b"data: x\n\n",
        b": keep-alive\n\ndata: x\n\n",
        b": c\r\n\r\ndata: x\r\n\r\n",
        b"event: message_start\ndata: {}\n\n",
        b"\n\ndata: x\n\ndata: half",
        b"retry: 3\n\n",
    ],
)
def test_an_event_has_arrived_once_its_blank_line_has(held):
    assert sse.has_event(held)


@pytest.mark.parametrize(
    "held",
    [
        b"",
        b"d",
        b"data: x",
        b"data: x\n",
        b"event: error\ndata: {",
        b": keep-alive\n\n",
        b": keep-alive\n\n: keep-alive\n\ndata",
        b"\n\n\r\n",
    ],
)
def test_comments_and_halves_are_no_event(held):
    assert not sse.has_event(held)


OPENING = (
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
    b'"finish_reason":null}],"prompt_token_ids":null}\n\n'
)
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":16,"completion_tokens":0}}\n\n'


@pytest.mark.parametrize(
    "held",
    [
        OPENING,
        b": keep-alive\n\n" + OPENING,
        OPENING * 2,  # n = 2
        USAGE,
        OPENING + USAGE,
        OPENING.replace(b'""', b'"","reasoning_content":null'),
        OPENING.replace(b":", b": "),
    ],
)
def test_what_comes_before_the_first_token_is_no_event_yet(held):
    assert not sse.has_event(held)
    assert not sse.begins_dead(held)
    assert sse.has_event(held + CHUNK % b"hi")
    assert not sse.begins_dead(held + CHUNK % b"hi")
    assert not sse.begins_dead(held + CHUNK % b"hi" + DONE)


@pytest.mark.parametrize(
    "held",
    [
        OPENING.replace(b'""', b'"hi"'),
        OPENING.replace(b'""', b'"","reasoning_content":"so"'),
        OPENING.replace(b'"finish_reason":null', b'"finish_reason":"length"'),
        b'data: {"choices":[{"text":""}]}\n\n',
    ],
)
def test_an_opening_that_says_more_is_an_event(held):
    assert sse.has_event(held)
    assert not sse.begins_dead(held + DONE)
    assert not sse.begins_dead(held, whole=True)


@pytest.mark.parametrize("held", [OPENING, USAGE, OPENING + USAGE, b": c\n\n" + OPENING])
def test_a_stream_that_ends_before_its_first_token_is_dead(held):
    """As those of vLLM do that wait in its queue when it is stopped with a grace period."""
    assert sse.has_event(held + DONE)
    assert sse.begins_dead(held + DONE)
    assert sse.begins_dead(held, whole=True)


def test_a_stream_of_nothing_is_dead_only_if_it_says_so():
    assert sse.begins_dead(DONE)
    assert not sse.begins_dead(b"", whole=True)
    assert not sse.begins_dead(b": comment\n\n", whole=True)


def test_a_first_event_with_an_error_of_the_server_is_dead():
    assert sse.begins_dead(ERROR % 500)
    assert sse.begins_dead(b": keep-alive\n\n" + ERROR % 500 + DONE)
    assert sse.begins_dead(CHUNK.replace(b'"%b"}}', b'""},"finish_reason":"abort"}'))


def test_an_error_of_the_request_is_an_answer():
    assert not sse.begins_dead(ERROR % 400)
    assert not sse.begins_dead(CHUNK % b"hi")
    assert not sse.begins_dead(b'data: {"error"')
    assert not sse.begins_dead(b'data: {"error": "text"}\n\n')


def test_a_stream_that_ends_aborted_or_with_an_error_is_broken():
    aborted = CHUNK.replace(b'"%b"}}', b'""},"finish_reason":"abort"}')
    assert sse.ends_aborted(CHUNK % b"hi" + aborted + DONE)
    assert sse.ends_aborted(CHUNK % b"hi" + ERROR % 500 + DONE)
    assert sse.ends_aborted(b'event: error\ndata: {"type":"error"}\n\n')
    assert sse.ends_aborted(CHUNK % b"hi" + b'event: error\ndata: {"type":"error"}\n\n')


def test_a_stream_that_ends_with_an_error_of_the_request_is_not():
    assert not sse.ends_aborted(CHUNK % b"hi" + ERROR % 400 + DONE)


@pytest.mark.parametrize(
    "text",
    [
        b"event: error",
        b"\\nevent: error\\n",
        b'\\"finish_reason\\":\\"abort\\"',
        b'data: {\\"error\\"',
    ],
)
def test_a_model_that_talks_about_errors_makes_none(text):
    stream = CHUNK % text + b'data: {"choices":[{"finish_reason":"stop"}]}\n\n' + DONE
    assert not sse.ends_aborted(stream)
    assert not sse.begins_dead(stream)


# -- the event that ends a broken stream -------------------------------------------------------


def payload(event: bytes) -> dict:
    (line,) = [line for line in event.split(b"\n") if line.startswith(b"data: ")]
    return json.loads(line[6:])


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/completions"])
def test_the_error_event_of_the_openai_dialect(path):
    event = sse.error_event(path, "server_gone", "It is gone.", CHUNK % b"x")
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert payload(event)["error"] == {
        "message": "It is gone.",
        "type": "upstream_error",
        "param": None,
        "code": "server_gone",
    }


def test_the_error_event_of_the_messages_dialect():
    event = sse.error_event(b"/v1/messages", "c", "m", b"")
    assert event.startswith(b"event: error\n")
    assert payload(event) == {"type": "error", "error": {"type": "api_error", "message": "m"}}


def test_the_error_event_of_the_responses_dialect():
    event = sse.error_event(b"/v1/responses", "c", "m", b"")
    assert event.startswith(b"event: error\n")
    assert payload(event) == {"type": "error", "code": "c", "message": "m", "param": None}


@pytest.mark.parametrize("tail", [b"data: half", b"data: line\n", b"data: x\n\ndata: y", b"\r\n"])
def test_an_event_cut_in_the_middle_is_ended_first(tail):
    assert sse.error_event(b"/", "c", "m", tail).startswith(b"\n\ndata: ")


@pytest.mark.parametrize("tail", [b"", b"data: x\n\n", b"data: x\r\n\r\n", b"data: x\r\r"])
def test_on_a_boundary_nothing_is_put_before_it(tail):
    assert sse.error_event(b"/", "c", "m", tail).startswith(b"data: ")
