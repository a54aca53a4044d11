"""Clients that disconnect, stall, drip or send too much: nothing is leaked."""

from __future__ import annotations

import gc
import json
from random import Random

import pytest
import trio

from support.proxy_harness import Rig, lab
from support.scripted_server import (
    DONE,
    END,
    GOOD,
    ScriptedServer,
    Talk,
    answer,
    answering,
    chunk,
    event,
    ok,
    once,
    silent,
    sse_head,
    streaming,
)
from vllm_router.fleet.server import Lease
from vllm_router.http.client.pool import Pool
from vllm_router.proxy.attempt import Attempt, AttemptResult
from vllm_router.proxy.attempt_history import AttemptHistory
from vllm_router.proxy.candidates import Candidates
from vllm_router.proxy.deadline import Deadline
from vllm_router.proxy.downstream import DirectDownstream
from vllm_router.proxy.exchange import Exchange
from vllm_router.proxy.record import Phase, Record
from vllm_router.proxy.request import Request
from vllm_router.proxy.retry import Outcome
from vllm_router.proxy.server_response import ServerResponse

HELLO = event("hello")
BODY = b'{"model": "m"}'


async def swallow_head(talk: Talk) -> None:
    await talk.request()
    await talk.send(sse_head())
    await talk.gone()


async def comments(talk: Talk) -> None:
    await talk.request()
    await talk.send(sse_head())
    while True:
        await talk.send(chunk(b": keep-alive\n\n"))
        await trio.sleep(1)


async def half_plain(talk: Talk) -> None:
    await talk.request()
    await talk.send(ok(b"x" * 100)[:-50])
    await talk.gone()


async def endless(talk: Talk) -> None:
    await talk.request()
    await talk.send(sse_head())
    while True:
        await talk.send(chunk(HELLO))
        await trio.sleep(0.05)


async def one_event(talk: Talk) -> None:
    await talk.request()
    await talk.send(sse_head(), chunk(HELLO))
    await talk.gone()


async def deaf(talk: Talk) -> None:
    await trio.sleep(2)
    await talk.gone()


# -- disconnects -------------------------------------------------------------------------------

PHASES = {
    "waiting for a head": (silent, BODY, Phase.WAIT),
    "after the head": (swallow_head, BODY, Phase.WAIT),
    "among comments": (comments, BODY, Phase.WAIT),
    "in a plain body": (half_plain, BODY, Phase.WAIT),
    "in a stream": (endless, BODY, Phase.STREAM),
    "while its request is sent": (deaf, BODY[:-1] + b" " * 5_000_000 + b"}", Phase.WAIT),
}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("case", PHASES)
async def test_exchange_client_disconnect_frees_server_at_once(autojump_clock, case, watched):
    script, body, phase = PHASES[case]
    async with lab(script, watched=watched) as rig:
        client = rig.start(body)
        await trio.sleep(1.5)
        assert rig.server("a").in_flight == 1
        client.leave()
        await trio.sleep(0.1)
        assert client.done
        assert (rig.server("a").in_flight, len(rig.context.exchanges)) == (0, 0)
        if case != "while its request is sent":
            await trio.sleep(1.1)  # a sleeping script notices when it sends next
            (talk,) = rig.scripted["a"].talks
            assert rig.scripted["a"].open == 0
            if case not in ("among comments", "in a stream"):
                assert talk.left_at == pytest.approx(1.5, abs=0.1)
        (record,) = rig.recorder.records
        assert (record.outcome, record.phase) == (Outcome.CLIENT_GONE, phase)
        assert rig.server("a").passive_health.failures_in_row == 0
        assert not client.got.whole


@pytest.mark.parametrize("watched", [False, True])
async def test_exchange_client_disconnect_while_connecting_frees_server(autojump_clock, watched):
    async with lab(silent, watched=watched) as rig:
        rig.scripted["a"].swallows = True
        client = rig.start()
        await trio.sleep(1)
        client.leave()
        await trio.sleep(0.1)
        (record,) = rig.recorder.records
        assert (record.outcome, record.phase) == (Outcome.CLIENT_GONE, Phase.CONNECT)
        assert rig.server("a").passive_health.failures_in_row == 0


@pytest.mark.parametrize("watched", [False, True])
async def test_exchange_client_disconnect_while_reading_body_ends_exchange(autojump_clock, watched):
    async with lab(answering(GOOD), watched=watched, up=False) as rig:
        client = rig.start()
        await trio.sleep(1)
        client.leave()
        await trio.sleep(0.1)
        (record,) = rig.recorder.records
        assert (record.outcome, record.phase) == (Outcome.CLIENT_GONE, Phase.QUEUE)


async def test_exchange_disconnect_event_in_body_ends_exchange(autojump_clock):
    async with lab(answering(GOOD), watched=True) as rig:
        client = rig.client([])
        client.leave()
        await client.run()
        (record,) = rig.recorder.records
        assert (record.outcome, record.phase) == (Outcome.CLIENT_GONE, Phase.BODY)
        assert client.got.status == 0


