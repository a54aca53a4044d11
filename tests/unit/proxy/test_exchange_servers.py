"""The choice of the next server, and the failures that count, for odd bad responses."""

from __future__ import annotations

import json

import pytest
import trio

from support.fleet_makers import eject, make_config, shown_state
from support.proxy_harness import Rig, lab
from support.scripted_server import (
    GOOD,
    Script,
    Talk,
    answer,
    answering,
    once,
)
from vllm_router.fleet.state import State
from vllm_router.http.client.response_parser import MAX_FIELDS, MAX_HEAD
from vllm_router.proxy.retry import Outcome

NO_ROUTE = answer(404, b'{"detail":"Not Found"}')
RESPONSES = "/v1/responses"


def failures(rig: Rig, name: str) -> int:
    return rig.server(name).passive_health.failures_in_row


def body(number: int) -> bytes:
    return b'{"model":"m","n":%d}' % number


# -- retries reach every healthy server ------------------------------------------------------


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
async def test_ejected_healthy_server_is_asked_if_other_fails(autojump_clock, how):
    async with lab(answering(GOOD), FAILS[how]) as rig:
        eject(rig.server("a"), trio.current_time())
        rig.server("b").capacity = 100
        for number in range(40):
            assert (await rig.post(body(number))).status == 200


async def test_ejected_healthy_server_is_asked_if_other_refuses_connections(autojump_clock):
    async with lab(answering(GOOD), answering(GOOD)) as rig:
        rig.scripted["b"].refuses = True
        eject(rig.server("a"), trio.current_time())
        for number in range(40):
            assert (await rig.post(body(number))).status == 200


async def test_ejected_server_failing_after_busy_says_busy_with_retry_after(autojump_clock):
    busy = answer(503, b"{}", b"retry-after: 7")
    async with lab(answering(answer(500, b"{}")), answering(busy)) as rig:
        eject(rig.server("a"), trio.current_time())
        got = await rig.post()
        assert (got.status, got.code) == (503, "server_busy")
        assert got[b"retry-after"] == b"5"  # the ejection ends before the other is free


# -- probation ends with the first event ------------------------------------------------------


async def test_probation_long_json_response_admits_other_requests(autojump_clock):
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
        assert not rig.server("a").passive_health.ejected
        await trio.sleep(300)
        assert slow.got.status == 200


# -- odd responses count against the request first --------------------------------------------

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
async def test_misdirected_response_to_one_request_ejects_no_server(autojump_clock, what):
    script = odd_for(b"odd", ODD[what])
    async with lab(script, script, script) as rig:
        for _ in range(12):
            assert (await rig.post(b'{"model":"m","p":"odd"}')).status == 502
        assert rig.recorder.outcomes[0] is Outcome.PROTOCOL_ERROR
        assert [failures(rig, name) for name in "abc"] == [0, 0, 0]


async def test_misdirected_responses_to_different_requests_eject_server(autojump_clock):
    async with lab(odd_for(b"", ODD["two lengths"])) as rig:
        for number in range(5):
            await rig.post(body(number))
        assert rig.server("a").passive_health.ejected


async def test_misdirected_response_counts_if_other_server_answers(autojump_clock):
    async with lab(odd_for(b"", ODD["two lengths"]), answering(GOOD)) as rig:
        for _ in range(3):
            rig.prefer("a")
            assert (await rig.post(b'{"model":"m","p":"same"}')).status == 200
        assert rig.server("a").passive_health.ejected


async def test_response_head_of_half_a_megabyte_passes(autojump_clock):
    metadata = json.dumps([{"index": i, "embedding": i * 4096} for i in range(15_000)]).encode()
    assert len(metadata) > 500_000
    raw = answer(200, b"\x00" * 64, b"metadata: " + metadata, content_type=b"application/binary")
    async with lab(answering(raw)) as rig:
        got = await rig.post(path="/v1/embeddings")
        assert got[b"metadata"] == metadata


# -- E3, E14: refusals that concern the server ----------------------------------------------------

LOGIN = b"<html>Please log in</html>"
REFUSES = {
    "401": answer(401, b'{"error":"Unauthorized"}'),
    "402": answer(402, b'{"error":{"message":"no credit"}}'),
    "404": NO_ROUTE,
    "405": answer(405, b'{"detail":"Method Not Allowed"}'),
    "407": answer(407, b""),
    "413": answer(413, b"<html>413</html>", content_type=b"text/html"),
    "301": answer(301, b"", b"location: http://internal/"),
    "302": answer(302, b"", b"location: https://login.internal/"),
    "303": answer(303, b"", b"location: /login"),
    "307": answer(307, b"", b"location: http://gpu-7.internal:8000/v1/responses"),
    "308": answer(308, b"", b"location: /"),
    "page": answer(200, LOGIN, content_type=b"text/html; charset=utf-8"),
    "XHTML": answer(200, LOGIN, content_type=b"application/xhtml+xml"),
    "page in chunks": (
        b"HTTP/1.1 200 OK\r\ncontent-type: TEXT/HTML\r\ntransfer-encoding: chunked\r\n\r\n"
        b"5\r\n<html\r\n0\r\n\r\n"
    ),
}


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("what", REFUSES)
async def test_refusing_server_is_passed_over_and_marked(autojump_clock, what, replay):
    async with lab(answering(REFUSES[what]), answering(GOOD), replay=replay) as rig:
        for number in range(20):
            rig.prefer("a")
            got = await rig.post(body(number), path=RESPONSES)
            assert (got.status, got.body) == (200, b'{"answer":1}')
        assert rig.requests() == {"a": 1, "b": 20}
        assert failures(rig, "a") == 0
        state, reason = shown_state(rig.server("a"), trio.current_time())
        assert state is State.REFUSING
        assert RESPONSES in reason


