"""Streams: not committed before the first event, and never a truncated one taken for whole."""

from __future__ import annotations

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
from vllm_router.proxy.record import Phase
from vllm_router.proxy.retry import RULES, Outcome

pytestmark = pytest.mark.usefixtures("socket_kind")

HELLO = event("hello")
GOOD = streaming(HELLO, event("", "stop"), DONE)
ERROR = b'data: {"error": {"message": "EngineCore encountered an issue.", "code": %d}}\n\n'
COMMENT = b": keep-alive\n\n"


def failures(rig: Rig, name: str = "a") -> int:
    return rig.server(name).passive_health.failures_in_row


def after_hello(*rest: bytes) -> Script:
    return once(sse_head(), chunk(HELLO), *rest)


def last_event(body: bytes) -> dict:
    assert body.endswith(b"\n\n")
    block = body[:-2].rsplit(b"\n\n", 1)[-1]
    (data,) = [line for line in block.split(b"\n") if line.startswith(b"data: ")]
    return json.loads(data[6:])


# -- the held head -----------------------------------------------------------------------------


async def test_stream_passes_unbuffered(autojump_clock):
    async def slow(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        for text in "abc":
            await trio.sleep(1)
            await talk.send(chunk(event(text)))
        await talk.send(chunk(DONE), END)

    async with lab(slow) as rig:
        began = trio.current_time()
        got = await rig.stream()
        assert got.pieces[:3] == [event("a"), event("b"), event("c")]
        assert got.first_at == began + 1
        assert got.whole
        assert got[b"content-type"] == SSE
        assert rig.recorder.last.first_byte == 1
        assert rig.recorder.outcomes == [Outcome.ANSWERED]


async def test_stream_server_crash_after_head_is_retried(autojump_clock):
    async def head_then_death(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        await trio.sleep(1)

    async with lab(head_then_death, GOOD) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert (got.status, got.whole) == (200, True)
        assert got[b"x-vllm-router-server"] == b"b"
        assert rig.recorder.outcomes == [Outcome.CONNECTION_LOST, Outcome.ANSWERED]


async def test_stream_head_goes_to_client_after_two_seconds_uncommitted(autojump_clock):
    """Clients with a limit for the response head (undici: 300 s) do not time out."""

    async def head_then_death(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        await trio.sleep(5)

    async with lab(head_then_death, GOOD) as rig:
        rig.prefer("a")
        client = rig.start_stream()
        await trio.sleep(1.9)
        assert client.got.status == 0
        await trio.sleep(0.2)
        assert (client.got.status, client.got.pieces) == (200, [])
        await trio.sleep(4)
        assert client.got.body == RETRIED + HELLO + event("", "stop") + DONE
        assert client.got.whole
        assert rig.recorder.outcomes == [Outcome.CONNECTION_LOST, Outcome.ANSWERED]


async def test_stream_comments_pass_at_once_and_stream_is_retried(autojump_clock):
    async def queued(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head(), chunk(COMMENT))
        await trio.sleep(30)
        await talk.send(chunk(COMMENT), chunk(OPENING))
        await trio.sleep(30)

    async with lab(queued, GOOD) as rig:
        rig.prefer("a")
        client = rig.start_stream()
        await trio.sleep(0.1)
        assert (client.got.status, client.got.body) == (200, COMMENT)
        await trio.sleep(30)
        assert client.got.body == COMMENT * 2
        await trio.sleep(31)
        assert client.got.body == COMMENT * 2 + RETRIED + HELLO + event("", "stop") + DONE
        assert client.got.whole
        assert rig.recorder.outcomes == [Outcome.CONNECTION_LOST, Outcome.ANSWERED]


async def test_stream_first_byte_time_is_first_output(autojump_clock):
    async def queued(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        for _ in range(4):
            await talk.send(chunk(COMMENT))
            await trio.sleep(2)
        await talk.send(chunk(OPENING), chunk(HELLO), chunk(DONE), END)

    async with lab(queued) as rig:
        got = await rig.stream()
        assert got.body == COMMENT * 4 + OPENING + HELLO + DONE
        assert rig.recorder.last.first_byte == 8


async def test_stream_head_sent_and_no_server_left_ends_with_error_event(autojump_clock):
    async def queued(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head(), chunk(COMMENT))
        await trio.sleep(1)

    async with lab(queued, queued) as rig:
        got = await rig.stream()
        assert got.status == 200
        assert got.body.startswith(COMMENT)
        assert last_event(got.body)["error"]["code"] == "server_disconnected"
        assert not got.whole
        record = rig.recorder.last
        assert (record.status, record.code) == (200, "server_disconnected")
        assert rig.recorder.outcomes == [Outcome.CONNECTION_LOST, Outcome.CONNECTION_LOST]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"error":{"message":"too long","code":400}}', "too long"),
        (b'{"error":{"code":400}}', "The server answered 400."),
    ],
)
async def test_stream_head_sent_and_other_server_rejects_passes_reason(
    autojump_clock, body, reason
):
    async def queued(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head(), chunk(COMMENT))
        await trio.sleep(1)

    async with lab(queued, answering(answer(400, body))) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert last_event(got.body)["error"]["message"] == reason
        assert not got.whole
        assert failures(rig, "b") == 0
        record = rig.recorder.last
        assert (record.status, record.code, record.phase) == (200, "late_error", Phase.STREAM)


async def test_stream_comments_reset_idle_timeout(autojump_clock):
    async def alive(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        for _ in range(60):
            await talk.send(chunk(COMMENT))
            await trio.sleep(2)
        await talk.send(chunk(HELLO), chunk(DONE), END)

    async with lab(alive, request_timeout=5) as rig:
        got = await rig.stream()
        assert (got.status, got.whole) == (200, True)
        assert failures(rig) == 0


async def test_stream_line_without_end_is_held_up_to_limit(autojump_clock):
    async def endless(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        while True:
            await talk.send(chunk(b"x" * 50_000))

    async with lab(endless) as rig:
        client = rig.start_stream()
        await client.heard.wait()
        assert len(client.got.pieces[0]) < 1_200_000
        client.leave()


# vLLM 0.32's answer to a queued request when it is stopped with a grace period.
OPENING = (
    b'data: {"id":"chatcmpl-8ff5","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
    b'"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}\n\n'
)
USAGE = (
    b'data: {"id":"chatcmpl-8ff5","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[],"usage":{"prompt_tokens":16,"total_tokens":16,"completion_tokens":0}}\n\n'
)

# -- failures before the first event -----------------------------------------------------------

DEAD_FIRST = {
    "error event": ([ERROR % 500, DONE], Outcome.ERROR_EVENT),
    "error event after a comment": ([COMMENT, ERROR % 500, DONE], Outcome.ERROR_EVENT),
    "abort at once": ([event("", "abort"), DONE], Outcome.ABORTED),
    "no token": ([OPENING, USAGE, DONE], Outcome.EMPTY),
    "no token, all at once": ([OPENING + USAGE + DONE], Outcome.EMPTY),
    "no token, abort": ([OPENING, event("", "abort"), DONE], Outcome.ABORTED),
    "no token, nor its end": ([OPENING], Outcome.EMPTY),
    "no event": ([], Outcome.EMPTY),
    "comments only": ([COMMENT, COMMENT], Outcome.EMPTY),
    "half an event": ([HELLO[:40]], Outcome.EMPTY),
    "error event in pieces": (
        [(ERROR % 500)[:9], (ERROR % 500)[9:30], (ERROR % 500)[30:], DONE],
        Outcome.ERROR_EVENT,
    ),
}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("case", DEAD_FIRST)
async def test_stream_without_proof_is_retried_and_counted(autojump_clock, case, watched):
    pieces, outcome = DEAD_FIRST[case]
    async with lab(streaming(*pieces), GOOD, watched=watched) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert got.body.endswith(HELLO + event("", "stop") + DONE)
        assert got.whole
        assert rig.recorder.outcomes == [outcome, Outcome.ANSWERED]
        assert failures(rig) == 1


@pytest.mark.parametrize("case", DEAD_FIRST)
async def test_stream_without_proof_or_other_server_is_error(autojump_clock, case):
    pieces, outcome = DEAD_FIRST[case]
    async with lab(streaming(*pieces)) as rig:
        got = await rig.stream()
        code = RULES[outcome].code
        if COMMENT in pieces:
            assert (got.status, last_event(got.body)["error"]["code"]) == (200, code)
            assert not got.whole
        else:
            assert (got.status, got.code) == (502, code)


async def test_stream_client_error_passes_uncounted(autojump_clock):
    async with lab(streaming(ERROR % 400, DONE), GOOD) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert got.body == ERROR % 400 + DONE
        assert rig.recorder.outcomes == [Outcome.ANSWERED]
        assert failures(rig) == 0


async def test_stream_refusal_passes(autojump_clock):
    raw = answer(400, ERROR % 400, content_type=SSE)
    async with lab(answering(raw)) as rig:
        got = await rig.stream()
        assert (got.status, got.body) == (400, ERROR % 400)


# -- failures in mid-stream --------------------------------------------------------------------


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(
    ("path", "code_in"),
    [
        ("/v1/chat/completions", lambda e: e["error"]["code"]),
        ("/v1/completions", lambda e: e["error"]["code"]),
        ("/v1/responses", lambda e: e["code"]),
        ("/v1/messages", lambda e: "server_disconnected" if e["type"] == "error" else None),
    ],
)
async def test_stream_crash_adds_one_error_event_and_no_end(autojump_clock, path, code_in, watched):
    async with lab(after_hello(), GOOD, watched=watched) as rig:
        rig.prefer("a")
        got = await rig.stream(path=path)
        assert got.status == 200
        assert got.body.startswith(HELLO)
        assert got.body.count(b"\n\n") == 2
        assert code_in(last_event(got.body)) == "server_disconnected"
        assert DONE not in got.body
        assert not got.whole
        assert rig.recorder.attempts == [("a", Outcome.TRUNCATED)]
        assert rig.recorder.last.code == "server_disconnected"
        assert failures(rig) == 1


@pytest.mark.parametrize("cut", [b'data: {"id', b'data: {"id":1}\n', b"data: {}\r\n", b"da"])
async def test_stream_cut_inside_an_event_adds_nothing(autojump_clock, cut):
    """A blank line would make half an event count, and SDKs fail to decode it."""
    async with lab(after_hello(chunk(cut))) as rig:
        got = await rig.stream()
        assert got.body == HELLO + cut
        assert not got.whole
        assert rig.recorder.last.code == "server_disconnected"


@pytest.mark.parametrize("garbage", [b"zz\r\nxx", b"-1\r\n", b"\r\n\r\n"])
async def test_stream_broken_framing_ends_as_truncated(autojump_clock, garbage):
    async with lab(after_hello(garbage)) as rig:
        got = await rig.stream()
        assert last_event(got.body)["error"]["code"] == "server_disconnected"
        assert not got.whole
        assert rig.recorder.outcomes == [Outcome.TRUNCATED]


async def test_json_that_breaks_after_beginning_is_cut_short(autojump_clock):
    async with lab(once(ok(b"x" * 1_000_000)[:-1])) as rig:
        got = await rig.post()
        assert (got.status, got.whole) == (200, False)
        assert set(got.body) == set(b"x")
        assert len(got.body) == 999_999
        assert rig.recorder.outcomes == [Outcome.TRUNCATED]


async def test_stream_with_length_is_reframed_to_show_truncation(autojump_clock):
    raw = answer(200, HELLO * 3, content_type=SSE)
    async with lab(once(raw[:-1]), GOOD) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert got.body == (HELLO * 3)[:-1]
        assert got[b"content-length"] is None
        assert not got.whole


ABORTS = {
    "abort": [event("", "abort"), DONE],
    "abort byte by byte": [
        (event("", "abort") + DONE)[i : i + 1] for i in range(len(event("", "abort") + DONE))
    ],
    "abort before the last events": [event("", "abort"), event("a"), event("b"), event("c"), DONE],
}


@pytest.mark.parametrize("case", ABORTS)
async def test_stream_aborted_after_tokens_passes(autojump_clock, case):
    """`/abort_requests` and `/pause` cut answers on purpose: their tokens are wanted."""
    async with lab(streaming(HELLO, *ABORTS[case])) as rig:
        got = await rig.stream()
        assert got.body == HELLO + b"".join(ABORTS[case])
        assert got.whole
        assert rig.recorder.attempts == [("a", Outcome.ENGINE_ABORT)]
        assert failures(rig) == 0


async def test_stream_with_error_event_after_tokens_passes_and_counts(autojump_clock):
    async with lab(streaming(HELLO, ERROR % 500, DONE)) as rig:
        got = await rig.stream()
        assert got.body == HELLO + ERROR % 500 + DONE
        assert got.whole
        assert rig.recorder.attempts == [("a", Outcome.TRUNCATED)]
        assert failures(rig) == 1


async def test_stream_text_about_errors_is_not_counted(autojump_clock):
    words = event("event: error and data: finish_reason abort")
    async with lab(streaming(words, event("", "stop"), DONE)) as rig:
        for _ in range(3):
            await rig.stream()
        assert failures(rig) == 0


async def test_stream_silence_is_idle_timeout_with_error_event(autojump_clock):
    async def stops(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head(), chunk(HELLO))
        await talk.gone()

    async with lab(stops, GOOD, idle_timeout=16) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert last_event(got.body)["error"]["code"] == "idle_timeout"
        assert not got.whole
        assert got.took == pytest.approx(17)
        assert rig.recorder.outcomes == [Outcome.IDLE_TIMEOUT]
        assert failures(rig) == 1


@pytest.mark.parametrize("watched", [False, True])
async def test_stream_slow_but_steady_has_no_idle_timeout(autojump_clock, watched):
    async def steady(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        for _ in range(30):
            await talk.send(chunk(HELLO))
            await trio.sleep(15)
        await talk.send(chunk(DONE), END)

    async with lab(steady, idle_timeout=16, first_byte_timeout=5, watched=watched) as rig:
        got = await rig.stream()
        assert got.whole
        assert failures(rig) == 0


async def test_stream_total_timeout_ends_with_error_event_uncounted(autojump_clock):
    async def endless(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        while True:
            await talk.send(chunk(HELLO))
            await trio.sleep(1)

    async with lab(endless, total_timeout=10) as rig:
        got = await rig.stream()
        assert last_event(got.body)["error"]["code"] == "total_timeout"
        assert got.took == pytest.approx(10)
        assert failures(rig) == 0


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("idle_timeout", [4, 16, 300])
async def test_stream_total_timeout_holds_after_idle_deadline_moved(
    autojump_clock, idle_timeout, watched
):
    """Each piece moves the deadline for silence, never beyond the total timeout."""

    async def endless(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        while True:
            await talk.send(chunk(HELLO))
            await trio.sleep(0.5)

    options = {"idle_timeout": idle_timeout, "total_timeout": 100, "watched": watched}
    async with lab(endless, **options) as rig:
        got = await rig.stream()
        assert last_event(got.body)["error"]["code"] == "total_timeout"
        assert got.took == pytest.approx(100)


@pytest.mark.parametrize("watched", [False, True])
async def test_stream_silence_after_moved_deadline_ends_in_time(autojump_clock, watched):
    async def falls_silent(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        for _ in range(20):
            await talk.send(chunk(HELLO))
            await trio.sleep(5)
        await talk.gone()

    async with lab(falls_silent, idle_timeout=16, watched=watched) as rig:
        got = await rig.stream()
        assert last_event(got.body)["error"]["code"] == "idle_timeout"
        assert 95 + 16 <= got.took <= 95 + 16 + 1
        assert failures(rig) == 1


# -- the probes find the server down -----------------------------------------------------------


async def hangs(talk: Talk) -> None:
    """SIGTERM's third outcome: silence on an open connection."""
    await talk.request()
    await talk.gone()


async def hangs_in_stream(talk: Talk) -> None:
    await talk.request()
    await talk.send(sse_head(), chunk(HELLO))
    await talk.gone()


@pytest.mark.parametrize("watched", [False, True])
async def test_silent_exchange_on_down_server_is_retried(autojump_clock, watched):
    async with lab(hangs, GOOD, watched=watched) as rig:
        rig.prefer("a")
        client = rig.start_stream()
        await trio.sleep(1)
        assert rig.down("a") == 1
        await trio.sleep(0.1)
        assert client.got[b"x-vllm-router-server"] == b"b"
        assert client.got.whole
        assert rig.recorder.outcomes == [Outcome.SERVER_DOWN, Outcome.ANSWERED]
        assert failures(rig) == 0


async def test_silent_exchange_on_down_server_is_502_if_unrepeatable(autojump_clock):
    async with lab(hangs, GOOD) as rig:
        rig.prefer("a")
        client = rig.start({"model": "m", "background": True}, path="/v1/responses")
        await trio.sleep(1)
        rig.down("a")
        await trio.sleep(0.1)
        assert (client.got.status, client.got.code) == (502, "server_gone")


async def test_stream_silent_on_down_server_ends_with_error_event(autojump_clock):
    async with lab(hangs_in_stream) as rig:
        client = rig.start_stream()
        await trio.sleep(1)
        rig.down("a")
        await trio.sleep(0.1)
        assert last_event(client.got.body)["error"]["code"] == "server_gone"
        assert not client.got.whole


async def test_stream_with_recent_byte_ends_once_silent_on_down_server(autojump_clock):
    """The probes find the server down at the moment of its last byte."""

    async def last_words(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head(), chunk(HELLO))
        await trio.sleep(1)
        await talk.send(chunk(HELLO))
        await talk.gone()

    async with lab(last_words) as rig:
        client = rig.start_stream()
        await trio.sleep(1.1)
        assert rig.down("a") == 0
        for _ in range(10):
            await trio.sleep(0.5)
            rig.proxy.maintain(rig.server("a"), trio.current_time())
        assert last_event(client.got.body)["error"]["code"] == "server_gone"
        assert client.got.took < 5


async def test_stream_with_output_continues_despite_failed_probes(autojump_clock):
    async def steady(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        for _ in range(20):
            await talk.send(chunk(HELLO))
            await trio.sleep(0.4)
        await talk.send(chunk(DONE), END)

    async with lab(steady) as rig:
        client = rig.start_stream()
        await trio.sleep(1)
        rig.down("a")
        for _ in range(20):
            await trio.sleep(0.5)
            rig.proxy.maintain(rig.server("a"), trio.current_time())
        assert client.got.whole


async def test_stream_bytes_before_crash_reach_slow_client(autojump_clock):
    async with lab(streaming(HELLO, *[event("x" * 60_000)] * 50, DONE)) as rig:
        client = rig.client({"model": "m", "stream": True})
        client.stall()
        rig.nursery.start_soon(client.run)
        await trio.sleep(3)
        assert rig.down("a") == 0
        client.resume()
        await trio.sleep(1)
        assert client.got.whole
        assert client.got.body.endswith(DONE)


async def test_exchange_on_two_servers_going_down_goes_to_no_third(autojump_clock):
    async with lab(hangs, hangs, hangs) as rig:
        client = rig.start_stream()
        for _ in range(2):
            await trio.sleep(1)
            (name,) = [server.name for server in rig.servers if server.in_flight]
            assert rig.down(name) == 1
        await trio.sleep(1)
        assert (client.got.status, client.got.code) == (502, "server_gone")


async def test_stream_ends_with_error_event_on_stop(autojump_clock):
    async with lab(hangs_in_stream) as rig:
        client = rig.start_stream()
        await trio.sleep(1)
        rig.context.stopping = True
        rig.proxy.stop()
        await rig.proxy.drained()
        assert last_event(client.got.body)["error"]["code"] == "router_stopping"
        assert not client.got.whole
        assert rig.recorder.outcomes == [Outcome.STOPPED]
