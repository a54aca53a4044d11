"""Responses of whole exchanges: proof, ends, doubtful errors, and which failures count."""

from __future__ import annotations

import gzip
import json

import pytest
import trio

from support.proxy_harness import Rig, lab
from support.scripted_server import (
    DONE,
    END,
    SSE,
    Script,
    Talk,
    answer,
    answering,
    chunk,
    event,
    ok,
    once,
    sse_head,
    streaming,
)
from vllm_router.proxy.attempt import RETRIED
from vllm_router.proxy.retry import Outcome

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
HELLO, STOP = event("hello"), event("", "stop")
GOOD = streaming(HELLO, STOP, DONE)
PLAIN = b'{"choices":[{"message":{"content":"hi"},"finish_reason":"stop"}]}'
CLOSE = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\nconnection: close\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n%b\r\n"


def failures(rig: Rig, name: str = "a") -> int:
    return rig.server(name).passive_health.failures_in_row


def named(kind: str, **fields: object) -> bytes:
    payload = json.dumps({"type": kind, **fields})
    return f"event: {kind}\ndata: {payload}\n\n".encode()


CREATED = named("response.created", response={"status": "in_progress", "output": []})
DELTA = named("response.output_text.delta", delta="x")
COMPLETED = named(
    "response.completed",
    response={"status": "completed", "usage": {"input_tokens": 9, "output_tokens": 3}},
)
ZERO_RESPONSE = named(
    "response.completed",
    response={"status": "completed", "output": [], "usage": {"output_tokens": 0}},
)
START = named("message_start", message={"content": []})
TEXT = named("content_block_delta", delta={"type": "text_delta", "text": "x"})
FINISH = named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3})
ZERO_MESSAGE = named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 0})
MESSAGE_STOP = named("message_stop")
ROLE = event("").replace(b'"content":""', b'"role":"assistant","content":""')

STREAMS = {
    CHAT: [ROLE, HELLO, STOP, DONE],
    "/v1/completions": [b'data: {"choices":[{"index":0,"text":"x"}]}\n\n', STOP, DONE],
    RESPONSES: [CREATED, DELTA, COMPLETED],
    MESSAGES: [START, TEXT, FINISH, MESSAGE_STOP],
}
OPENINGS = {CHAT: [ROLE], RESPONSES: [CREATED], MESSAGES: [START, b"event: ping\ndata: {}\n\n"]}


# -- a response without proof is a failed attempt --------------------------------------------------

