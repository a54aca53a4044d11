"""The answer tables: events that open, prove, finish, end, abort or fail, in every API."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_router.proxy.answers import quick
from vllm_router.proxy.answers.ending import read_ending
from vllm_router.proxy.answers.events import (
    DONE,
    NOT_JSON,
    BlockReader,
    at_boundary,
    blocks_of,
    decode_event,
)
from vllm_router.proxy.answers.faults import Fault, fault_of, message_of
from vllm_router.proxy.answers.opening import Opening, Verdict
from vllm_router.proxy.answers.signs import ABORTS, ENDS, FAILS, FINISHES, OPENS, PROVES, UNKNOWN
from vllm_router.proxy.answers.tables import Api, api_of, read_event
from vllm_router.proxy.answers.usage import Usage, UsageScanner, usage_of
from vllm_router.proxy.answers.whole import JsonBalance, read_whole

CAPTURES = Path(__file__).parents[2] / "data" / "vllm"
STREAM_APIS = [Api.CHAT, Api.COMPLETIONS, Api.RESPONSES, Api.MESSAGES]


def data(payload: object, name: str = "") -> bytes:
    start = f"event: {name}\n".encode() if name else b""
    return start + b"data: " + json.dumps(payload).encode() + b"\n\n"


def signs(api: Api, payload: object, name: str = "") -> int:
    return read_event(api, decode_event(data(payload, name)[:-2]))


def delta(value: object, finish: str | None = None) -> dict:
    return {"choices": [{"index": 0, "delta": value, "finish_reason": finish}]}


def named(kind: str, **fields: object) -> dict:
    return {"type": kind, **fields}


# -- events ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "name", "payload"),
    [
        (b'data: {"a":1}', "", {"a": 1}),
        (b'data:{"a":1}', "", {"a": 1}),
        (b'data:  {"a":1}  ', "", {"a": 1}),
        (b'event: x\ndata: {"a":\ndata: 1}', "x", {"a": 1}),
        (b'event:x\r\ndata: {"a":1}', "x", {"a": 1}),
        (b'data: {"a":1}\nevent: x\nid: 3', "x", {"a": 1}),
        (b'\xef\xbb\xbfdata: {"a":1}', "", {"a": 1}),
        (b'data: \xef\xbb\xbf{"a":1}', "", {"a": 1}),
        (b': comment\ndata: {"a":1}', "", {"a": 1}),
        (b'data: {"a":NaN}', "", None),
        (b"data: [DONE]", "", DONE),
        (b"data:[DONE] ", "", DONE),
        (b"data: half {", "", NOT_JSON),
        (b"data", "", None),
        (b"data: ", "", None),
        (b"id: 3", "", None),
        (b"retry: 3", "", None),
        (b"event: ping", "ping", None),
    ],
)
def test_decode_event_matches_specification(block, name, payload):
    event = decode_event(block)
    assert event.name == name
    if payload is None and event.payload is not None:
        assert event.payload["a"] != event.payload["a"]
    else:
        assert event.payload == payload or event.payload is payload


STREAM = (
    b"\xef\xbb\xbf: hello\n\nretry: 3\n\n: a\r\n\r\nevent: x\r\ndata: {}\r\n\r\n"
    b"data: 1\r\rdata: 2\n\n:b\n:c\n\ndata: \xc3\xa9\n\n\n\ndata: half"
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_block_reader_any_split_yields_same_blocks(cuts):
    places = [0, *sorted(cuts), len(STREAM)]
    reader = BlockReader()
    blocks = []
    for start, end in itertools.pairwise(places):
        blocks.extend(reader.feed(STREAM[start:end]))
    decoded = [decode_event(block.rstrip(b"\r\n")) for block in blocks]
    assert [event.payload for event in decoded if event.data is not None] == [
        {},
        1,
        2,
        NOT_JSON,
    ]
    assert reader.pending == b"data: half"
    held = b"".join(blocks) + bytes(reader.comments) + reader.pending
    assert sorted(held.replace(b"\r", b"\n")) == sorted(STREAM.replace(b"\r", b"\n"))


@given(st.text(":\r\nx", max_size=20), st.lists(st.integers(0, 20), max_size=4))
def test_block_reader_any_split_yields_same_comments(text, cuts):
    """Line ends that are cut count as two."""
    stream = text.encode()
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    reader, whole = BlockReader(), BlockReader()
    for start, end in itertools.pairwise(places):
        list(reader.feed(stream[start:end]))
    list(whole.feed(stream))
    assert reader.comments.split() == whole.comments.split()
    assert reader.pending.strip() == whole.pending.strip()


def test_block_reader_long_comments_and_events_take_linear_time():
    reader = BlockReader()
    for _ in range(100_000):
        assert list(reader.feed(b":x\n")) == []
    assert len(reader.comments) == 300_000
    reader = BlockReader()
    assert not any(list(reader.feed(b"x" * 10)) for _ in range(100_000))


@pytest.mark.parametrize("tail", [b"", b"x\n\n", b"x\r\n\r\n", b"x\r\r", b"x\n\n: c\n", b": c\n"])
def test_at_boundary_between_events_and_after_comments(tail):
    assert at_boundary(tail)


@pytest.mark.parametrize("tail", [b"x", b"x\n", b"x\r\n", b"x\n: c\n", b"\n\ndata: x\n: c"])
def test_at_boundary_inside_an_event_is_false(tail):
    assert not at_boundary(tail)


# -- the tables --------------------------------------------------------------------------------

OPENINGS = [
    (Api.CHAT, delta({"role": "assistant", "content": ""})),
    (Api.CHAT, delta({"role": "assistant", "content": None})),
    (Api.CHAT, delta({"content": "", "role": "assistant", "reasoning_content": None})),
    (Api.CHAT, delta({"role": "assistant", "content": "", "tool_calls": [], "refusal": None})),
    (Api.CHAT, delta({"role": "assistant"})),
    (Api.CHAT, delta({})),
    (Api.CHAT, {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 0}}),
    (Api.CHAT, {"choices": []}),
    (Api.CHAT, {"error": None, **delta({"role": "assistant", "content": ""})}),
    (Api.COMPLETIONS, {"choices": [{"index": 0, "text": "", "finish_reason": None}]}),
    (Api.RESPONSES, named("response.created", response={"status": "in_progress", "output": []})),
    (Api.RESPONSES, named("response.in_progress", response={"status": "in_progress"})),
    (Api.RESPONSES, named("response.queued", response={"status": "queued"})),
    (
        Api.RESPONSES,
        named("response.output_item.added", item={"type": "message", "id": "m", "content": []}),
    ),
    (
        Api.RESPONSES,
        named("response.output_item.added", item={"type": "reasoning", "summary": []}),
    ),
    (
        Api.RESPONSES,
        named("response.content_part.added", part={"type": "output_text", "text": ""}),
    ),
    (Api.RESPONSES, named("response.output_text.delta", delta="")),
    (Api.MESSAGES, named("message_start", message={"content": [], "usage": {"input_tokens": 9}})),
    (Api.MESSAGES, named("ping")),
    (Api.MESSAGES, named("content_block_start", content_block={"type": "text", "text": ""})),
    (
        Api.MESSAGES,
        named("content_block_start", content_block={"type": "thinking", "thinking": ""}),
    ),
    (Api.MESSAGES, named("content_block_delta", delta={"type": "text_delta", "text": ""})),
    (Api.MESSAGES, named("content_block_stop", index=0)),
]

PROOFS = [
    (Api.CHAT, delta({"content": "x"})),
    (Api.CHAT, delta({"role": "assistant", "content": "x"})),
    (Api.CHAT, delta({"reasoning": "x"})),
    (Api.CHAT, delta({"reasoning_content": "x", "content": None})),
    (Api.CHAT, delta({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]})),
    (Api.CHAT, delta({"refusal": "no"})),
    (Api.CHAT, {"choices": [{"index": 0, "delta": {}, "token_ids": [0]}]}),
    (Api.CHAT, {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}),
    (Api.COMPLETIONS, {"choices": [{"index": 0, "text": " "}]}),
    (Api.RESPONSES, named("response.output_text.delta", delta="x")),
    (Api.RESPONSES, named("response.reasoning_text.delta", delta="x")),
    (Api.RESPONSES, named("response.function_call_arguments.delta", delta="{")),
    (Api.RESPONSES, named("response.output_item.added", item={"type": "function_call"})),
    (Api.RESPONSES, named("response.web_search_call.searching")),
    (
        Api.RESPONSES,
        named("response.created", response={"status": "queued", "background": True}),
    ),
    (Api.MESSAGES, named("content_block_delta", delta={"type": "text_delta", "text": "x"})),
    (Api.MESSAGES, named("content_block_delta", delta={"type": "thinking_delta", "thinking": "x"})),
    (
        Api.MESSAGES,
        named("content_block_delta", delta={"type": "input_json_delta", "partial_json": "{"}),
    ),
    (Api.MESSAGES, named("content_block_start", content_block={"type": "tool_use", "name": "f"})),
    (Api.MESSAGES, named("message_delta", delta={}, usage={"output_tokens": 3})),
]

OTHERS = [
    (Api.CHAT, delta({}, "stop"), FINISHES),
    (Api.CHAT, delta({"content": "x"}, "length"), FINISHES | PROVES),
    (Api.CHAT, delta({}, "abort"), ABORTS),
    (Api.COMPLETIONS, {"choices": [{"text": "", "finish_reason": "abort"}]}, ABORTS),
    (Api.CHAT, {"id": "x"}, UNKNOWN),
    (Api.CHAT, [1], UNKNOWN),
    (Api.RESPONSES, named("response.something_new", delta="x"), UNKNOWN),
    (Api.MESSAGES, named("something_new"), UNKNOWN),
    (
        Api.RESPONSES,
        named("response.completed", response={"status": "completed", "output": []}),
        FINISHES | ENDS,
    ),
    (
        Api.RESPONSES,
        named("response.incomplete", response={"status": "incomplete", "output": []}),
        FINISHES | ENDS,
    ),
    (
        Api.RESPONSES,
        named(
            "response.completed",
            response={"status": "completed", "output": [], "usage": {"output_tokens": 2}},
        ),
        PROVES | FINISHES | ENDS,
    ),
    (
        Api.RESPONSES,
        named("response.completed", response={"status": "cancelled", "output": []}),
        ABORTS | ENDS,
    ),
    (Api.MESSAGES, named("message_delta", delta={"stop_reason": "end_turn"}), FINISHES),
    (Api.MESSAGES, named("message_delta", delta={"stop_reason": None}), ABORTS),
    (Api.MESSAGES, named("message_stop"), ENDS),
]

FAILURES = [
    {"error": {"message": "m", "code": 500}},
    {"error": "text", "error_type": "generation"},
    {"object": "error", "message": "m", "code": 400},
    {"type": "error", "error": {"type": "api_error", "message": "m"}},
    {"type": "error", "code": "server_error", "message": "m"},
]


@pytest.mark.parametrize(("api", "payload"), OPENINGS)
def test_read_event_opening_is_no_proof(api, payload):
    assert signs(api, payload) == OPENS


@pytest.mark.parametrize(("api", "payload"), PROOFS)
def test_read_event_output_is_proof(api, payload):
    assert signs(api, payload) == PROVES


@pytest.mark.parametrize(("api", "payload", "expected"), OTHERS)
def test_read_event_recognises_ends_aborts_and_unknown_events(api, payload, expected):
    assert signs(api, payload) == expected


@pytest.mark.parametrize("api", Api)
@pytest.mark.parametrize("payload", FAILURES)
def test_read_event_finds_error_of_every_api(api, payload):
    assert signs(api, payload) == FAILS


@pytest.mark.parametrize("api", Api)
def test_read_event_without_a_table_entry(api):
    assert read_event(api, decode_event(b"data: [DONE]")) == ENDS
    assert read_event(api, decode_event(b"event: error\ndata: text")) == FAILS
    assert read_event(api, decode_event(b"event: error")) == FAILS
    assert read_event(api, decode_event(b"data: text")) == UNKNOWN
    assert read_event(api, decode_event(b"id: 7")) == OPENS


@pytest.mark.parametrize("kind", ["response.failed", "error"])
def test_read_event_failed_response(kind):
    assert signs(Api.RESPONSES, named(kind, response={"status": "failed"})) == FAILS


def test_api_of_path_returns_one_of_four_apis():
    assert [api_of(b"/v1/" + name) for name in (b"responses", b"messages", b"messages/")] == [
        Api.RESPONSES,
        Api.MESSAGES,
        Api.MESSAGES,
    ]
    assert api_of(b"/v1/messages/count_tokens") is Api.OTHER
    assert api_of(b"/v1/embeddings") is Api.OTHER


# -- which failures count ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "fault"),
    [
        ({"error": {"message": "m", "code": 400}}, Fault.CLIENT),
        ({"error": {"message": "m", "code": "400"}}, Fault.CLIENT),
        ({"error": {"message": "m", "code": 422.0}}, Fault.CLIENT),
        ({"error": {"message": "m", "status": 404}}, Fault.CLIENT),
        ({"error": {"message": "m", "type": "BadRequestError"}}, Fault.CLIENT),
        ({"error": {"message": "m", "type": "invalid_request_error"}}, Fault.CLIENT),
        ({"error": {"message": "m", "code": "context_length_exceeded"}}, Fault.CLIENT),
        ({"type": "error", "error": {"type": "invalid_request_error"}}, Fault.CLIENT),
        ({"type": "error", "error": {"type": "request_too_large"}}, Fault.CLIENT),
        ({"error": "Input validation error: `inputs` must have less", "x": 1}, Fault.CLIENT),
        ({"error": {"message": "This model's maximum context length is 8 tokens"}}, Fault.CLIENT),
        ({"error": "`inputs` tokens must be <= 4096", "error_type": "validation"}, Fault.CLIENT),
        ({"object": "error", "message": "m", "code": 400}, Fault.CLIENT),
        ({"detail": "Prompt is too long"}, Fault.CLIENT),
        ("prompt is too long", Fault.CLIENT),
        ({"error": {"message": "m", "code": 500}}, Fault.SERVER),
        ({"error": {"message": "m", "code": "500"}}, Fault.SERVER),
        ({"error": {"message": "m", "type": "InternalServerError"}}, Fault.SERVER),
        ({"type": "error", "error": {"type": "api_error", "message": "m"}}, Fault.SERVER),
        ({"response": {"error": {"code": "server_error"}}}, Fault.SERVER),
        ({"error": "CUDA error: out of memory"}, Fault.SERVER),
        ({"error": {"message": "EngineCore encountered an issue."}}, Fault.SERVER),
        ({"error": {"message": "m", "code": 429}}, Fault.BUSY),
        ({"type": "error", "error": {"type": "overloaded_error"}}, Fault.BUSY),
        ({"error": {"message": "m", "code": 503}}, Fault.BUSY),
        ({"error": {"message": "boom"}}, Fault.UNCLEAR),
        ({"error": {"message": "boom", "code": "weird"}}, Fault.UNCLEAR),
        ({"error": "boom"}, Fault.UNCLEAR),
        ({"error": True}, Fault.UNCLEAR),
        (None, Fault.UNCLEAR),
        # vLLM 0.32's Messages stream: its type says server, its text holds the client's error.
        (
            {
                "type": "error",
                "error": {
                    "type": "internal_error",
                    "message": "1 validation error for X [input_value={'code': 400}]",
                },
            },
            Fault.UNCLEAR,
        ),
        (
            {
                "type": "error",
                "error": {"type": "internal_error", "message": "2 validation errors for X ..."},
            },
            Fault.UNCLEAR,
        ),
    ],
)
def test_fault_of_error_names_client_or_server(payload, fault):
    assert fault_of(payload) is fault


def test_message_of_error_finds_text_in_every_form():
    assert message_of({"error": {"message": "a"}}) == "a"
    assert message_of({"type": "error", "error": {"type": "x", "message": "a"}}) == "a"
    assert message_of({"error": "a"}) == "a"
    assert message_of({"object": "error", "message": "a"}) == "a"
    assert message_of({"detail": "a"}) == "a"
    assert message_of(None) is None


# -- openings ----------------------------------------------------------------------------------

ROLE = data(delta({"role": "assistant", "content": ""}))
TOKEN = data(delta({"content": "x"}))
STOP = data(delta({}, "stop"))
END = b"data: [DONE]\n\n"


def opened(api: Api, *pieces: bytes) -> Verdict:
    opening = Opening(api)
    verdict = Verdict.WAIT
    for piece in pieces:
        verdict = opening.feed(piece)
        if verdict is not Verdict.WAIT:
            return verdict
    return opening.end()


def created(**fields: object) -> bytes:
    return data(named("response.created", response={"status": "in_progress", **fields}))


ZERO = {"status": "completed", "output": [], "usage": {"input_tokens": 9, "output_tokens": 0}}


@pytest.mark.parametrize(
    ("api", "pieces", "verdict"),
    [
        (Api.CHAT, [ROLE, TOKEN], Verdict.PROVEN),
        (Api.CHAT, [ROLE + TOKEN + END], Verdict.PROVEN),
        (Api.CHAT, [ROLE, STOP, END], Verdict.NO_TOKENS),
        (Api.CHAT, [ROLE, STOP], Verdict.NO_TOKENS),
        (
            Api.CHAT,
            [ROLE, STOP, data({"choices": [], "usage": {"completion_tokens": 1}})],
            Verdict.PROVEN,
        ),
        (Api.CHAT, [ROLE, END], Verdict.EMPTY),
        (Api.CHAT, [ROLE], Verdict.EMPTY),
        (Api.CHAT, [END], Verdict.EMPTY),
        (Api.CHAT, [], Verdict.EMPTY),
        (Api.CHAT, [b": c\n\n", b": c\n\n"], Verdict.EMPTY),
        (Api.CHAT, [TOKEN[:-1]], Verdict.PROVEN),
        (Api.CHAT, [TOKEN[:20]], Verdict.EMPTY),
        (Api.CHAT, [ROLE, data(delta({}, "abort"))], Verdict.ABORTED),
        (Api.CHAT, [data({"error": {"message": "m", "code": 400}}), END], Verdict.REJECTED),
        (Api.CHAT, [ROLE, data({"error": {"message": "m", "code": 500}})], Verdict.FAILED),
        (Api.CHAT, [data({"error": {"message": "m", "code": 429}})], Verdict.BUSY),
        (Api.CHAT, [data({"error": "boom"})], Verdict.UNCLEAR),
        (Api.CHAT, [b"data: what\n\n"], Verdict.UNJUDGED),
        (Api.COMPLETIONS, [END], Verdict.EMPTY),
        (Api.RESPONSES, [created(), data(named("response.completed", response=ZERO))],
         Verdict.NO_TOKENS),
        (Api.RESPONSES, [created()], Verdict.EMPTY),
        (Api.RESPONSES, [created(background=True)], Verdict.PROVEN),
        (Api.RESPONSES, [created(), data(named("response.failed", response={"error": {
            "code": "server_error"}}))], Verdict.FAILED),
        (
            Api.MESSAGES,
            [
                data(named("message_start", message={"content": []}), "message_start"),
                data(
                    named(
                        "message_delta",
                        delta={"stop_reason": "end_turn"},
                        usage={"output_tokens": 0},
                    )
                ),
                data(named("message_stop")),
            ],
            Verdict.NO_TOKENS,
        ),
        (
            Api.MESSAGES,
            [
                data(named("message_start", message={"content": []})),
                data(named("message_delta", delta={"stop_reason": None})),
            ],
            Verdict.ABORTED,
        ),
        (Api.MESSAGES, [data(named("message_start")), b"event: ping\n\n"], Verdict.EMPTY),
    ],
)  # fmt: skip
def test_opening_returns_verdict(api, pieces, verdict):
    assert opened(api, *pieces) is verdict


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_opening_any_split_gives_same_verdict(size):
    stream = b": c\n\n" + ROLE + b"retry: 3\n\n" + TOKEN + END
    opening = Opening(Api.CHAT)
    sent = b""
    for start in range(0, len(stream), size):
        verdict = opening.feed(stream[start : start + size])
        sent = stream[: start + size]
        if verdict is not Verdict.WAIT:
            break
    assert verdict is Verdict.PROVEN
    comments = opening.take_comments()
    assert comments.strip() == b": c"
    assert comments.strip(b"\n") + b"\n\n" + opening.held == sent


# -- endings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("api", "tail", "verdict"),
    [
        (Api.CHAT, TOKEN + STOP + END, Verdict.PROVEN),
        (Api.CHAT, TOKEN + END, Verdict.PROVEN),
        (Api.CHAT, TOKEN + STOP, Verdict.PROVEN),
        (Api.CHAT, TOKEN + END[:-2], Verdict.PROVEN),
        (Api.CHAT, TOKEN, Verdict.UNFINISHED),
        (Api.CHAT, TOKEN + STOP[:30], Verdict.UNFINISHED),
        (Api.CHAT, TOKEN + b": bye\n\n", Verdict.UNFINISHED),
        (Api.CHAT, TOKEN + data(delta({}, "abort")) + END, Verdict.CUT),
        (Api.CHAT, TOKEN + data({"error": {"code": 500}}) + END, Verdict.FAILED),
        (Api.CHAT, TOKEN + data({"error": {"code": "400"}}) + END, Verdict.REJECTED),
        (Api.CHAT, TOKEN + data({"error": "boom"}), Verdict.UNCLEAR),
        (Api.CHAT, b"data: what\n\n", Verdict.UNJUDGED),
        (
            Api.CHAT,
            TOKEN
            + data({"choices": [{"index": 1, "delta": {"content": "y"}}]})
            + STOP,
            Verdict.UNFINISHED,
        ),
        (Api.RESPONSES, data(named("response.output_text.delta", delta="x")), Verdict.UNFINISHED),
        (
            Api.RESPONSES,
            data(named("response.completed", response={"status": "completed"})),
            Verdict.PROVEN,
        ),
        (Api.MESSAGES, data(named("message_stop")), Verdict.PROVEN),
        (
            Api.MESSAGES,
            data(named("message_delta", delta={"stop_reason": None}, usage={"output_tokens": 3}))
            + data(named("message_stop")),
            Verdict.CUT,
        ),
        (
            Api.MESSAGES,
            data(named("content_block_delta", delta={"type": "text_delta", "text": "x"})),
            Verdict.UNFINISHED,
        ),
    ],
)  # fmt: skip
def test_ending_returns_verdict(api, tail, verdict):
    assert read_ending(api, tail).verdict is verdict
    assert read_ending(api, tail.replace(b"\n", b"\r\n")).verdict is verdict


def test_ending_finds_usage_of_every_api():
    usage = {"prompt_tokens": 9, "completion_tokens": 3}
    chat = TOKEN + STOP + data({"choices": [], "usage": usage, "x": "y" * 5000}) + END
    assert read_ending(Api.CHAT, chat).usage == (9, None, 3)
    counts = {"input_tokens": 9, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 4}}
    last = named("response.completed", response={"status": "completed", "usage": counts})
    assert read_ending(Api.RESPONSES, data(last)).usage == (9, 4, 3)
    end = data(named("message_delta", delta={"stop_reason": "end_turn"}, usage=counts))
    assert read_ending(Api.MESSAGES, end + data(named("message_stop"))).usage == (9, 4, 3)


# -- plain answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("api", "body", "verdict"),
    [
        (Api.CHAT, {"choices": [{"message": {"content": "x"}}]}, Verdict.PROVEN),
        (Api.CHAT, {"choices": [{"message": {"content": None, "tool_calls": [{"id": "x",
         "function": {"name": "f"}}]}}]}, Verdict.PROVEN),
        (Api.CHAT, {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]},
         Verdict.NO_TOKENS),
        (Api.CHAT, {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}],
         "usage": {"completion_tokens": 1}}, Verdict.PROVEN),
        (Api.CHAT, {"choices": [{"message": {"content": ""}}]}, Verdict.EMPTY),
        (Api.CHAT, {"choices": []}, Verdict.EMPTY),
        (Api.CHAT, {}, Verdict.EMPTY),
        (Api.CHAT, [], Verdict.EMPTY),
        (Api.CHAT, None, Verdict.EMPTY),
        (Api.CHAT, {"choices": [{"message": {"content": "x"}, "finish_reason": "abort"}]},
         Verdict.CUT),
        (Api.CHAT, {"choices": [{"message": {"content": ""}, "finish_reason": "abort"}]},
         Verdict.ABORTED),
        (Api.CHAT, {"error": {"message": "m", "code": 500}}, Verdict.FAILED),
        (Api.CHAT, {"error": {"message": "m", "code": 400}}, Verdict.REJECTED),
        (Api.CHAT, {"error": {"message": "m"}}, Verdict.UNCLEAR),
        (Api.CHAT, {"answer": 1}, Verdict.UNJUDGED),
        (Api.COMPLETIONS, {"choices": [{"text": "x"}]}, Verdict.PROVEN),
        (Api.RESPONSES, {"status": "completed", "output": []}, Verdict.NO_TOKENS),
        (Api.RESPONSES, {"status": "completed", "output": [{"type": "message", "content": [
            {"type": "output_text", "text": "x"}]}]}, Verdict.PROVEN),
        (Api.RESPONSES, {"status": "queued", "background": True, "output": []}, Verdict.PROVEN),
        (Api.RESPONSES, {"status": "failed", "error": {"code": "server_error"}}, Verdict.FAILED),
        (Api.RESPONSES, {"status": "cancelled", "output": []}, Verdict.ABORTED),
        (Api.MESSAGES, {"content": [{"type": "text", "text": "x"}], "stop_reason": "end_turn"},
         Verdict.PROVEN),
        (Api.MESSAGES, {"content": [{"type": "text", "text": ""}], "stop_reason": "end_turn"},
         Verdict.NO_TOKENS),
        (Api.MESSAGES, {"content": [{"type": "text", "text": ""}]}, Verdict.ABORTED),
        (Api.MESSAGES, {"content": [{"type": "tool_use", "name": "f"}],
         "stop_reason": "tool_use"}, Verdict.PROVEN),
        (Api.OTHER, {"data": [{"embedding": [0.1]}]}, Verdict.PROVEN),
        (Api.OTHER, {"data": []}, Verdict.NO_TOKENS),
        (Api.OTHER, {"text": ""}, Verdict.NO_TOKENS),
        (Api.OTHER, {"count": 0, "tokens": []}, Verdict.PROVEN),
        (Api.OTHER, {"error": {"message": "m", "code": 500}}, Verdict.FAILED),
        (Api.OTHER, {"error": None, "data": [1]}, Verdict.PROVEN),
        (Api.OTHER, {"object": "error", "message": "m", "code": 400}, Verdict.REJECTED),
        (Api.OTHER, {}, Verdict.EMPTY),
        (Api.OTHER, [1], Verdict.UNJUDGED),
    ],
)  # fmt: skip
def test_read_whole_returns_verdict(api, body, verdict):
    assert read_whole(api, json.dumps(body).encode()).verdict is verdict


@pytest.mark.parametrize("api", Api)
@pytest.mark.parametrize(
    ("body", "verdict"),
    [(b"", Verdict.EMPTY), (b" \n", Verdict.EMPTY), (b'{"a": "half', Verdict.UNFINISHED)],
)
def test_read_whole_empty_or_half_body_is_not_whole(api, body, verdict):
    assert read_whole(api, body).verdict is verdict


def test_read_whole_accepts_all_that_python_json_reads():
    assert read_whole(Api.OTHER, b'{"data":[{"embedding":[NaN]}]}').verdict is Verdict.UNJUDGED
    assert read_whole(Api.CHAT, b"[" * 100_000).verdict is Verdict.UNFINISHED


def test_read_whole_finds_usage_before_long_fields():
    usage = {"prompt_tokens": 9, "completion_tokens": 3}
    body = {
        "choices": [{"message": {"content": "x"}, "finish_reason": "stop"}],
        "usage": usage,
        "prompt_logprobs": [None, {"1": {"logprob": -1.0}}] * 4000,
    }
    assert read_whole(Api.CHAT, json.dumps(body).encode()).usage == (9, None, 3)
    body = {"results": [{"index": 0}] * 2000, "usage": usage, "x": "y" * 9000}
    assert read_whole(Api.OTHER, json.dumps(body).encode()).usage == (9, None, 3)


@given(st.integers(1, 900), st.booleans())
def test_usage_scanner_finds_usage_across_pieces(size, spaced):
    body = json.dumps(
        {
            "choices": ["y" * 3000],
            "usage": {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": None},
            "prompt_logprobs": ["x" * 3000, '"usage":{"prompt_tokens":1}'],
        },
        separators=None if spaced else (",", ":"),
    ).encode()
    scanner = UsageScanner()
    for start in range(0, len(body), size):
        scanner.feed(body[start : start + size])
    assert scanner.usage == Usage(9, None, 3)


def test_usage_scanner_ignores_null_and_broken_usage():
    scanner = UsageScanner()
    scanner.feed(b'{"usage":null,"usage":{"prompt_tokens":')
    assert scanner.usage is None
    assert usage_of({"prompt_tokens": True}) is None
    assert usage_of({"prompt_tokens": -1}) is None


def test_usage_scanner_deeply_nested_usage_is_no_usage():
    scanner = UsageScanner()
    scanner.feed(b'{"usage":{"prompt_tokens":' + b"[" * 9000)
    assert scanner.usage is None


@pytest.mark.parametrize("count", [-1, 10**9, 10**30])
def test_read_whole_impossible_counts_are_no_usage(count):
    said = {"prompt_tokens": count, "completion_tokens": 3}
    body = {"choices": [{"text": "x", "finish_reason": "stop"}], "usage": said}
    whole = read_whole(Api.COMPLETIONS, json.dumps(body).encode())
    assert (whole.verdict, whole.usage) == (Verdict.PROVEN, None)
    said = {"prompt_tokens": 3, "completion_tokens": count}
    tail = data({"choices": [{"text": "x", "finish_reason": "stop"}], "usage": said})
    assert read_ending(Api.COMPLETIONS, tail * 2 + END).usage == (3, None, None)


_STRINGS = st.text('"\\[]{}x', max_size=4)


@given(
    st.recursive(
        _STRINGS | st.none(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_STRINGS, inner, max_size=3),
        max_leaves=6,
    ),
    st.integers(1, 9),
    st.data(),
)
@settings(max_examples=50)
def test_json_balance_distinguishes_whole_from_half(value, size, draw):
    body = json.dumps([value]).encode()
    balance = JsonBalance()
    for start in range(0, len(body), size):
        balance.feed(body[start : start + size])
    assert balance.whole
    cut = draw.draw(st.integers(0, len(body) - 1))
    half = JsonBalance()
    half.feed(body[:cut])
    assert not half.whole


# -- the quick readers agree with the tables ------------------------------------------------------

_TEXT = st.sampled_from(["", "x", None])
_REASON = st.sampled_from([None, "stop", "length", "abort", ""])
_USAGE = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "prompt_tokens": st.sampled_from([0, 1, 3, -1, 10**9 - 1, 10**9, 10**30]),
        "completion_tokens": st.sampled_from([0, 1, 2, -1, 10**9 - 1, 10**9, 10**30]),
    },
)
_CHUNK = st.fixed_dictionaries(
    {
        "choices": st.lists(
            st.fixed_dictionaries(
                {"index": st.integers(0, 1)},
                optional={
                    "delta": st.fixed_dictionaries({}, optional={"content": _TEXT}),
                    "text": _TEXT,
                    "finish_reason": _REASON,
                },
            ),
            max_size=2,
        )
    },
    optional={"usage": _USAGE, "error": st.sampled_from([None, "boom", {"code": 400}])},
)


_SAID = st.sampled_from([None, "", "x", [], [{}], [{"id": ""}], {"name": "f"}, 0, 7, {}, False])
_FIRST_CHUNK = st.fixed_dictionaries(
    {
        "choices": st.lists(
            st.fixed_dictionaries(
                {"index": st.integers(0, 1)},
                optional={
                    "delta": st.none()
                    | st.fixed_dictionaries(
                        {"role": st.sampled_from(["assistant", "", None])},
                        optional={"content": _TEXT, "reasoning": _SAID, "tool_calls": _SAID},
                    ),
                    "logprobs": st.none(),
                    "token_ids": st.sampled_from([None, [], [7]]),
                    "message": _SAID,
                    "finish_reason": _REASON,
                },
            ),
            max_size=2,
        )
    },
    optional={
        "usage": _USAGE,
        "object": st.sampled_from(["chat.completion.chunk", "error", None]),
        "type": st.sampled_from(["error", "x"]),
        "error": st.sampled_from([None, "boom", {"code": 400}]),
    },
)


@given(st.lists(_CHUNK | _FIRST_CHUNK, min_size=1, max_size=3), st.sampled_from([b"", b"data: {"]))
def test_quick_opening_signs_agree_with_table(payloads, rest):
    piece = b"".join(map(data, payloads)) + rest
    quickly, slowly = Opening(Api.CHAT), Opening(Api.MESSAGES)  # an API without the quick reader
    signs = quick.opening_signs(piece)
    verdict = slowly.feed(piece)
    assert signs is None or verdict is (Verdict.PROVEN if signs else Verdict.WAIT)
    assert quickly.feed(piece) is verdict
    assert quickly.held == slowly.held == piece


def test_quick_opening_signs_read_first_chunks_of_a_chat():
    # As vLLM 0.32 writes them.
    head = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m",'
    tail = b'"logprobs":null,"finish_reason":null}],"prompt_token_ids":null}\n\n'
    first = head + b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},' + tail
    text = head + b'"choices":[{"index":0,"delta":{"content":"Hi"},' + tail
    thought = head + b'"choices":[{"index":0,"delta":{"reasoning":"Hm"},' + tail
    assert quick.opening_signs(first) == OPENS
    assert quick.opening_signs(first + text + text[:9]) == PROVES
    assert quick.opening_signs(first + thought) is None
    assert quick.opening_signs(first.replace(b"\n\n", b"\r\n\r\n")) is None
    assert quick.opening_signs(b"data: [DONE]\n\n") is None


@given(st.lists(_CHUNK, min_size=1, max_size=4))
def test_quick_ending_agrees_with_table(payloads):
    tail = b"".join(map(data, payloads)) + END
    found = quick.finished_usage(b"\n\n" + tail)
    if found is not None:
        slow = read_ending(Api.CHAT, tail.replace(b"\n", b"\r\n"))
        assert (slow.verdict, slow.usage) == (Verdict.PROVEN, found[0])


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "choices": st.lists(
                st.fixed_dictionaries(
                    {"message": st.fixed_dictionaries({"content": _TEXT})},
                    optional={"finish_reason": _REASON},
                ),
                max_size=2,
            ),
            "usage": _USAGE,
            "error": st.sampled_from([None, "boom"]),
            "status": st.sampled_from(["completed", "failed", "cancelled", None]),
            "stop_reason": st.sampled_from([None, "end_turn"]),
        },
    ),
    st.sampled_from(STREAM_APIS),
)
def test_quick_body_agrees_with_table(payload, api):
    body = json.dumps(payload).encode()
    quick_usage = quick.usage_of_finished(body)
    if quick_usage is None:
        return
    # Only the tables read a byte order mark.
    slow = read_whole(api, b"\xef\xbb\xbf" + body)
    if slow.verdict is not Verdict.UNJUDGED:
        assert (slow.verdict, slow.usage) == (Verdict.PROVEN, quick_usage)


_LONG_TEXT = st.lists(
    st.sampled_from(["x" * 1500, "x" * 9, '"', "\\", '"}', '","', "\n", "é"]), max_size=12
).map("".join)


def long_answer(text: str, other: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "reasoning": other}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    said = {"prompt_tokens": 3, "completion_tokens": 2}
    return {"id": "c", "choices": [choice], "usage": said}


@given(_LONG_TEXT, _LONG_TEXT, st.booleans())
def test_quick_usage_of_long_answers_agrees_with_decoding(text, other, ascii_only):
    value = long_answer(text, other)
    body = json.dumps(value, separators=(",", ":"), ensure_ascii=ascii_only).encode()
    value["choices"][0]["message"]["content"] = ""
    assert json.loads(quick.without_text(body)) in (value, json.loads(body))
    assert quick.chat_usage(body) == quick.usage_of_finished(body) == (3, None, 2)


@given(_LONG_TEXT, st.sampled_from(["", ":", 'a\\"', ","]), st.data())
def test_quick_usage_of_half_an_answer_is_none(text, other, draw):
    body = json.dumps(long_answer(text + "x" * 4096, other), separators=(",", ":")).encode()
    half = body[: draw.draw(st.integers(0, len(body) - 1))]
    assert quick.chat_usage(half) is None
    assert quick.usage_of_finished(half) is None
    assert read_whole(Api.CHAT, half).verdict is (Verdict.UNFINISHED if half else Verdict.EMPTY)


def test_without_text_leaves_out_a_long_text_with_few_quotes():
    text = ("lorem ipsum " * 100 + '"dolor" ') * 9
    body = json.dumps(long_answer(text, ""), separators=(",", ":")).encode()
    assert len(quick.without_text(body)) < 300
    crowded = json.dumps(long_answer('"x"' * 3000, ""), separators=(",", ":")).encode()
    assert quick.without_text(crowded) == crowded


def test_blocks_of_keeps_unfinished_block():
    assert blocks_of(b"data: 1\n\n: c\n\ndata: 2") == ([b"data: 1\n\n"], b"data: 2")
