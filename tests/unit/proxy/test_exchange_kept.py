"""Exchanges over a kept connection, where the wait for an answer has no cancel scope of its own."""

from __future__ import annotations

import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from support.proxy_harness import Rig, lab
from support.scripted_server import (
    DONE,
    END,
    GOOD,
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
from vllm_router.http.io.async_socket import BUFFERED_WRITE_SIZE
from vllm_router.proxy.attempt import AT_ONCE, CHECK_AFTER
from vllm_router.proxy.record import Phase
from vllm_router.proxy.retry import Outcome

pytestmark = pytest.mark.usefixtures("socket_kind")

ABORT = ok(b'{"choices":[{"text":"","finish_reason":"abort"}]}')


def first_good_then(script: Script) -> Script:
    async def both(talk: Talk) -> None:
        await talk.request()
        await talk.send(GOOD)
        await script(talk)

    return both


async def hang(talk: Talk) -> None:
    await talk.request()
    await talk.gone()


def say(*pieces: bytes, end: bool = False) -> Script:
    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(*pieces)
        if not end:
            await talk.gone()

    return script


@asynccontextmanager
async def kept(script: Script, **options: Any) -> AsyncIterator[Rig]:
    """Server `a`, with a kept connection, continues with the script; `b` is healthy."""
    async with lab(first_good_then(script), answering(GOOD), **options) as rig:
        rig.prefer("a")
        assert (await rig.post()).status == 200
        assert rig.context.upstreams[rig.server("a")].pool.idle == 1
        yield rig


async def test_kept_connection_is_reused(autojump_clock):
    async with kept(say(GOOD)) as rig:
        assert (await rig.post()).body == b'{"answer":1}'
        assert len(rig.scripted["a"].talks) == 1


async def test_kept_connection_silence_is_first_byte_timeout(autojump_clock):
    async with kept(hang, first_byte_timeout=7) as rig:
        got = await rig.post()
        assert (got.status, got.code, got.took) == (504, "first_byte_timeout", pytest.approx(7.0))
        assert rig.recorder.attempts[-1] == ("a", Outcome.FIRST_BYTE_TIMEOUT)
        while rig.scripted["a"].open:
            await trio.lowlevel.checkpoint()


async def test_kept_connection_with_unbounded_reads_has_first_byte_timeout(autojump_clock):
    """A connection with TLS has no limit of its own for a read."""

    class Unbounded(PlainTransport):
        can_stream = False

        def __init__(self, connected: socket.socket) -> None:
            super().__init__(connected)
            bounded = self.read
            self.read = lambda _until, size: bounded(math.inf, size)

    async with lab(first_good_then(hang), first_byte_timeout=7) as rig:
        scripted = rig.scripted["a"]
        scripted.connection = lambda: Connection(Unbounded(scripted.connect()))
        assert (await rig.post()).status == 200
        with trio.fail_after(60):
            got = await rig.post()
        assert (got.status, got.code, got.took) == (504, "first_byte_timeout", pytest.approx(7.0))
        assert len(scripted.talks) == 1


async def test_kept_connection_half_head_is_first_byte_timeout(autojump_clock):
    async with kept(say(b"HTTP/1.1 200 OK\r\ncontent-"), first_byte_timeout=7) as rig:
        got = await rig.post()
        assert (got.status, got.code, got.took) == (504, "first_byte_timeout", pytest.approx(7.0))


async def test_kept_connection_request_timeout_header_ends_exchange(autojump_clock):
    async with kept(hang, total_timeout=3, first_byte_timeout=7) as rig:
        got = await rig.post()
        assert (got.status, got.code, got.took) == (504, "total_timeout", pytest.approx(3.0))


async def test_kept_connection_stalled_body_is_idle_timeout(autojump_clock):
    async with kept(say(ok(b"x" * 100)[:-50]), first_byte_timeout=50, idle_timeout=7) as rig:
        got = await rig.post()
        assert (got.status, got.code, got.took) == (504, "idle_timeout", pytest.approx(7.0))


async def test_kept_connection_server_found_down_is_retried_elsewhere(autojump_clock):
    async with kept(hang) as rig:
        client = rig.start()
        await trio.sleep(1)
        assert rig.down("a") == 1
        await trio.sleep(0.1)
        assert (client.got.status, client.got[b"x-vllm-router-server"]) == (200, b"b")
        assert rig.recorder.outcomes[-2:] == [Outcome.SERVER_DOWN, Outcome.ANSWERED]


async def test_kept_connection_stop_ends_wait_with_503(autojump_clock):
    async with kept(hang) as rig:
        client = rig.start()
        await trio.sleep(1)
        rig.context.stopping = True
        assert rig.proxy.stop() == 1
        await rig.proxy.drained()
        await trio.testing.wait_all_tasks_blocked()
        assert (client.got.status, client.got.code) == (503, "router_stopping")


async def test_kept_connection_client_disconnect_frees_server_at_once(autojump_clock):
    async with kept(hang) as rig:
        client = rig.start()
        await trio.sleep(1)
        client.leave()
        await trio.sleep(0.05)
        assert rig.scripted["a"].open == 0
        assert rig.server("a").in_flight == 0
        assert rig.recorder.last.outcome is Outcome.CLIENT_GONE
        assert rig.recorder.last.phase is Phase.WAIT


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        (say(answer(500, b"{}")), Outcome.SERVER_ERROR),
        (say(ABORT), Outcome.ABORTED),
        (say(b"nonsense\r\n\r\n"), Outcome.PROTOCOL_ERROR),
        (say(b"HTTP/1.1 200 OK\r\n", end=True), Outcome.PROTOCOL_ERROR),
        (say(ok(b"x" * 100)[:-50], end=True), Outcome.CONNECTION_LOST),
        (say(answer(503, b'{"error":{"message":"busy"}}')), Outcome.FULL),
    ],
)
async def test_kept_connection_failure_before_first_byte_is_retried(
    autojump_clock, script: Script, outcome: Outcome
):
    async with kept(script) as rig:
        got = await rig.post()
        assert (got.status, got.body, got[b"x-vllm-router-server"]) == (200, b'{"answer":1}', b"b")
        assert rig.recorder.outcomes[-2:] == [outcome, Outcome.ANSWERED]