EMPTY: dict[str, bytes] = {
    "no body": ok(b""),
    "no body, no type": b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    "empty stream": sse_head() + END,
    "stream of length 0": answer(200, b"", content_type=SSE),
    "white space": ok(b" \n"),
    "{}": ok(b"{}"),
    "null": ok(b"null"),
    "no choices": ok(b'{"choices":[]}'),
    "a choice of nothing": ok(b'{"choices":[{"message":{"role":"assistant","content":""}}]}'),
    "only a role": sse_head() + chunk(ROLE) + END,
    "only DONE": sse_head() + chunk(DONE) + END,
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("watched", [False, True])
async def test_exchange_empty_200_is_retried_and_counted(autojump_clock, case, watched):
    async with lab(answering(EMPTY[case]), GOOD, watched=watched) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert (got.status, got.body) == (200, HELLO + STOP + DONE)
        assert rig.recorder.outcomes == [Outcome.EMPTY, Outcome.ANSWERED]
        assert failures(rig) == 1


async def test_exchange_empty_200_from_all_servers_is_502(autojump_clock):
    async with lab(*[answering(EMPTY["no body"])] * 2) as rig:
        got = await rig.post()
        assert (got.status, got.code) == (502, "empty_answer")


NO_CONTENT = {
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "204 of a stream": b"HTTP/1.1 204 No Content\r\ncontent-type: text/event-stream\r\n\r\n",
    "204 of JSON": b"HTTP/1.1 204 No Content\r\ncontent-type: application/json\r\n\r\n",
    "204 with a body": b"HTTP/1.1 204 No Content\r\n\r\n{}",
    "205": b"HTTP/1.1 205 Reset Content\r\ncontent-length: 0\r\n\r\n",
}


@pytest.mark.parametrize("case", NO_CONTENT)
async def test_exchange_no_content_is_asked_of_one_more_server(autojump_clock, case):
    async with lab(once(NO_CONTENT[case]), GOOD) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert (got.status, got.body) == (200, HELLO + STOP + DONE)
        assert rig.recorder.outcomes == [Outcome.NO_TOKENS, Outcome.ANSWERED]
        assert failures(rig) == 1


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("case", NO_CONTENT)
async def test_exchange_no_content_from_all_servers_is_the_answer(autojump_clock, case, servers):
    async with lab(*[once(NO_CONTENT[case])] * servers) as rig:
        got = await rig.post()
        assert (got.status, got.body, got.whole) == (int(case[:3]), b"", True)
        assert failures(rig) == 0


async def test_exchange_server_of_empty_200s_attracts_no_load(autojump_clock):
    async with lab(answering(EMPTY["no body"]), GOOD, GOOD) as rig:
        for _ in range(40):
            assert (await rig.stream()).body.endswith(DONE)
        assert rig.requests()["a"] <= 6


@pytest.mark.parametrize("path", OPENINGS)
async def test_exchange_opening_events_do_not_commit(autojump_clock, path):
    """The server closes the connection in order after them."""

    async def dies(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head(), *map(chunk, OPENINGS[path]))
        await trio.sleep(0.5)

    async with lab(dies, streaming(*STREAMS[path])) as rig:
        rig.prefer("a")
        got = await rig.stream(path=path)
        assert got.body == b"".join(STREAMS[path])
        assert got.whole
        assert got[b"x-vllm-router-server"] == b"b"
        assert failures(rig) == 1


@pytest.mark.parametrize(
    ("path", "first"),
    [
        (CHAT, b'data: {"error":{"message":"EngineCore died","code":500}}\n\n'),
        (CHAT, b'data: {"error": {"message":"EngineCore\\u0020died",\ndata: "code" : 500}}\n\n'),
        (CHAT, b'\xef\xbb\xbfdata:  {"error":{"message":"m","type":"InternalServerError"}}\n\n'),
        (MESSAGES, named("error", error={"type": "api_error", "message": "EngineCore died"})),
        (RESPONSES, named("response.failed", response={"error": {"code": "server_error"}})),
        (RESPONSES, CREATED + named("error", code="server_error", message="m")),
    ],
)
async def test_exchange_server_error_before_first_token_is_retried(autojump_clock, path, first):
    async with lab(streaming(first), streaming(*STREAMS[path])) as rig:
        rig.prefer("a")
        got = await rig.stream(path=path)
        assert got.body == b"".join(STREAMS[path])
        assert rig.recorder.outcomes == [Outcome.ERROR_EVENT, Outcome.ANSWERED]
        assert failures(rig) == 1


# -- doubtful responses ----------------------------------------------------------------------------

NO_TOKENS = {
    CHAT: [ROLE, STOP, DONE],
    RESPONSES: [CREATED, ZERO_RESPONSE],
    MESSAGES: [START, ZERO_MESSAGE, MESSAGE_STOP],
}


@pytest.mark.parametrize("path", NO_TOKENS)
async def test_exchange_end_without_tokens_counts_if_other_server_has_tokens(autojump_clock, path):
    async with lab(streaming(*NO_TOKENS[path]), streaming(*STREAMS[path])) as rig:
        rig.prefer("a")
        got = await rig.stream(path=path)
        assert got.body == b"".join(STREAMS[path])
        assert rig.recorder.outcomes == [Outcome.NO_TOKENS, Outcome.ANSWERED]
        assert failures(rig) == 1


@pytest.mark.parametrize("path", NO_TOKENS)
@pytest.mark.parametrize("servers", [1, 2, 4])
@pytest.mark.parametrize("watched", [False, True])
async def test_exchange_stream_without_tokens_from_two_servers_passes(
    autojump_clock, path, servers, watched
):
    async with lab(*[streaming(*NO_TOKENS[path])] * servers, watched=watched) as rig:
        got = await rig.stream(path=path)
        assert (got.status, got.body, got.whole) == (200, b"".join(NO_TOKENS[path]), True)
        assert rig.requests().total() == min(servers, 2)
        assert not any(failures(rig, server.name) for server in rig.servers)
        assert rig.recorder.last.outcome is Outcome.ANSWERED


async def test_exchange_json_without_tokens_from_two_servers_passes(autojump_clock):
    body = b'{"choices":[{"message":{"content":""},"finish_reason":"stop"}]}'
    async with lab(*[answering(ok(body))] * 3) as rig:
        got = await rig.post()
        assert (got.status, got.body, got.whole) == (200, body, True)
        assert got[b"content-length"] == b"%d" % len(body)
        assert rig.requests().total() == 2


async def test_exchange_end_without_tokens_passes_if_other_server_fails(autojump_clock):
    async with lab(streaming(*NO_TOKENS[CHAT]), once()) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert (got.body, got.whole) == (b"".join(NO_TOKENS[CHAT]), True)
        assert (failures(rig, "a"), failures(rig, "b")) == (0, 1)


async def test_exchange_end_without_tokens_after_comments_passes(autojump_clock):
    script = streaming(b": c\n\n", *NO_TOKENS[CHAT])
    async with lab(script, script) as rig:
        got = await rig.stream()
        assert got.body.startswith(b": c\n\n")
        assert got.body.endswith(b"".join(NO_TOKENS[CHAT]))
        assert got.whole


UNCLEAR = [
    b'data: {"error":{"message":"boom"}}\n\n',
    b'data: {"error":{"message":"boom","type":"Strange","code":"odd"}}\n\n',
    b'data: {"error":"boom"}\n\n',
    named("error", error={"type": "internal_error", "message": "1 validation error for X"}),
]


@pytest.mark.parametrize("first", UNCLEAR)
async def test_exchange_unclear_error_from_two_servers_counts_for_neither(autojump_clock, first):
    async with lab(*[streaming(first, DONE)] * 3) as rig:
        for _ in range(8):
            got = await rig.stream()
            assert (got.body, got.whole) == (first + DONE, True)
        assert not any(failures(rig, server.name) for server in rig.servers)
        assert set(rig.recorder.outcomes) == {Outcome.UNCLEAR_ERROR}


@pytest.mark.parametrize("first", UNCLEAR)
async def test_exchange_unclear_error_counts_if_other_server_answers(autojump_clock, first):
    async with lab(streaming(first, DONE), GOOD) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert got.body == HELLO + STOP + DONE
        assert failures(rig) == 1


async def test_exchange_responses_stream_cut_by_all_servers_counts_for_none(autojump_clock):
    """vLLM 0.32 ends requests with an invalid grammar or stop tokens that way."""
    cut = once(sse_head(), chunk(CREATED))
    async with lab(cut, cut, cut) as rig:
        for _ in range(4):
            got = await rig.stream(path=RESPONSES)
            assert (got.status, got.code) == (502, "server_disconnected")
        assert not any(failures(rig, server.name) for server in rig.servers)
        assert set(rig.recorder.outcomes) == {Outcome.OPENED_LOST}


# -- which failures count ----------------------------------------------------------------------

CLIENT_ERRORS = {
    "integer code": b'data: {"error":{"message":"too long","code":400}}\n\n',
    "string code": b'data: {"error":{"message":"too long","code":"400"}}\n\n',
    "type": b'data: {"error":{"message":"no","type":"invalid_request_error","code":null}}\n\n',
    "message": b'data: {"error":{"message":"maximum context length is 8 tokens"}}\n\n',
    "TGI": b'data: {"error":"Input validation error","error_type":"validation"}\n\n',
    "old vLLM": b'data: {"object":"error","message":"no","code":400}\n\n',
    "Anthropic": named("error", error={"type": "invalid_request_error", "message": "no"}),
}


@pytest.mark.parametrize("case", CLIENT_ERRORS)
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
async def test_exchange_client_error_in_stream_passes_uncounted(autojump_clock, case, path):
    first = CLIENT_ERRORS[case]
    async with lab(streaming(first, DONE), GOOD) as rig:
        rig.prefer("a")
        for _ in range(4):
            rig.prefer("a")
            got = await rig.stream(path=path)
            assert got.body in (first + DONE, HELLO + STOP + DONE)
        assert failures(rig) == 0
        assert Outcome.ANSWERED in rig.recorder.outcomes
        assert set(rig.recorder.outcomes) == {Outcome.ANSWERED}


async def test_exchange_null_error_beside_tokens_is_no_error(autojump_clock):
    token = HELLO.replace(b'data: {"id"', b'data: {"error":null,"id"')
    async with lab(streaming(token, STOP, DONE)) as rig:
        for _ in range(5):
            assert (await rig.stream()).whole
        assert failures(rig) == 0


async def test_exchange_client_error_after_tokens_is_not_counted(autojump_clock):
    async with lab(streaming(HELLO, CLIENT_ERRORS["string code"], DONE)) as rig:
        assert (await rig.stream()).whole
        assert failures(rig) == 0


async def test_exchange_busy_event_is_retried_uncounted(autojump_clock):
    busy = named("error", error={"type": "overloaded_error", "message": "m"})
    async with lab(streaming(busy), streaming(*STREAMS[MESSAGES])) as rig:
        rig.prefer("a")
        got = await rig.stream(path=MESSAGES)
        assert got.body == b"".join(STREAMS[MESSAGES])
        assert rig.recorder.outcomes == [Outcome.FULL, Outcome.ANSWERED]
        assert failures(rig) == 0


# -- ends --------------------------------------------------------------------------------------

CUTS = {CHAT: 2, "/v1/completions": 1, RESPONSES: 2, MESSAGES: 2}


@pytest.mark.parametrize("path", CUTS)
@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
@pytest.mark.parametrize("watched", [False, True])
async def test_exchange_stream_with_tokens_without_end_is_truncated(
    autojump_clock, path, framing, watched
):
    events = b"".join(STREAMS[path][: CUTS[path]])
    script = {
        "chunked": answering(sse_head(), chunk(events), END),
        "close": once(CLOSE % SSE, events),
        "length": answering(answer(200, events, content_type=SSE)),
    }[framing]
    async with lab(script, GOOD, watched=watched) as rig:
        rig.prefer("a")
        got = await rig.stream(path=path)
        assert got.status == 200
        assert got.body.startswith(events)
        assert b"error" in got.body[len(events) :]
        assert not got.whole
        assert rig.recorder.outcomes == [Outcome.TRUNCATED]
        assert failures(rig) == 1


@pytest.mark.parametrize("path", CUTS)
@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
async def test_exchange_stream_with_end_is_whole_in_any_framing(autojump_clock, path, framing):
    events = b"".join(STREAMS[path])
    script = {
        "chunked": answering(sse_head(), *map(chunk, STREAMS[path]), END),
        "close": once(CLOSE % SSE, events),
        "length": answering(answer(200, events, content_type=SSE)),
    }[framing]
    async with lab(script) as rig:
        got = await rig.stream(path=path)
        assert (got.body, got.whole) == (events, True)
        assert rig.recorder.outcomes == [Outcome.ANSWERED]


async def test_exchange_stream_closed_inside_event_adds_nothing(autojump_clock):
    async with lab(once(CLOSE % SSE, HELLO, HELLO[:25])) as rig:
        got = await rig.stream()
        assert (got.body, got.whole) == (HELLO + HELLO[:25], False)


async def test_exchange_finished_chat_stream_needs_no_done(autojump_clock):
    async with lab(once(CLOSE % SSE, HELLO, STOP)) as rig:
        got = await rig.stream()
        assert (got.body, got.whole) == (HELLO + STOP, True)


async def test_exchange_stream_of_unknown_events_needs_no_end(autojump_clock):
    async with lab(streaming(b'data: {"delta":"tok"}\n\n')) as rig:
        got = await rig.stream(path=RESPONSES)
        assert (got.body, got.whole) == (b'data: {"delta":"tok"}\n\n', True)
        assert failures(rig) == 0


@pytest.mark.parametrize("framing", ["close", "length"])
async def test_exchange_half_json_is_retried_in_any_framing(autojump_clock, framing):
    half = PLAIN[:-20]
    script = once(CLOSE % b"application/json", half) if framing == "close" else answering(ok(half))
    async with lab(script, answering(ok(PLAIN))) as rig:
        rig.prefer("a")
        got = await rig.post()
        assert (got.body, got.whole) == (PLAIN, True)
        assert rig.recorder.outcomes == [Outcome.UNFINISHED, Outcome.ANSWERED]


async def test_exchange_long_json_cut_at_close_is_truncated(autojump_clock):
    long = json.dumps({"data": ["{" * 50] * 20_000}).encode()
    async with lab(once(CLOSE % b"application/json", long[:-2])) as rig:
        got = await rig.post(path="/v1/embeddings")
        assert (got.status, got.body, got.whole) == (200, long[:-2], False)
        assert rig.recorder.outcomes == [Outcome.TRUNCATED]
    async with lab(once(CLOSE % b"application/json", long)) as rig:
        assert (await rig.post(path="/v1/embeddings")).whole


# -- aborts ------------------------------------------------------------------------------------

ABORTED = {
    CHAT: b'{"choices":[{"message":{"content":"half"},"finish_reason":"abort"}]}',
    MESSAGES: b'{"type":"message","content":[{"type":"text","text":"half"}],'
    b'"usage":{"input_tokens":3,"output_tokens":2}}',
}


@pytest.mark.parametrize("path", ABORTED)
async def test_exchange_json_abort_with_tokens_passes(autojump_clock, path):
    async with lab(answering(ok(ABORTED[path])), answering(ok(PLAIN))) as rig:
        rig.prefer("a")
        got = await rig.post(path=path)
        assert (got.status, got.body) == (200, ABORTED[path])
        assert rig.recorder.attempts == [("a", Outcome.ENGINE_ABORT)]
        assert failures(rig) == 0


@pytest.mark.parametrize("path", ABORTED)
async def test_exchange_json_abort_of_stopping_server_is_retried(autojump_clock, path):
    async def stops(talk: Talk) -> None:
        await talk.request()
        talk.server.refuses = True
        await talk.send(ok(ABORTED[path]))

    async with lab(stops, answering(ok(PLAIN))) as rig:
        rig.prefer("a")
        got = await rig.post(path=path)
        assert (got.status, got.body) == (200, PLAIN)
        assert rig.recorder.outcomes == [Outcome.ABORTED, Outcome.ANSWERED]


# -- unreadable responses ----------------------------------------------------------------------


async def test_exchange_compressed_stream_passes_unbuffered(autojump_clock):
    packed = gzip.compress(HELLO + DONE)

    async def slow(talk: Talk) -> None:
        await talk.request()
        await talk.send(CHUNKED % (SSE, b"content-encoding: gzip\r\n"), chunk(packed[:10]))
        await trio.sleep(20)
        await talk.send(chunk(packed[10:]), END)

    async with lab(slow) as rig:
        client = rig.start_stream()
        await trio.sleep(0.1)
        assert client.got.body == packed[:10]
        await trio.sleep(21)
        assert (client.got.body, client.got.whole) == (packed, True)


async def test_exchange_compressed_stream_that_breaks_is_cut_short(autojump_clock):
    packed = gzip.compress(HELLO + DONE)
    head = CHUNKED % (SSE, b"content-encoding: gzip\r\n")
    async with lab(once(head, chunk(packed[:20]))) as rig:
        got = await rig.stream()
        assert (got.body, got.whole) == (packed[:20], False)


@pytest.mark.parametrize(
    "kind", [b"application/jsonl", b"application/json-seq", b"application/x-ndjson", b"audio/wav"]
)
async def test_exchange_lines_and_audio_pass_unbuffered(autojump_clock, kind):
    async def slow(talk: Talk) -> None:
        await talk.request()
        await talk.send(CHUNKED % (kind, b""), chunk(b"{}\n"))
        await trio.sleep(20)
        await talk.send(chunk(b"{}\n"), END)

    async with lab(slow) as rig:
        client = rig.start(path="/v1/embeddings")
        await trio.sleep(0.1)
        assert client.got.body == b"{}\n"
        await trio.sleep(21)
        assert (client.got.body, client.got.whole) == (b"{}\n" * 2, True)


async def test_exchange_white_space_before_json_passes_and_is_retried(autojump_clock):
    async def beats(talk: Talk) -> None:
        await talk.request()
        await talk.send(CHUNKED % (b"application/json", b""))
        for _ in range(3):
            await talk.send(chunk(b" "))
            await trio.sleep(10)

    async with lab(beats, answering(ok(PLAIN))) as rig:
        rig.prefer("a")
        client = rig.start()
        await trio.sleep(0.1)
        assert (client.got.status, client.got.body) == (200, b" ")
        assert client.got[b"content-length"] is None
        await trio.sleep(31)
        assert (client.got.body, client.got.whole) == (b"   " + PLAIN, True)


async def test_exchange_white_space_before_json_without_server_is_cut_short(autojump_clock):
    async def beats(talk: Talk) -> None:
        await talk.request()
        await talk.send(CHUNKED % (b"application/json", b""), chunk(b" "))

    async with lab(beats) as rig:
        got = await rig.post()
        assert (got.status, got.body, got.whole) == (200, b" ", False)


@pytest.mark.parametrize("status", [0, 99, 600, 999])
async def test_exchange_status_out_of_range_is_protocol_error(autojump_clock, status):
    raw = b"HTTP/1.1 %03d X\r\ncontent-length: 2\r\n\r\n{}" % status
    async with lab(answering(raw), answering(ok(PLAIN))) as rig:
        rig.prefer("a")
        assert (await rig.post()).body == PLAIN
        assert rig.recorder.outcomes == [Outcome.PROTOCOL_ERROR, Outcome.ANSWERED]


@pytest.mark.parametrize("status", [520, 521, 525, 530, 598])
async def test_exchange_gateway_status_is_retried(autojump_clock, status):
    async with lab(answering(answer(status, b"<html>")), answering(ok(PLAIN))) as rig:
        rig.prefer("a")
        assert (await rig.post()).body == PLAIN
        assert rig.recorder.outcomes == [Outcome.SERVER_ERROR, Outcome.ANSWERED]


# -- usage -------------------------------------------------------------------------------------

COUNTS = b'"usage":{"prompt_tokens":9,"completion_tokens":3}'
LONG = b"x" * 9000


@pytest.mark.parametrize(
    ("path", "script"),
    [
        (
            CHAT,
            answering(ok(PLAIN[:-1] + b"," + COUNTS + b',"prompt_logprobs":"' + LONG + b'"}')),
        ),
        (CHAT, answering(ok(PLAIN[:-1] + b"," + COUNTS + b',"x":"' + LONG * 60 + b'"}'))),
        (
            CHAT,
            streaming(
                HELLO, STOP, b'data: {"choices":[],' + COUNTS + b',"x":"' + LONG + b'"}\n\n', DONE
            ),
        ),
        (
            RESPONSES,
            streaming(CREATED, DELTA, COMPLETED.replace(b'"usage"', b'"a":"%b","usage"' % LONG)),
        ),
        ("/v1/rerank", answering(ok(b'{' + COUNTS + b',"results":["' + LONG + b'"]}'))),
    ],
)  # fmt: skip
async def test_exchange_usage_is_found_in_any_position(autojump_clock, path, script):
    async with lab(script) as rig:
        got = await rig.stream(path=path)
        assert got.whole
        record = rig.recorder.last
        assert (record.prompt_tokens, record.completion_tokens) == (9, 3)


async def test_exchange_long_last_event_in_small_pieces_is_read(autojump_clock):
    last = COMPLETED.replace(b'"usage"', b'"a":"%b","usage"' % (LONG * 20))
    pieces = [last[start : start + 700] for start in range(0, len(last), 700)]
    async with lab(streaming(CREATED, DELTA, *pieces)) as rig:
        got = await rig.stream(path=RESPONSES)
        assert got.whole
        assert rig.recorder.last.completion_tokens == 3
        assert rig.recorder.outcomes == [Outcome.ANSWERED]


async def test_exchange_retry_after_comments_is_announced_by_comment(autojump_clock):
    async def dies(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head(), chunk(b": c\n\n"))
        await trio.sleep(1)

    scripts: tuple[Script, ...] = (dies, GOOD)
    async with lab(*scripts) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert got.body == b": c\n\n" + RETRIED + HELLO + STOP + DONE


PLAIN_ERROR = b'{"error":\n  {"message":"temperature must be in [0, 2]",\n   "code":400}}'


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n"])
async def test_exchange_plain_client_error_of_stream_type_is_an_event(autojump_clock, path, ending):
    """A client of a stream sees nothing in a body without an event."""
    script = answering(answer(200, PLAIN_ERROR + ending, content_type=SSE))
    async with lab(script, script) as rig:
        got = await rig.stream(path=path)
        *_, line = got.body.rstrip().split(b"\n")
        assert json.loads(line.removeprefix(b"data: ")) == json.loads(PLAIN_ERROR)
        assert got.body.startswith(b"data: " if path == CHAT else b"event: error\ndata: ")
        assert got.body.endswith(b"}\n\n")
        assert got.whole
        assert rig.recorder.outcomes == [Outcome.ANSWERED]
        assert (failures(rig, "a"), failures(rig, "b")) == (0, 0)


async def test_exchange_plain_error_of_stream_type_has_key_that_clients_look_for(autojump_clock):
    body = b'{"object":"error","message":"top_p is too high","code":400}'
    async with lab(answering(answer(200, body, content_type=SSE))) as rig:
        got = await rig.stream()
        assert got.body == b'data: {"error": ' + body + b"}\n\n"
        assert rig.recorder.outcomes == [Outcome.ANSWERED]


async def test_exchange_plain_server_error_of_stream_type_is_retried(autojump_clock):
    body = b'{"error":{"message":"EngineCore died","code":500}}'
    async with lab(answering(answer(200, body, content_type=SSE)), GOOD) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert got.body == b"".join((HELLO, STOP, DONE))
        assert rig.recorder.outcomes == [Outcome.ERROR_EVENT, Outcome.ANSWERED]


@pytest.mark.parametrize("coding", [b"identity", b"Identity", b"none", b"utf-8"])
async def test_exchange_stream_with_coding_that_packs_nothing_is_judged(autojump_clock, coding):
    head = CHUNKED % (SSE, b"content-encoding: " + coding + b"\r\n")
    async with lab(answering(head, END), answering(head, chunk(HELLO), END)) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert not got.whole
        assert got.body.startswith(HELLO + b'data: {"error"')
        assert rig.recorder.outcomes == [Outcome.EMPTY, Outcome.TRUNCATED]


def named(kind: str, **fields: object) -> bytes:
    said = json.dumps({"type": kind, **fields}).encode()
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), said)


