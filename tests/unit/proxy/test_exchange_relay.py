"""The relay of a stream on both paths: what is counted, and streams that are not read."""

from __future__ import annotations

import pytest
import trio

from support.proxy_harness import lab
from support.scripted_server import DONE, END, Talk, chunk, event, sse_head
from vllm_router.proxy.retry import Outcome

EVENTS = [event(text) for text in "abcde"] + [event("", "stop"), DONE]
UNKNOWN = b'data: {"odd":1}\n\n'
REJECTED = b'data: {"error":{"message":"too long","code":400}}\n\n'
FAILED = b'data: {"error":{"message":"dead","code":500}}\n\n'


@pytest.mark.parametrize("watched", [False, True])
async def test_relay_counts_every_piece_once(autojump_clock, watched):
    async def slow(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        for piece in EVENTS:
            await talk.send(chunk(piece))
            await trio.sleep(1)
        await talk.send(END)

    async with lab(slow, watched=watched) as rig:
        got = await rig.stream()
        record = rig.recorder.last
        assert got.pieces == EVENTS
        assert (record.chunks, record.bytes_out) == (len(EVENTS), len(b"".join(EVENTS)))


@pytest.mark.parametrize("watched", [False, True])
async def test_relay_compressed_stream_passes_unread(autojump_clock, watched):
    pieces = [b"\x1f\x8b%d" % number for number in range(5)]

    async def packed(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head(b"content-encoding: gzip"))
        for piece in pieces:
            await talk.send(chunk(piece))
            await trio.sleep(1)
        await talk.send(END)

    async with lab(packed, watched=watched) as rig:
        got = await rig.stream()
        assert got.whole
        assert got.body == b"".join(pieces)
        assert rig.recorder.last.chunks == len(pieces)


async def test_relay_plain_answer_that_breaks_gets_no_error_event(autojump_clock):
    async def breaks(talk: Talk) -> None:
        await talk.request()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ntransfer-encoding: chunked\r\n\r\n"
        await talk.send(head, chunk(b"sound\n\n"))
        await trio.sleep(1)

    async with lab(breaks) as rig:
        got = await rig.post()
        assert not got.whole
        assert got.body == b"sound\n\n"


@pytest.mark.parametrize("watched", [False, True])
async def test_relay_end_without_a_piece_is_a_sign_of_the_server(autojump_clock, watched):
    async def ends_late(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head(), *(chunk(piece) for piece in EVENTS))
        await trio.sleep(5)
        await talk.send(END)

    async with lab(ends_late, watched=watched) as rig:
        assert (await rig.stream()).whole
        assert rig.server("a").last_byte_at == 5.0


@pytest.mark.parametrize(
    ("events", "outcome", "whole"),
    [
        ([UNKNOWN, b"data: half an ev"], Outcome.ANSWERED, True),
        ([EVENTS[0], b"data: half an ev"], Outcome.TRUNCATED, False),
        ([UNKNOWN, REJECTED], Outcome.ANSWERED, True),
        ([EVENTS[0], REJECTED], Outcome.ANSWERED, True),
        ([EVENTS[0], FAILED], Outcome.TRUNCATED, True),
        ([UNKNOWN, FAILED], Outcome.TRUNCATED, True),
    ],
    ids=[
        "unknown, cut",
        "known, cut",
        "unknown, rejected",
        "known, rejected",
        "known, failed",
        "unknown, failed",
    ],
)
async def test_relay_end_decides_what_a_stream_was(autojump_clock, events, outcome, whole):
    async def ends(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        for piece in events:
            await talk.send(chunk(piece))
            await trio.sleep(1)
        await talk.send(END)

    async with lab(ends) as rig:
        got = await rig.stream()
        assert (rig.recorder.outcomes, got.whole) == ([outcome], whole)
        assert got.body.startswith(b"".join(events))
        # The time of an answer, but of no rejection.
        succeeded = outcome is Outcome.ANSWERED and REJECTED not in events
        assert (rig.server("a").load_estimate.response_seconds > 0.0) == succeeded
