"""The simulated server opens, ends and fails like the captured real one.

Aborts, crashes, late client errors, and the paths around generation.
"""

from __future__ import annotations

import json
import re
from itertools import groupby

import pytest
import trio

from support.mock_memory import Answer, Client, Mock, running_mock
from support.vllm_captures import (
    COMPLETE,
    CUT,
    SILENT,
    Capture,
    assert_shapes_agree,
    capture,
    header_names,
    names,
    reasons,
    shapes,
)

LONG = {"model": "tiny", "prompt": "x", "max_tokens": 1500}
# A token takes a second, so that a test can act between two of them; the engine has one slot.
SLOW = {"token_delay": 1.0, "max_num_seqs": 1, "max_model_len": 2048}


async def received(client: Client) -> tuple[Answer, int]:
    """The response as far as it comes, and how it ends."""
    answer = Answer(b"HTTP/1.1 000 no head")
    with trio.move_on_after(600):
        try:
            answer = await client.head()
            await client.rest(answer)
        except EOFError:
            return answer, CUT
        return answer, COMPLETE
    return answer, SILENT


async def sent(mock: Mock, real: Capture) -> Client:
    client = await mock.client()
    await client.send(real.method, real.path, (real.body or "").encode())
    return client


async def busy(mock: Mock) -> Client:
    """Replaces the engine."""
    client = await mock.client()
    await client.send("POST", "/v1/completions", LONG)
    await trio.sleep(0.5)
    return client