async def test_refusing_server_of_one_route_serves_other_routes(autojump_clock):
    async def older(talk: Talk) -> None:
        while True:
            request = await talk.request()
            await talk.send(NO_ROUTE if RESPONSES.encode() in request.line else GOOD)

    async with lab(older, answering(GOOD)) as rig:
        for _ in range(5):
            rig.prefer("a")
            assert (await rig.post(path=RESPONSES))[b"x-vllm-router-server"] == b"b"
            rig.prefer("a")
            assert (await rig.post())[b"x-vllm-router-server"] == b"a"


async def test_refusing_proxy_body_limit_serves_smaller_bodies(autojump_clock):
    async def limited(talk: Talk) -> None:
        while True:
            request = await talk.request()
            await talk.send(REFUSES["413"] if len(request.body) > 1000 else GOOD)

    async with lab(limited, answering(GOOD)) as rig:
        large = b'{"model":"m","prompt":"' + b"x" * 2000 + b'"}'
        for _ in range(5):
            rig.prefer("a")
            assert (await rig.post(large)).status == 200
            rig.prefer("a")
            assert (await rig.post())[b"x-vllm-router-server"] == b"a"
        assert len([one for one in rig.scripted["a"].requests if len(one.body) > 1000]) == 1


async def test_refusing_server_is_tried_later_and_restored(autojump_clock):
    fixed = trio.Event()

    async def repaired(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.send(GOOD if fixed.is_set() else REFUSES["401"])

    async with lab(repaired, answering(GOOD), auto_recovery_threshold=5) as rig:
        for _ in range(3):
            rig.prefer("a")
            assert (await rig.post()).status == 200
        assert rig.requests()["a"] == 1
        await trio.sleep(5.1)
        rig.prefer("a")
        assert (await rig.post()).status == 200
        assert rig.requests()["a"] == 2
        await trio.sleep(6)  # the second time it lasts longer
        rig.prefer("a")
        assert (await rig.post())[b"x-vllm-router-server"] == b"b"
        fixed.set()
        await trio.sleep(6)
        rig.prefer("a")
        assert (await rig.post())[b"x-vllm-router-server"] == b"a"
        rig.fleet.settle(trio.current_time())
        assert rig.server("a").state is State.UP


@pytest.mark.parametrize("what", REFUSES)
async def test_refusing_all_servers_pass_response_unmarked(autojump_clock, what):
    raw = REFUSES[what]
    async with lab(answering(raw), answering(raw)) as rig:
        got = await rig.post()
        assert rig.requests() == {"a": 1, "b": 1}
        if what[0] in "3pX":
            assert (got.status, got.code) == (502, "server_misdirects")
            assert b"location" not in dict(got.headers)
        else:
            assert str(got.status) == what
            assert b"x-vllm-router-error" not in dict(got.headers)
        now = trio.current_time()
        assert [server.current_state(now)[0] for server in rig.servers] == [State.UP, State.UP]
        assert rig.context.budget.tokens == rig.context.budget.depth


@pytest.mark.parametrize("status", [401, 403])
async def test_refused_client_key_is_clients_error(autojump_clock, status):
    refuses = answering(answer(status, b'{"error":"no"}'))
    headers = ((b"authorization", b"Bearer mine"),)
    async with lab(refuses, answering(GOOD)) as rig:
        rig.prefer("a")
        assert (await rig.post(headers=headers)).status == status
        assert rig.requests() == {"a": 1, "b": 0}


async def test_refused_router_key_is_retried_elsewhere(autojump_clock):
    async with lab(answering(REFUSES["401"]), answering(GOOD)) as rig:
        servers = [{"url": f"http://{name}.test:1", "name": name} for name in "ab"]
        servers[0]["api_key"] = "wrong"
        rig.fleet.apply(make_config(servers, policy="least_load"))
        rig.prefer("a")
        got = await rig.post(headers=((b"authorization", b"Bearer mine"),))
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")


async def test_refused_403_for_one_body_marks_that_request_only(autojump_clock):
    """Like a firewall that answers 403 for some body contents."""
    firewall = odd_for(b"odd", answer(403, b"<html>", content_type=b"text/html"))
    async with lab(firewall, answering(GOOD)) as rig:
        for _ in range(6):
            rig.prefer("a")
            assert (await rig.post(b'{"model":"m","p":"odd"}')).status == 200
            await trio.sleep(10)
            rig.prefer("a")
            assert (await rig.post())[b"x-vllm-router-server"] == b"a"


async def test_refused_client_errors_are_not_counted(autojump_clock):
    bad = answer(400, b'{"error":{"message":"temperature must be non-negative","code":400}}')
    async with lab(answering(bad), answering(GOOD)) as rig:
        for number in range(20):
            rig.prefer("a")
            assert (await rig.post(body(number))).status == 400
            await trio.sleep(10)
        assert rig.server("a").current_state(trio.current_time())[0] is State.UP


# -- contexts of different lengths -------------------------------------------------------------


def long_only(limit: int) -> Script:
    too_long = answer(
        400,
        b'{"error":{"message":"This model\'s maximum context length is %d tokens. However, your '
        b'prompt contains at least 9999 input tokens.","param":"input_tokens","code":400}}' % limit,
    )

    async def script(talk: Talk) -> None:
        while True:
            request = await talk.request()
            await talk.send(too_long if len(request.body) > limit else GOOD)

    return script


def contexts(rig: Rig, **lengths: int) -> None:
    for name, length in lengths.items():
        card = {"id": "m", "max_model_len": length}
        rig.server(name).listed({"m": card}, trio.current_time())
    rig.fleet.settle(trio.current_time())


async def test_too_long_for_one_server_goes_to_longer_one(autojump_clock):
    async with lab(long_only(1000), long_only(1000), long_only(4000)) as rig:
        contexts(rig, a=1000, b=1000, c=4000)
        for size in (2000, 2000, 5000):
            rig.prefer("a")
            got = await rig.post(b'{"model":"m","p":"' + b"x" * size + b'"}')
            assert got.status == (200 if size < 4000 else 400)
            assert got[b"x-vllm-router-server"] == b"c"
        assert rig.requests() == {"a": 3, "b": 0, "c": 3}
        assert rig.server("a").current_state(trio.current_time())[0] is State.UP


async def test_too_long_for_certain_skips_short_server(autojump_clock):
    async with lab(long_only(1000), long_only(4000)) as rig:
        contexts(rig, a=1000, b=4000)
        for _ in range(5):
            rig.prefer("a")
            got = await rig.post({"model": "m", "max_tokens": 2000})
            assert got[b"x-vllm-router-server"] == b"b"
        rig.prefer("a")
        assert (await rig.post())[b"x-vllm-router-server"] == b"a"


async def test_too_long_for_equal_servers_is_not_retried(autojump_clock):
    async with lab(long_only(1000), long_only(1000)) as rig:
        contexts(rig, a=1000, b=1000)
        got = await rig.post(b'{"model":"m","p":"' + b"x" * 2000 + b'"}')
        assert got.status == 400
        assert rig.requests().total() == 1


# -- stale model lists -------------------------------------------------------------------------

NO_MODEL = answer(
    404,
    b'{"error":{"message":"The model `lora` does not exist.","type":"NotFoundError",'
    b'"param":"model","code":404}}',
)


async def test_listed_model_not_found_is_retried_and_list_reread(autojump_clock):
    async with lab(answering(NO_MODEL), answering(GOOD)) as rig:
        stale = []
        rig.fleet.on_stale_model_list.append(stale.append)
        for server in rig.servers:
            server.listed({"m": {"id": "m"}, "lora": {"id": "lora"}}, 0.0)
        for _ in range(5):
            rig.prefer("a")
            assert (await rig.post({"model": "lora"})).status == 200
        assert rig.requests() == {"a": 1, "b": 5}
        assert stale == [rig.server("a")]
        assert rig.server("a").models == ("m",)
        assert failures(rig, "a") == 0


async def test_listed_model_not_found_anywhere_passes_response(autojump_clock):
    async with lab(answering(NO_MODEL), answering(NO_MODEL)) as rig:
        for server in rig.servers:
            server.listed({"lora": {"id": "lora"}}, 0.0)
        got = await rig.post({"model": "lora"})
        assert (got.status, b"x-vllm-router-error" in dict(got.headers)) == (404, False)
        assert rig.requests() == {"a": 1, "b": 1}


async def test_listed_model_still_not_found_marks_server_for_it(autojump_clock):
    async with lab(answering(NO_MODEL), answering(GOOD)) as rig:
        cards = {"m": {"id": "m"}, "lora": {"id": "lora"}}
        rig.server("b").listed(cards, 0.0)
        for number in range(12):
            rig.server("a").listed(cards, trio.current_time())
            rig.prefer("a")
            assert (await rig.post({"model": "lora", "n": number})).status == 200
        assert rig.requests()["a"] == 3
        state, reason = shown_state(rig.server("a"), trio.current_time())
        assert (state, "model lora" in reason) == (State.REFUSING, True)