async def test_kept_connection_abort_of_lost_machine_is_retried_in_time(autojump_clock):
    """The check whether the server accepts connections is not answered, not even refused."""

    async def abort_and_vanish(talk: Talk) -> None:
        await talk.request()
        talk.server.swallows = True
        await talk.send(ok(b'{"choices":[{"text":"half","finish_reason":"abort"}]}'))

    async with kept(abort_and_vanish, connect_timeout=3) as rig:
        got = await rig.post()
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")
        assert got.took == pytest.approx(3.0 + CHECK_AFTER, abs=0.1)
        assert rig.recorder.outcomes[-2:] == [Outcome.ABORTED, Outcome.ANSWERED]


@pytest.mark.parametrize("size", [0, BUFFERED_WRITE_SIZE])
async def test_kept_connection_closed_before_request_is_no_break_of_server(autojump_clock, size):
    """The request cannot have broken a server that has not received it, however long it is."""
    ending = trio.Event()

    async def stop(talk: Talk) -> None:
        await ending.wait()

    async with kept(stop) as rig:
        rig.scripted["a"].refuses = True
        (connection,) = rig.context.upstreams[rig.server("a")].pool._idle
        connection.is_alive = lambda: True  # the event loop has not noticed the end yet
        ending.set()
        await trio.testing.wait_all_tasks_blocked()
        got = await rig.post({"model": "m", "prompt": "x" * size})
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")
        assert rig.recorder.outcomes[-2:] == [Outcome.CONNECT_FAILED, Outcome.ANSWERED]


async def test_kept_connection_found_closed_is_replaced(autojump_clock):
    async def again(talk: Talk) -> None:
        if len(talk_of) == 1:
            await talk.request()  # and closes without an answer
        else:
            await say(GOOD)(talk)

    talk_of: list[Talk] = []

    async def script(talk: Talk) -> None:
        talk_of.append(talk)
        if len(talk_of) == 1:
            await talk.request()
            await talk.send(GOOD)
        await again(talk)

    async with lab(script, answering(GOOD)) as rig:
        rig.prefer("a")
        await rig.post()
        got = await rig.post()
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"a")
        assert rig.recorder.outcomes == [Outcome.ANSWERED, Outcome.ANSWERED]
        assert rig.recorder.last.attempts == 1


async def test_kept_connection_stream_after_head_is_relayed(autojump_clock):
    async def slowly(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        for text in "abc":
            await trio.sleep(5)
            await talk.send(chunk(event(text)))
        await talk.send(chunk(DONE), END)
        await talk.gone()

    async with kept(slowly, first_byte_timeout=6, idle_timeout=6) as rig:
        got = await rig.stream()
        assert got.body == b"".join([event(text) for text in "abc"]) + DONE
        assert got.whole
        assert rig.recorder.outcomes[-1] is Outcome.ANSWERED


async def test_kept_connection_stream_in_one_read_is_relayed(autojump_clock):
    whole = b"".join([sse_head(), chunk(event("a") + DONE), END])
    async with kept(say(whole)) as rig:
        got = await rig.stream()
        assert (got.body, got.whole) == (event("a") + DONE, True)


async def test_kept_connection_silence_in_stream_ends_with_error_event(autojump_clock):
    async with kept(say(sse_head(), chunk(event("a"))), idle_timeout=7) as rig:
        got = await rig.stream()
        assert b'"code": "idle_timeout"' in got.body
        assert not got.whole


async def test_kept_connection_client_behind_other_server_that_takes_no_head_is_gone(
    autojump_clock,
):
    """Hypercorn may let even the head of an empty response wait for the client."""
    limits = {"first_byte_timeout": 7, "idle_timeout": 7}
    async with kept(say(answer(400, b"")), watched=True, **limits) as rig:
        client = rig.client()
        client.stall()
        rig.nursery.start_soon(client.run)
        await trio.sleep(20)
        assert client.done
        assert rig.recorder.outcomes[-1] is Outcome.CLIENT_GONE


async def test_kept_connection_large_request_has_time_limits(autojump_clock):
    async with kept(hang, first_byte_timeout=7) as rig:
        got = await rig.post({"model": "m", "prompt": "x" * AT_ONCE})
        assert (got.status, got.code, got.took) == (504, "first_byte_timeout", pytest.approx(7.0))


async def test_kept_connection_many_requests_leak_nothing(autojump_clock):
    async with lab(answering(GOOD), streaming(event("a"), DONE)) as rig:
        for _ in range(20):
            await rig.post()
            await rig.stream()
        assert set(rig.recorder.outcomes) == {Outcome.ANSWERED}