LONG_TEXT = "x" * 2_500_000


@pytest.mark.parametrize(
    ("last", "outcome"),
    [
        ("response.completed", Outcome.ANSWERED),
        ("response.incomplete", Outcome.ANSWERED),
        ("response.failed", Outcome.UNCLEAR_ERROR),
        ("response.output_item.done", Outcome.TRUNCATED),
    ],
)
@pytest.mark.parametrize("is_named", [True, False])
async def test_exchange_last_event_longer_than_kept_is_known_by_name(
    autojump_clock, last, outcome, is_named
):
    """The last event repeats instructions and tools of the request."""
    usage = {"input_tokens": 9, "output_tokens": 3}
    inner = {"status": "completed", "instructions": LONG_TEXT, "usage": usage}
    final = named(last, response=inner)
    if not is_named:
        final = final.partition(b"\n")[2]
    created = named("response.created", response={"status": "in_progress"})
    delta = named("response.output_text.delta", delta="hi")
    pieces = [final[at : at + 65536] for at in range(0, len(final), 65536)]
    async with lab(streaming(created, delta, *pieces)) as rig:
        got = await rig.stream(path=RESPONSES)
        assert rig.recorder.outcomes == [outcome]
        assert got.whole is (outcome is not Outcome.TRUNCATED)
        assert rig.recorder.last.completion_tokens == 3
        assert failures(rig) == (outcome is Outcome.TRUNCATED)


