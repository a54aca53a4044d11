"""Which server is asked next, and which one is blamed, when answers are bad in odd ways."""

from __future__ import annotations

import json

import pytest
import trio

from fleet_makers import eject
from proxy_harness import Rig, lab
from scripted_server import (
    Script,
    Talk,
    answer,
    answering,
    ok,
    once,
)
from vllm_router.http1.client import MAX_FIELDS, MAX_HEAD
from vllm_router.routing.retry import Outcome

GOOD = ok(b'{"answer":1}')


def failures(rig: Rig, name: str) -> int:
    return rig.server(name).traffic_health.failures_in_row


def body(number: int) -> bytes:
    return b'{"model":"m","n":%d}' % number


# -- F2: a retry never ends while a well server has not been asked -------------------------------


async def _resets(talk: Talk) -> None:
    await talk.request()
    talk.reset()


FAILS: dict[str, Script] = {
    "500": answering(answer(500, b"{}")),
    "502": answering(answer(502, b"bad gateway", content_type=b"text/html")),
    "reset": _resets,
    "closed": once(),
}


@pytest.mark.parametrize("how", FAILS)
async def test_serve_other_server_fails_everything_asks_ejected_well_server(autojump_clock, how):
    async with lab(answering(GOOD), FAILS[how]) as rig:
        eject(rig.server("a"), trio.current_time())
        rig.server("b").capacity = 100
        for number in range(40):
            assert (await rig.post(body(number))).status == 200


async def test_serve_other_server_refuses_connections_asks_ejected_well_server(autojump_clock):
    async with lab(answering(GOOD), answering(GOOD)) as rig:
        rig.scripted["b"].refuses = True
        eject(rig.server("a"), trio.current_time())
        for number in range(40):
            assert (await rig.post(body(number))).status == 200


async def test_serve_busy_then_ejected_server_fails_says_busy_with_retry_after(autojump_clock):
    busy = answer(503, b"{}", b"retry-after: 7")
    async with lab(answering(answer(500, b"{}")), answering(busy)) as rig:
        eject(rig.server("a"), trio.current_time())
        got = await rig.post()
        assert (got.status, got.code) == (503, "server_busy")
        assert got[b"retry-after"] == b"5"  # the ejection ends before the other is free


# -- F7: a trial need not last as long as its answer ----------------------------------------------


async def test_trial_long_plain_answer_does_not_keep_others_out(autojump_clock):
    first = trio.Event()

    async def slow_then_fast(talk: Talk) -> None:
        while True:
            request = await talk.request()
            if b'"slow"' in request.body:
                first.set()
                await trio.sleep(300)
            await talk.send(GOOD)

    async with lab(slow_then_fast, answering(GOOD), auto_recovery_threshold=5) as rig:
        eject(rig.server("a"), trio.current_time())
        await trio.sleep(6)
        rig.prefer("a")
        slow = rig.start(b'{"model":"m","p":"slow"}')
        await first.wait()
        assert (await rig.post())[b"x-vllm-router-server"] == b"b"
        await trio.sleep(3)
        rig.prefer("a")
        assert (await rig.post())[b"x-vllm-router-server"] == b"a"
        assert not rig.server("a").traffic_health.ejected
        await trio.sleep(300)
        assert slow.got.status == 200


# -- A8: an odd answer is held against the request first ------------------------------------------

ODD = {
    "long head": b"HTTP/1.1 200 OK\r\nmetadata: " + b"x" * (MAX_HEAD + 1),
    "many fields": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * (MAX_FIELDS + 2000),
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
    "coding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
    "not HTTP": b"SSH-2.0-OpenSSH_9\r\n",
    "101": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n",
}


def odd_for(mark: bytes, raw: bytes) -> Script:
    async def script(talk: Talk) -> None:
        while True:
            request = await talk.request()
            if mark not in request.body:
                await talk.send(GOOD)
                continue
            await talk.send(raw)
            return

    return script


@pytest.mark.parametrize("what", ODD)
async def test_judge_odd_answer_to_one_request_ejects_no_server(autojump_clock, what):
    script = odd_for(b"odd", ODD[what])
    async with lab(script, script, script) as rig:
        for _ in range(12):
            assert (await rig.post(b'{"model":"m","p":"odd"}')).status == 502
        assert rig.recorder.outcomes[0] is Outcome.INVALID
        assert [failures(rig, name) for name in "abc"] == [0, 0, 0]


async def test_judge_odd_answers_to_different_requests_eject_the_server(autojump_clock):
    async with lab(odd_for(b"", ODD["two lengths"])) as rig:
        for number in range(5):
            await rig.post(body(number))
        assert rig.server("a").traffic_health.ejected


async def test_judge_odd_answer_that_another_server_gives_well_counts(autojump_clock):
    async with lab(odd_for(b"", ODD["two lengths"]), answering(GOOD)) as rig:
        for _ in range(3):
            rig.prefer("a")
            assert (await rig.post(b'{"model":"m","p":"same"}')).status == 200
        assert rig.server("a").traffic_health.ejected


async def test_answer_with_head_of_half_a_megabyte_passes(autojump_clock):
    metadata = json.dumps([{"index": i, "embedding": i * 4096} for i in range(15_000)]).encode()
    assert len(metadata) > 500_000
    async with lab(answering(ok(b"\x00" * 64, b"metadata: " + metadata))) as rig:
        got = await rig.post()
        assert got[b"metadata"] == metadata
