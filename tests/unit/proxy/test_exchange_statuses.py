"""Statuses at the borders: what counts as output of the engine, and what as a redirect."""

from __future__ import annotations

import math

import pytest
import trio

from support.proxy_harness import lab
from support.scripted_server import DONE, GOOD, Talk, answer, answering, chunk, event, streaming
from vllm_router.proxy.retry import Outcome

ERROR = b'{"error":{"message":"no"}}'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(("status", "output"), [(200, True), (400, False), (404, False)])
async def test_status_error_is_no_output_of_the_engine(autojump_clock, status, output):
    reply = answering(GOOD if status == 200 else answer(status, ERROR))
    async with lab(reply) as rig:
        await trio.sleep(10.0)
        assert (await rig.post()).status == status
        assert rig.server("a").activity.output_at == (10.0 if output else -math.inf)
        assert rig.server("a").last_byte_at == 10.0


@pytest.mark.parametrize("status", [300, 302, 399])
async def test_status_redirect_sends_the_request_elsewhere(autojump_clock, status):
    moved = answer(status, b"{}", b"Location: /login")
    async with lab(answering(moved), answering(GOOD)) as rig:
        rig.prefer("a")
        got = await rig.post()
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")
        assert rig.recorder.outcomes == [Outcome.MISDIRECTED, Outcome.ANSWERED]


async def test_status_299_is_the_answer(autojump_clock):
    async with lab(answering(answer(299, b'{"choices":[{"text":"x"}]}')), answering(GOOD)) as rig:
        rig.prefer("a")
        assert (await rig.post()).status == 299
        assert rig.requests()["b"] == 0


async def heartbeat_then_gone(talk: Talk) -> None:
    """White space before JSON, which the client gets at once, and no response after it."""
    await talk.request()
    await talk.send(HEAD, chunk(b" "))
    await trio.sleep(1.0)
    talk.reset()


async def test_head_of_json_sent_early_swallows_comments_of_a_stream(autojump_clock):
    """The client expects JSON: neither the stream's comments nor its events may follow."""
    stream = streaming(b": keep-alive\n\n", event("hi", "stop"), DONE)
    async with lab(heartbeat_then_gone, stream) as rig:
        rig.prefer("a")
        got = await rig.post()
        assert (got.status, got.body, got.whole) == (200, b" ", False)
        assert rig.requests() == {"a": 1, "b": 1}