async def test_exchange_client_disconnect_in_second_attempt_is_counted(autojump_clock):
    async with lab(once(), silent) as rig:
        rig.prefer("a")
        client = rig.start()
        await trio.sleep(1)
        client.leave()
        await trio.sleep(0.1)
        (record,) = rig.recorder.records
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.retries == [Outcome.CONNECTION_LOST]


@pytest.mark.parametrize("watched", [False, True])
async def test_exchange_client_disconnect_after_end_is_not_counted(autojump_clock, watched):
    async with lab(answering(GOOD), watched=watched) as rig:
        client = rig.client()
        await client.run()
        client.leave()
        assert client.got.whole
        assert rig.recorder.last.outcome is Outcome.ANSWERED


@pytest.mark.parametrize("watched", [False, True])
async def test_exchange_two_hundred_random_disconnects_leak_nothing(autojump_clock, watched):
    random = Random(7)

    async def varied(talk: Talk) -> None:
        while True:
            await talk.request()
            kind = random.random()
            await trio.sleep(random.random())
            if kind < 0.1:
                return
            if kind < 0.2:
                await talk.send(answer(503, b"{}"))
            elif kind < 0.3:
                await talk.send(answer(500, b"{}"))
            elif kind < 0.6:
                await talk.send(GOOD[:-3])
                await trio.sleep(random.random())
                await talk.send(GOOD[-3:])
            else:
                await talk.send(sse_head())
                for _ in range(5):
                    await trio.sleep(random.random() / 3)
                    await talk.send(chunk(HELLO))
                if kind > 0.9:
                    return
                await talk.send(chunk(DONE), END)

    async def visit(rig: Rig) -> None:
        client = rig.client()
        stay = random.random() * 3
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            await trio.sleep(stay)
            client.leave()

    async with lab(varied, varied, varied, watched=watched) as rig:
        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(visit, rig)
                await trio.sleep(random.random() / 20)
        await rig.settled()
        records = rig.recorder.records
        assert len(records) == 200
        assert len({id(record) for record in records}) == 200
        assert all(record.outcome is not None or record.status for record in records)
        assert sum(server.served for server in rig.servers) == sum(r.attempts for r in records)
        # Still serving, and no server ejected for disconnected clients.
        for scripted in rig.scripted.values():
            scripted.script = answering(GOOD)
        assert (await rig.post()).status == 200


# -- stalled clients ---------------------------------------------------------------------------


async def test_exchange_client_that_stops_reading_counts_against_no_server(autojump_clock):
    async with lab(endless, idle_timeout=10) as rig:
        client = rig.start_stream()
        await client.heard.wait()
        client.stall()
        await trio.sleep(20)
        assert client.done
        assert not client.got.whole
        assert rig.recorder.outcomes == [Outcome.CLIENT_GONE]
        assert rig.server("a").passive_health.failures_in_row == 0


async def test_exchange_late_response_may_be_read_slowly(autojump_clock):
    """The first-byte timeout ends with the first byte, even if that is the whole response."""

    async def late(talk: Talk) -> None:
        await talk.request()
        await trio.sleep(9)
        await talk.send(GOOD)

    async with lab(late, first_byte_timeout=10, idle_timeout=10) as rig:
        client = rig.client()
        client.stall()
        rig.nursery.start_soon(client.run)
        await trio.sleep(12)
        client.resume()
        await trio.sleep(0.1)
        assert (client.got.status, client.got.whole) == (200, True)


async def test_exchange_stalled_client_applies_backpressure_to_server(autojump_clock):
    async def firehose(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head())
        for _ in range(500):
            await talk.send(chunk(event("x" * 60_000)))
            sent.append(1)
        await talk.send(chunk(DONE), END)

    sent: list[int] = []
    async with lab(firehose) as rig:
        client = rig.client({"model": "m", "stream": True})
        client.stall()
        rig.nursery.start_soon(client.run)
        await trio.sleep(5)
        assert len(sent) < 50
        (exchange,) = rig.context.exchanges
        assert len(exchange.attempt.response.tail.bytes) < 100_000
        assert exchange.request.body == b""
        client.resume()
        await trio.sleep(1)
        assert client.got.whole
        assert len(sent) == 500


async def test_exchange_stop_cuts_stalled_client_without_stray_event(autojump_clock):
    async with lab(endless) as rig:
        client = rig.start_stream()
        await client.heard.wait()
        client.stall()
        await trio.sleep(1)
        pieces = len(client.got.pieces)
        rig.context.stopping = True
        rig.proxy.stop()
        await rig.proxy.drained()
        assert len(client.got.pieces) == pieces
        assert not client.got.whole


async def test_exchange_chunks_of_other_content_types_pass_unbuffered(autojump_clock):
    """Audio is played while it is made."""

    async def audio(talk: Talk) -> None:
        await talk.request()
        head = sse_head().replace(b"text/event-stream; charset=utf-8", b"audio/wav")
        await talk.send(head, chunk(b"RIFF"))
        await trio.sleep(5)
        await talk.send(chunk(b"more"), END)

    async with lab(audio) as rig:
        began = trio.current_time()
        got = await rig.post(path="/v1/audio/speech")
        assert got.first_at == pytest.approx(began)
        assert got.body == b"RIFFmore"


