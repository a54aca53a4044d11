"""A response without a token that no other server betters: the record of its exchange."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from support.proxy_harness import lab
from support.scripted_server import (
    DONE,
    GOOD,
    Talk,
    answer,
    answering,
    event,
    ok,
    sse_head,
    streaming,
)
from vllm_router.proxy.record import Phase
from vllm_router.proxy.retry import Outcome

EMPTY = (event("", "stop"), DONE)


@pytest.mark.parametrize("watched", [False, True])
async def test_doubtful_response_delivered_is_recorded_once(autojump_clock, watched):
    async with lab(streaming(*EMPTY), streaming(*EMPTY), watched=watched) as rig:
        got = await rig.stream()
        assert (got.status, got.body, got.whole) == (200, b"".join(EMPTY), True)
        assert rig.recorder.outcomes == [Outcome.NO_TOKENS] * 2
        record = rig.recorder.last
        assert (record.status, record.outcome) == (200, Outcome.ANSWERED)
        assert (record.phase, record.chunks) == (Phase.DONE, 1)
        assert record.bytes_out == len(got.body)
        assert record.first_byte_at == record.ended_at


async def test_doubtful_response_of_first_server_frees_body_memory(autojump_clock):
    async with lab(streaming(*EMPTY)) as rig:
        assert (await rig.stream()).status == 200
        assert rig.context.bodies.held == 0
        assert rig.server("a").passive_health.failures_in_row == 0


@pytest.mark.parametrize(
    "second",
    [
        answer(500, b'{"error":{"message":"broken"}}'),
        answer(503, b'{"error":{"message":"full"}}'),
        answer(401, b'{"error":{"message":"key"}}'),
        answer(404, b'{"detail":"Not Found"}'),
    ],
    ids=["500", "503", "401", "404"],
)
async def test_doubtful_response_precedes_error_of_second_server(autojump_clock, second):
    async with lab(streaming(*EMPTY), answering(second)) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert (got.status, got.body, got.whole) == (200, b"".join(EMPTY), True)
        assert rig.requests() == {"a": 1, "b": 1}
        assert rig.recorder.last.outcome is Outcome.ANSWERED


async def working_for_a_minute(talk: Talk) -> None:
    while True:
        await talk.request()
        await trio.sleep(60)
        await talk.send(GOOD)


async def test_doubtful_response_is_delivered_if_queue_gives_no_second_server(autojump_clock):
    limits = {"max_in_flight": 1, "queue_timeout": 10}
    async with lab(streaming(*EMPTY), working_for_a_minute, limits=limits) as rig:
        rig.prefer("b")
        other = rig.start({"model": "m"})
        await wait_all_tasks_blocked()
        got = await rig.stream()
        assert (got.status, got.body, got.whole) == (200, b"".join(EMPTY), True)
        assert rig.requests() == {"a": 1, "b": 1}
        await trio.sleep(60)
        assert other.got.status == 200


async def test_doubtful_response_is_delivered_if_router_stops(autojump_clock):
    limits = {"max_in_flight": 1, "queue_timeout": 100}
    async with lab(streaming(*EMPTY), working_for_a_minute, limits=limits) as rig:
        rig.prefer("b")
        rig.start({"model": "m"})
        await wait_all_tasks_blocked()
        client = rig.start_stream()
        await wait_all_tasks_blocked()
        rig.context.stopping = True
        rig.proxy.stop()
        await wait_all_tasks_blocked()
        assert (client.got.status, client.got.body) == (200, b"".join(EMPTY))
        await trio.sleep(60)


async def lost_after_head(talk: Talk) -> None:
    """Sends the head of a stream, and closes when that has gone to the client."""
    await talk.request()
    await talk.send(sse_head())
    await trio.sleep(5)


async def test_doubtful_json_never_follows_early_head_of_stream(autojump_clock):
    odd = answering(ok(b'{"error":{"message":"something odd"}}'))
    async with lab(odd, lost_after_head) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert got[b"content-type"].startswith(b"text/event-stream")
        assert not got.whole
        assert got.body.startswith(b'data: {"error": {"message": "something odd"')
        assert got.body.endswith(b"}\n\n")
        record = rig.recorder.last
        assert (record.status, record.code) == (200, "late_error")
        assert record.outcome is Outcome.UNCLEAR_ERROR


async def test_doubtful_stream_follows_early_head_of_stream(autojump_clock):
    async with lab(streaming(*EMPTY), lost_after_head) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert (got.status, got.body, got.whole) == (200, b"".join(EMPTY), True)
