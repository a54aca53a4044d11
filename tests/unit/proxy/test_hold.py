"""How much of a response is held back, and what may go to the client before it is proven."""

from __future__ import annotations

import math
from typing import Any

import pytest
import trio

from support.proxy_harness import Rig, lab
from support.scripted_server import (
    DONE,
    END,
    JSON,
    SSE,
    Script,
    Talk,
    answer,
    answering,
    chunk,
    event,
    ok,
    sse_head,
    streaming,
)
from vllm_router.http.client.connection import Connection
from vllm_router.http.client.plain_transport import PlainTransport
from vllm_router.proxy.attempt import RETRIED
from vllm_router.proxy.hold import HEAD_AFTER, HOLD_LIMIT, HOLD_STREAM
from vllm_router.proxy.retry import Outcome

GOOD = ok(b'{"answer":1}')
COMMENT = b": waiting\n\n"
ERROR = b'data: {"error":{"message":"x","code":500}}\n\n'
CHUNKED_JSON = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n" % JSON


def pieces(head: bytes, *parts: bytes, end: bytes = END, pause: float = 1.0) -> Script:
    """A script that sends each part in a chunk of its own, a while after the one before."""

    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(head)
        for part in parts:
            await trio.sleep(pause)
            await talk.send(chunk(part))
        await trio.sleep(pause)
        await talk.send(end) if end else None

    return script


# -- plain bodies -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "outcomes"),
    [
        (HOLD_LIMIT - 1, [Outcome.CONNECTION_LOST, Outcome.ANSWERED]),
        (HOLD_LIMIT, [Outcome.TRUNCATED]),
    ],
)
async def test_hold_plain_body_is_retried_up_to_the_limit(autojump_clock, size, outcomes):
    async def breaks(talk: Talk) -> None:
        await talk.request()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
        await talk.send(head % (JSON, 2 * HOLD_LIMIT) + b"[" * size)
        await trio.sleep(1)

    async with lab(breaks, answering(GOOD)) as rig:
        rig.prefer("a")
        got = await rig.post()
        assert rig.recorder.outcomes == outcomes
        assert got.whole is (size < HOLD_LIMIT)


async def test_hold_plain_white_space_inside_json_stays_in_its_place(autojump_clock):
    parts = [b'{"choices":[{"text":"a', b" ", b'b",', b"\n", b'"finish_reason":"stop"}]}']
    async with lab(pieces(CHUNKED_JSON, b"\n", *parts)) as rig:
        client = rig.start()
        await trio.sleep(4.5)
        assert client.got.pieces == [b"\n"]  # the heartbeat before it, and nothing else
        await trio.sleep(5)
        assert client.got.whole
        assert client.got.body == b"\n" + b"".join(parts)


async def test_hold_plain_white_space_before_body_with_length_is_held(autojump_clock):
    async def slowly(talk: Talk) -> None:
        head, _, body = answer(200, b' \n{"answer":1}').partition(b"\r\n\r\n")
        await talk.request()
        await talk.send(head + b"\r\n\r\n")
        for piece in (body[:1], body[1:3], body[3:]):
            await trio.sleep(1)
            await talk.send(piece)

    async with lab(slowly) as rig:
        assert (await rig.post()).pieces == [b' \n{"answer":1}']


# -- streams ------------------------------------------------------------------------------------


async def test_hold_stream_comment_and_failure_in_one_piece_keep_the_status(autojump_clock):
    async with lab(pieces(sse_head(), COMMENT + ERROR, DONE)) as rig:
        got = await rig.stream()
        assert (got.status, got.code) == (502, "server_error")


@pytest.mark.parametrize("size", [HOLD_STREAM - 1, HOLD_STREAM])
async def test_hold_stream_is_passed_on_unjudged_at_the_limit(autojump_clock, size):
    """One event without an end. Below the limit, nothing reaches the client."""
    async with lab(pieces(sse_head(), b"x" * size, end=b"", pause=0.1)) as rig:
        got = await rig.stream()
        assert (got.status, got.body[:1]) == ((200, b"x") if size == HOLD_STREAM else (502, b"{"))


async def test_hold_stream_failure_in_a_long_piece_is_no_answer(autojump_clock):
    long = b'data: {"error":{"message":"%b","code":500}}\n\n' % (b"x" * HOLD_STREAM)
    async with lab(pieces(sse_head(), long, DONE), streaming(event("a"), DONE)) as rig:
        rig.prefer("a")
        got = await rig.stream()
        assert got[b"x-vllm-router-server"] == b"b"
        assert rig.recorder.outcomes == [Outcome.ERROR_EVENT, Outcome.ANSWERED]


# -- connections whose reads have no time limit, such as TLS ------------------------------------


class Unhurried:
    """A transport like that over TLS: a plain one whose reads ignore `until`."""

    can_stream = False

    def __init__(self, inner: PlainTransport) -> None:
        self._inner = inner

    async def read(self, until: float = math.inf, size: int = 0) -> bytes:
        return await self._inner.read()

    def interrupt(self) -> bool:
        return False

    async def stream_into(self, take: Any) -> None:
        while take(await self.read()):
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def make_unhurried(rig: Rig) -> None:
    for scripted in rig.scripted.values():
        connect = scripted.connect
        scripted.connection = lambda connect=connect: Connection(  # type: ignore[method-assign]
            Unhurried(PlainTransport(connect()))
        )


async def test_hold_stream_over_tls_sends_the_head_in_time(autojump_clock):
    late = pieces(sse_head(), event("a"), event("", "stop"), DONE, pause=2 * HEAD_AFTER)
    async with lab(late) as rig:
        make_unhurried(rig)
        client = rig.start_stream()
        await trio.sleep(HEAD_AFTER - 0.1)
        assert client.got.status == 0
        await trio.sleep(0.2)
        assert (client.got.status, client.got[b"content-type"]) == (200, SSE)
        assert client.got.pieces == []
        await trio.sleep(8 * HEAD_AFTER)
        assert client.got.whole
        assert client.got.body == event("a") + event("", "stop") + DONE


async def test_hold_stream_over_tls_breaking_after_the_head_is_retried(autojump_clock):
    broken = pieces(sse_head(), end=b"", pause=2 * HEAD_AFTER)
    async with lab(broken, streaming(event("a"), DONE)) as rig:
        make_unhurried(rig)
        rig.prefer("a")
        got = await rig.stream()
        assert got.body == RETRIED + event("a") + DONE
        assert rig.recorder.outcomes == [Outcome.CONNECTION_LOST, Outcome.ANSWERED]


async def test_hold_stream_over_tls_is_relayed_piece_by_piece(autojump_clock):
    events = [event("a"), event("b"), event("", "stop"), DONE]
    async with lab(pieces(sse_head(), *events, pause=0.5)) as rig:
        make_unhurried(rig)
        client = rig.start_stream()
        await trio.sleep(1.2)
        assert client.got.pieces == events[:2]
        await trio.sleep(10)
        assert (client.got.pieces, client.got.whole) == (events, True)