# -- bodies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("watched", [False, True])
async def test_exchange_body_in_pieces_arrives_whole(autojump_clock, watched):
    whole = json.dumps({"model": "m", "text": "é" * 1000}).encode()
    pieces = [whole[i : i + 7] for i in range(0, len(whole), 7)]
    async with lab(answering(GOOD), watched=watched) as rig:
        assert (await rig.post([*pieces, b""])).status == 200
        assert rig.scripted["a"].requests[0].body == whole


async def test_exchange_length_beyond_limit_is_refused_before_reading_body(autojump_clock):
    async with lab(answering(GOOD), max_body_mb=1) as rig:
        client = rig.client([b"x", None], headers=((b"content-length", b"1000001"),))
        got = await client.run()
        assert (got.status, got.code) == (413, "body_too_large")
        assert rig.requests().total() == 0


@pytest.mark.parametrize("size", [1_000_000, 1_000_001])
@pytest.mark.parametrize("in_pieces", [False, True])
async def test_exchange_body_of_unknown_length_is_limited(autojump_clock, size, in_pieces):
    async with lab(answering(GOOD), max_body_mb=1) as rig:
        body = b"x" * size
        pieces = [body[i : i + 65536] for i in range(0, size, 65536)] if in_pieces else [body]
        got = await rig.post(pieces)
        assert got.status == (200 if size == 1_000_000 else 413)


async def test_exchange_body_that_never_comes_is_408(autojump_clock):
    async with lab(answering(GOOD), watched=True, body_timeout=5) as rig:
        got = await rig.post([b"{", None])
        assert (got.status, got.code, got.took) == (408, "body_timeout", pytest.approx(5))


async def test_exchange_dripping_body_is_408_but_slow_body_passes(autojump_clock):
    async with lab(answering(GOOD), watched=True, body_timeout=5) as rig:
        for size, status in ((10, 408), (5000, 200)):
            client = rig.client([b" " * size] * 19 + [b"[]"])
            receive = client._receive

            async def slowly(receive=receive):
                await trio.sleep(4)
                return await receive()

            client._receive = slowly
            assert (await client.run()).status == status


async def test_exchange_body_is_timed_by_a_server_that_cancels_exchanges(autojump_clock):
    async with lab(answering(GOOD), body_timeout=5) as rig:
        client = rig.client([b"[", b"]"])
        receive = client._receive

        async def slowly():
            await trio.sleep(20)
            return await receive()

        client._receive = slowly
        assert ((await client.run()).status, client.got.took) == (200, 40.0)


# -- on real sockets ---------------------------------------------------------------------------


async def test_exchange_tcp_client_disconnect_reaches_server():
    async with trio.open_nursery() as nursery:
        async with lab(silent) as rig:
            server = ScriptedServer(nursery, one_event)
            await nursery.start(server.listen)
            rig.context.upstreams[rig.server("a")].pool = Pool(f"http://127.0.0.1:{server.port}")
            client = rig.start_stream()
            with trio.fail_after(60):
                await client.heard.wait()
                client.leave()
                while server.open:
                    await trio.sleep(0.005)
        nursery.cancel_scope.cancel()


async def test_exchange_many_tcp_streams_arrive_whole():
    events = [event(f"{n}-" + "x" * 500) for n in range(50)]
    async with trio.open_nursery() as nursery:
        async with lab(silent, silent) as rig:
            for name in "ab":
                server = ScriptedServer(nursery, streaming(*events, DONE))
                await nursery.start(server.listen)
                pool = Pool(f"http://127.0.0.1:{server.port}")
                rig.context.upstreams[rig.server(name)].pool = pool
            clients = [rig.start_stream() for _ in range(20)]
            with trio.fail_after(60):
                while not all(client.done for client in clients):
                    await trio.sleep(0.01)
            assert all(client.got.body == b"".join(events) + DONE for client in clients)
            assert all(client.got.whole for client in clients)
            assert {c.got[b"x-vllm-router-server"] for c in clients} == {b"a", b"b"}
            for link in rig.context.upstreams.values():
                link.pool.close()
        nursery.cancel_scope.cancel()


async def test_exchange_ends_without_garbage_for_the_collector(autojump_clock):
    async with lab(answering(ok(b'{"answer":1}'), ok(b'{"answer":1}'))) as rig:
        await rig.post()
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            await rig.post()
            gc.collect()
            left = {type(thing) for thing in gc.garbage}
        finally:
            gc.set_debug(0)
            gc.enable()
            gc.garbage.clear()
        assert not left & {
            *(Attempt, AttemptResult, AttemptHistory, Candidates, Deadline, DirectDownstream),
            *(Exchange, Lease, Record, Request, ServerResponse),
        }