@pytest.mark.parametrize("is_whole", [True, False])
async def test_exchange_long_json_in_chunks_must_be_whole(autojump_clock, is_whole):
    """A proxy before the server may write the last chunk after half an answer."""
    body = b'{"data":[' + b",".join([b'{"embedding":[1,2]}'] * 20_000) + b"]}" * is_whole
    head = CHUNKED % (b"application/json", b"")
    async with lab(answering(head, chunk(body), END)) as rig:
        got = await rig.post({"model": "m"}, path="/v1/embeddings")
        assert (got.status, got.body, got.whole) == (200, body, is_whole)
        assert rig.recorder.outcomes == [Outcome.ANSWERED if is_whole else Outcome.TRUNCATED]


PACKED = b"content-encoding: gzip\r\n"


@pytest.mark.parametrize(
    "empty",
    [
        answer(200, b"", PACKED.strip()),
        CHUNKED % (b"application/json", PACKED) + END,
        CHUNKED % (SSE, PACKED) + END,
    ],
    ids=["length", "chunks", "stream"],
)
async def test_exchange_compressed_200_of_no_bytes_is_retried(autojump_clock, empty):
    async with lab(answering(empty), answering(ok(PLAIN))) as rig:
        rig.prefer("a")
        assert (await rig.post()).body == PLAIN
        assert rig.recorder.outcomes == [Outcome.EMPTY, Outcome.ANSWERED]