def assert_same(ours: tuple[Answer, int], real: Capture) -> None:
    """Status, headers, fields and their order, finish reasons, and the end itself."""
    answer, end = ours
    assert (answer.status, end) == (real.answer.status, real.end)
    assert header_names(answer) == header_names(real.answer)
    assert answer["content-type"] == real.answer["content-type"]
    assert_shapes_agree(answer, real)
    if answer["content-type"].startswith("text/event-stream"):
        ends = [
            [key for key, _ in groupby(reasons(event) for event in each.events)][-4:]
            for each in (answer, real.answer)
        ]
    else:
        ends = [reasons(answer.json), reasons(real.answer.json)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", names("opening-*"))
async def test_mock_waiting_stream_has_sent_what_real_server_sends(name, autojump_clock):
    real = capture(name)
    async with running_mock(**SLOW) as mock:
        await busy(mock)
        client = await sent(mock, real)
        answer, end = await received_within(client, 10)
    assert end == real.end == SILENT
    assert header_names(answer) == header_names(real.answer)
    if real.answer.body.strip():
        assert shapes(answer) == shapes(real.answer)
    else:
        assert answer.body == b""


async def received_within(client: Client, seconds: float) -> tuple[Answer, int]:
    answer = await client.head()
    with trio.move_on_after(seconds):
        await client.rest(answer)
        return answer, COMPLETE
    return answer, SILENT


@pytest.mark.parametrize("how", ["/abort_requests", "/pause", "SIGTERM"])
@pytest.mark.parametrize("name", names("abort-waiting-*"))
async def test_mock_abort_of_waiting_request_ends_like_real_server(name, how, autojump_clock):
    real = capture(name)
    async with running_mock(**SLOW) as mock:
        await busy(mock)
        client = await sent(mock, real)
        await trio.sleep(5.25)
        await aborted(mock, how)
        answer, end = await received(client)
    without_connection_close(answer)
    assert_same((answer, end), real)
    assert tokens(answer) in (0, None)


@pytest.mark.parametrize("how", ["/abort_requests", "/pause", "SIGTERM"])
@pytest.mark.parametrize("name", names("abort-running-*"))
async def test_mock_abort_of_running_request_ends_like_real_server(name, how, autojump_clock):
    real = capture(name)
    async with running_mock(**SLOW) as mock:
        client = await sent(mock, real)
        await trio.sleep(5.25)
        await aborted(mock, how)
        answer, end = await received(client)
    without_connection_close(answer)
    assert_same((answer, end), real)
    assert tokens(answer) in (6, None)


async def aborted(mock: Mock, how: str) -> None:
    if how == "SIGTERM":
        mock.server.terminate()
    else:
        assert (await mock.ask("POST", how, b"{}")).status == 200


def without_connection_close(answer: Answer) -> None:
    """A stopping server sends Connection: close; the captured clients requested close anyway."""
    answer.headers = [field for field in answer.headers if field != ("connection", "close")]


def tokens(answer: Answer) -> int | None:
    """The tokens in the final usage; None without usage."""
    stream = answer["content-type"].startswith("text/event-stream")
    events = answer.events if stream else answer.json
    found = re.findall(r'"(?:output|completion)_tokens": (\d+)', json.dumps(events))
    return int(found[-1]) if found else None


@pytest.mark.parametrize("name", names("dead-waiting-*"))
async def test_mock_engine_death_fails_waiting_request_like_real_server(name, autojump_clock):
    real = capture(name)
    async with running_mock(**SLOW, sigterm="error") as mock:
        await busy(mock)
        client = await sent(mock, real)
        await trio.sleep(3.25)
        mock.server.terminate()
        ours = await received(client)
    assert_failed_alike(ours, real)


@pytest.mark.parametrize("name", names("dead-running-*"))
async def test_mock_engine_death_fails_running_stream_like_real_server(name, autojump_clock):
    real = capture(name)
    async with running_mock(**SLOW) as mock:
        client = await sent(mock, real)
        await trio.sleep(3.25)
        mock.server.lose_engine()
        ours = await received(client)
    assert_failed_alike(ours, real)


def assert_failed_alike(ours: tuple[Answer, int], real: Capture) -> None:
    without_connection_close(ours[0])
    assert_same(ours, real)
    errors = [
        [event for event in answer.events if isinstance(event, dict) and "error" in event]
        or re.findall(rb'{"error.*|{"type":"error.*', answer.body)
        for answer in (ours[0], real.answer)
    ]
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", names("late-*"))
async def test_mock_late_client_error_is_sent_like_real_server(name, autojump_clock):
    real = capture(name)
    async with running_mock(max_model_len=2048) as mock:
        client = await sent(mock, real)
        ours = await received(client)
        assert_same(ours, real)
        if '"error"' in real.answer.body.decode():
            assert ours[0].body.strip() == real.answer.body.strip()
        assert (await mock.stats())["in_flight"] == 0


@pytest.mark.parametrize("name", names("ending-*"))
async def test_mock_request_in_grace_period_is_refused_like_real_server(name, autojump_clock):
    real = capture(name)
    async with running_mock(**SLOW, shutdown_timeout=60.0) as mock:
        mock.server.terminate()
        client = await sent(mock, real)
        answer, end = await received(client)
    assert (answer.status, end) == (real.answer.status, real.end)
    assert header_names(answer) == header_names(real.answer)
    assert answer.body == real.answer.body.strip()


async def test_mock_requests_left_after_grace_period_fail_unaborted(autojump_clock):
    async with running_mock(**SLOW, shutdown_timeout=8.0, sigterm="abort") as mock:
        client = await sent(mock, capture("dead-running-chat-stream"))
        await trio.sleep(1.25)
        mock.server.terminate()
        answer, _ = await received(client)
    assert answer.events[-2]["error"]["code"] == 500
    assert answer.events[-1] == "[DONE]"


@pytest.mark.parametrize("name", ["slash-chat", "slash-models"])
async def test_mock_path_with_trailing_slash_is_redirected(name, autojump_clock):
    real = capture(name)
    async with running_mock() as mock:
        client = await mock.client()
        body = (real.body or "").encode()
        await client.send(real.method, real.path, body, host="127.0.0.1:8101")
        answer = await client.rest(await client.head())
    assert (answer.status, answer.body) == (307, b"")
    assert header_names(answer) == header_names(real.answer)
    assert dict(answer.headers)["location"] == real.answer["location"]


async def test_mock_head_of_get_path_is_refused(autojump_clock):
    real = capture("head-health")
    async with running_mock() as mock:
        client = await mock.client()
        await client.send(real.method, real.path)
        answer = await client.head()
    assert (answer.status, header_names(answer)) == (405, header_names(real.answer))


async def test_mock_silent_stream_has_comments_in_apis_that_send_them(autojump_clock):
    async with running_mock(**SLOW | {"ttft": 9.5, "token_delay": 0.1}, sse_keep_alive=1.0) as mock:
        for name in ("keep-alive-chat-stream", "keep-alive-messages-stream"):
            real = capture(name)
            answer = await mock.ask(real.method, real.path, real.body.encode())
            assert (": keep-alive" in answer.events) == (": keep-alive" in real.answer.events)
