"""Every outcome of an attempt: what it counts against, and what the client gets."""

from __future__ import annotations

import json
import math
import socket

import pytest
import trio

from support.fleet_makers import come_up, eject, gauges, make_config
from support.proxy_harness import CHAT, Rig, lab
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
    once,
    silent,
    sse_head,
    streaming,
)
from vllm_router.fleet.active_health import Check
from vllm_router.fleet.state import State
from vllm_router.http.client.pool import IDLE_LIMIT, Pool
from vllm_router.http.client.resolver import Host, Resolver
from vllm_router.proxy.record import Phase
from vllm_router.proxy.retry import Outcome

BUSY = answer(503, b'{"error":{"message":"busy"}}')
ABORT = ok(b'{"choices":[{"text":"","finish_reason":"abort"}]}')


def failures(rig: Rig, name: str) -> int:
    return rig.server(name).passive_health.failures_in_row


# -- responses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("watched", [False, True])
async def test_exchange_response_passes_byte_for_byte(autojump_clock, watched):
    raw = b'{"b" :1,\n "a":"\xc3\xa9" }\r\n'
    async with lab(answering(ok(raw, b"X-Engine: v"), ok(raw)), watched=watched) as rig:
        got = await rig.post()
        assert (got.status, got.body, got.whole) == (200, raw, True)
        assert got[b"x-engine"] == b"v"
        assert got[b"content-length"] == b"%d" % len(raw)
        assert got[b"x-vllm-router-server"] == b"a"
        assert got[b"x-vllm-router-attempts"] == b"1"
        assert got[b"x-request-id"] == rig.recorder.last.request_id
        assert rig.recorder.attempts == [("a", Outcome.ANSWERED)]
        assert len(rig.recorder.records) == 1
        assert rig.recorder.last.phase is Phase.DONE


@pytest.mark.parametrize("status", [400, 404, 408, 422, 499, 505])
async def test_exchange_4xx_of_live_server_passes_uncounted(autojump_clock, status):
    body = b'{"error":{"message":"no","code":1}}'
    raw = answer(status, body)
    async with lab(answering(raw), answering(raw)) as rig:
        got = await rig.post()
        assert (got.status, got.body, got.whole) == (status, body, True)
        assert b"x-vllm-router-error" not in dict(got.headers)
        assert rig.requests().total() == 1
        assert rig.recorder.outcomes == [Outcome.ANSWERED]


async def test_exchange_request_reaches_server_unchanged(autojump_clock):
    body = b'{ "model" : "m",  "x":"\\u00e9" }'
    headers = (
        (b"host", b"router"),
        (b"content-type", b"application/json"),
        (b"authorization", b"Bearer k"),
        (b"x-request-id", b"mine"),
        (b"accept-encoding", b"gzip"),
        (b"connection", b"keep-alive"),
    )
    async with lab(answering(GOOD)) as rig:
        got = await rig.post(body, headers=headers, query=b"a=%20b&c")
        (request,) = rig.scripted["a"].requests
        assert request.line == b"POST /v1/chat/completions?a=%20b&c HTTP/1.1"
        assert request.body == body
        assert request[b"authorization"] == b"Bearer k"
        assert request[b"accept-encoding"] == b"gzip"
        assert request[b"x-request-id"] == got[b"x-request-id"] == b"mine"
        assert request[b"host"] == b"a.test:1"
        assert request[b"connection"] is None


async def test_exchange_form_is_routed_by_model_and_sent_unchanged(autojump_clock):
    body = b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nwhisper\r\n--x--\r\n'
    headers = ((b"content-type", b"multipart/form-data; boundary=x"),)
    async with lab(answering(GOOD), answering(GOOD)) as rig:
        rig.server("b").listed({"whisper": {"id": "whisper"}}, 0.0)
        for _ in range(4):
            await rig.post(body, headers=headers, path="/v1/audio/transcriptions")
        assert rig.requests() == {"a": 0, "b": 4}
        assert rig.scripted["b"].requests[0].body == body


async def test_exchange_request_without_model_goes_to_any_server(autojump_clock):
    async with lab(answering(GOOD)) as rig:
        for body in (b"", b"[]", b'{"model":null}'):
            assert (await rig.post(body)).status == 200


async def test_exchange_headers_of_one_client_reach_no_other(autojump_clock):
    async with lab(answering(ok(b"{}", b"set-cookie: a=1", b"x-request-id: e"))) as rig:
        await rig.post(headers=((b"authorization", b"Bearer one"), (b"cookie", b"s=1")))
        await rig.post(headers=())
        _, second = rig.scripted["a"].requests
        names = {name for name, _ in second.fields}
        assert names <= {
            b"host",
            b"via",
            b"x-forwarded-for",
            b"x-forwarded-proto",
            b"x-request-id",
            b"content-length",
        }
        assert len(rig.scripted["a"].talks) == 1


# -- models and candidates ---------------------------------------------------------------------


async def test_exchange_unknown_model_is_404_naming_known_models(autojump_clock):
    async with lab(answering(GOOD)) as rig:
        got = await rig.post({"model": "gpt-9"})
        assert (got.status, got.code) == (404, "model_not_found")
        assert got.json["error"]["param"] == "model"
        assert "'gpt-9'" in got.json["error"]["message"]
        assert "m" in got.json["error"]["message"].split("models: ")[1]
        assert rig.requests().total() == 0


async def test_exchange_model_is_not_unknown_while_a_server_is_unprobed(
    autojump_clock,
):
    async with lab(answering(GOOD), answering(GOOD)) as rig:
        rig.down("b")
        rig.server("b").catalog.names = None
        got = await rig.post({"model": "elsewhere"})
        assert (got.status, got.code) == (503, "no_server_available")
        assert "1 could not be asked" in got.json["error"]["message"]
        assert int(got[b"retry-after"]) >= 1


async def test_exchange_endless_model_name_is_shortened_in_error(autojump_clock):
    async with lab(answering(GOOD)) as rig:
        got = await rig.post({"model": "x" * 1_000_000})
        assert got.status == 404
        assert len(got.body) < 2000


async def test_exchange_model_without_available_server_is_503_with_retry_after(autojump_clock):
    async with lab(answering(GOOD)) as rig:
        rig.down("a")
        got = await rig.post()
        assert (got.status, got.code) == (503, "no_server_available")
        assert int(got[b"retry-after"]) >= 1


async def test_exchange_before_first_probe_waits_for_it(autojump_clock):
    async with lab(answering(GOOD), up=False) as rig:
        client = rig.start()
        await trio.sleep(3.0)
        assert not client.done
        come_up(rig.server("a"), trio.current_time())
        await trio.sleep(0.1)
        assert client.got.status == 200
        assert failures(rig, "a") == 0


async def test_exchange_wait_for_first_probe_is_bounded_and_ends_on_stop(autojump_clock):
    async with lab(answering(GOOD), up=False) as rig:
        got = await rig.post()
        assert (got.status, got.took) == (503, pytest.approx(4.0, abs=0.1))
        client = rig.start()
        await trio.sleep(1.0)
        rig.context.stopping = True
        rig.proxy.stop()
        await trio.sleep(0.1)
        assert (client.got.status, client.got.code) == (503, "router_stopping")


async def test_exchange_all_servers_ejected_are_tried(autojump_clock):
    async with lab(answering(GOOD), answering(GOOD)) as rig:
        for server in rig.servers:
            eject(server, trio.current_time())
        assert (await rig.post()).status == 200


# -- the rows of the table ---------------------------------------------------------------------


async def test_exchange_busy_server_is_full_and_passed_over_at_once(autojump_clock):
    async with lab(answering(BUSY), answering(GOOD)) as rig:
        rig.prefer("a")
        got = await rig.post()
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")
        assert got[b"x-vllm-router-attempts"] == b"2"
        assert got.took == pytest.approx(0.0, abs=0.01)
        assert rig.server("a").current_state(trio.current_time())[0] is State.FULL
        assert failures(rig, "a") == 0
        await rig.post()
        assert rig.requests() == {"a": 1, "b": 2}
        await trio.sleep(1.0)
        await rig.post()
        assert rig.requests() == {"a": 2, "b": 3}


async def test_exchange_retry_after_of_server_sets_time_full(autojump_clock):
    busy = answer(429, b"{}", b"retry-after: 5")
    async with lab(answering(busy), answering(GOOD)) as rig:
        rig.prefer("a")
        for _ in range(10):
            assert (await rig.post()).status == 200
            await trio.sleep(0.4)
        assert rig.requests()["a"] == 1


async def test_exchange_all_busy_passes_the_engines_response(autojump_clock):
    busy = answer(503, b'{"error":{"message":"queue full"}}', b"retry-after: 7")
    async with lab(answering(busy), answering(busy)) as rig:
        got = await rig.post()
        assert (got.status, got[b"retry-after"]) == (503, b"7")
        assert got.json == {"error": {"message": "queue full"}}
        assert b"x-vllm-router-error" not in dict(got.headers)
        assert rig.requests() == {"a": 1, "b": 1}
        assert rig.recorder.outcomes == [Outcome.FULL, Outcome.FULL]
        assert rig.context.budget.tokens >= 10


@pytest.mark.parametrize("last", ["a", "b", "c"])
async def test_exchange_all_busy_retry_after_is_of_first_free_server(autojump_clock, last):
    waits = {"a": b"5", "b": b"3", "c": b"8"}
    behaviour = [answering(answer(503, b"{}", b"retry-after: " + wait)) for wait in waits.values()]
    async with lab(*behaviour) as rig:
        for server in rig.servers:
            busiest = gauges(9 if server.name == last else 0)
            server.scraped(busiest, trio.current_time(), leases=0)
        got = await rig.post()
        assert (got.status, got[b"x-vllm-router-server"]) == (503, last.encode())
        assert [value for name, value in got.headers if name == b"retry-after"] == [b"3"]


async def test_exchange_busy_without_retry_after_adds_none(autojump_clock):
    async with lab(answering(BUSY)) as rig:
        got = await rig.post()
        assert got.status == 503
        assert b"retry-after" not in dict(got.headers)


async def test_exchange_503_without_body_is_server_error(autojump_clock):
    async with lab(answering(answer(503, b"")), answering(GOOD)) as rig:
        rig.prefer("a")
        assert (await rig.post()).status == 200
        assert failures(rig, "a") == 1


async def reset(talk: Talk) -> None:
    await talk.head()
    talk.reset()


HALF_HEAD = once(b"HTTP/1.1 200 OK\r\ncontent-le")
HALF_BODY = once(ok(b"x" * 100)[:-50])
NOT_HTTP = once(b"garbage\r\n\r\n")

SENT_AND_FAILED: dict[str, tuple[Script, Outcome]] = {
    "500": (answering(answer(500, b"{}")), Outcome.SERVER_ERROR),
    "502": (answering(answer(502, b"")), Outcome.SERVER_ERROR),
    "504": (answering(answer(504, b"{}")), Outcome.SERVER_ERROR),
    "closed": (once(), Outcome.CONNECTION_LOST),
    "reset": (reset, Outcome.CONNECTION_LOST),
    "half a head": (HALF_HEAD, Outcome.PROTOCOL_ERROR),
    "half a body": (HALF_BODY, Outcome.CONNECTION_LOST),
    "no HTTP": (NOT_HTTP, Outcome.PROTOCOL_ERROR),
    "aborted": (answering(ABORT), Outcome.ABORTED),
    "stream without a byte": (once(sse_head()), Outcome.CONNECTION_LOST),
    "stream cut in its first event": (
        once(sse_head() + chunk(b"data: {")),
        Outcome.CONNECTION_LOST,
    ),
}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("case", SENT_AND_FAILED)
async def test_exchange_failure_before_first_byte_is_retried(autojump_clock, case, watched):
    script, outcome = SENT_AND_FAILED[case]
    async with lab(script, answering(GOOD), watched=watched) as rig:
        rig.prefer("a")
        got = await rig.post()
        assert (got.status, got.body, got.whole) == (200, b'{"answer":1}', True)
        assert got[b"x-vllm-router-attempts"] == b"2"
        assert rig.recorder.attempts == [("a", outcome), ("b", Outcome.ANSWERED)]
        assert rig.recorder.last.retries == [outcome]
        assert (failures(rig, "a"), failures(rig, "b")) == (1, 0)


@pytest.mark.parametrize("case", SENT_AND_FAILED)
@pytest.mark.parametrize("how", ["switched off", "stored", "no retries", "alone", "no budget"])
async def test_exchange_failure_of_unrepeatable_request_is_not_retried(autojump_clock, case, how):
    script, outcome = SENT_AND_FAILED[case]
    options = {"switched off": {"replay": False}, "no retries": {"max_retries": 0}}.get(how, {})
    servers = (script,) if how == "alone" else (script, answering(GOOD))
    async with lab(*servers, **options) as rig:
        rig.prefer("a")
        if how == "no budget":
            rig.context.budget.owed = rig.context.budget.floor
            for server in rig.servers[1:]:
                rig.context.failures.note(server, 1, trio.current_time(), deadly=False)
        if how == "stored":
            got = await rig.post({"model": "m", "store": True}, path="/v1/responses")
        else:
            got = await rig.post()
        assert rig.recorder.attempts == [("a", outcome)]
        assert failures(rig, "a") == (0 if outcome is Outcome.PROTOCOL_ERROR else 1)
        if outcome is Outcome.SERVER_ERROR:
            assert str(got.status) == case
            assert b"x-vllm-router-error" not in dict(got.headers)
        else:
            assert got.status == 502
            assert got.code in {
                "server_disconnected",
                "invalid_answer",
                "server_aborted",
            }
        assert got.whole


@pytest.mark.parametrize("stored", [False, True])
async def test_exchange_refused_connection_is_retried_even_if_replay_is_off(autojump_clock, stored):
    async with lab(silent, answering(GOOD), replay=False) as rig:
        rig.prefer("a")
        rig.scripted["a"].refuses = True
        got = await rig.post({"model": "m", "store": stored}, path="/v1/responses")
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")
        assert rig.recorder.attempts[0] == ("a", Outcome.CONNECT_FAILED)
        assert failures(rig, "a") == 1


async def test_exchange_connect_timeout_is_retried(autojump_clock):
    async with lab(silent, answering(GOOD), connect_timeout=1.5) as rig:
        rig.prefer("a")
        rig.scripted["a"].swallows = True
        got = await rig.post()
        assert (got.status, got.took) == (200, pytest.approx(1.5))
        assert rig.recorder.attempts[0] == ("a", Outcome.CONNECT_TIMEOUT)
        assert failures(rig, "a") == 1


@pytest.mark.parametrize(
    ("how", "code"), [("refuses", "connect_failed"), ("swallows", "connect_timeout")]
)
async def test_exchange_no_server_reachable_is_503_with_retry_after(autojump_clock, how, code):
    async with lab(silent, silent) as rig:
        for scripted in rig.scripted.values():
            setattr(scripted, how, True)
        got = await rig.post()
        assert (got.status, got.code) == (503, code)
        assert int(got[b"retry-after"]) >= 1
        assert len(rig.recorder.attempts) == 2


@pytest.mark.parametrize("hangs", [False, True])
async def test_exchange_resolver_failure_or_hang_counts_against_no_server(autojump_clock, hangs):
    """With no address ever resolved; another server is tried."""

    async def look_up(name: str) -> list[Host]:
        await trio.sleep(math.inf if hangs else 0.5)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    async with lab(silent, answering(GOOD), connect_timeout=1.5) as rig:
        rig.prefer("a")
        rig.context.upstreams[rig.server("a")].pool = Pool(
            "http://a.test:1", None, Resolver(look_up)
        )
        got = await rig.post()
        assert (got.status, got.took) == (200, pytest.approx(1.5 if hangs else 0.5))
        assert rig.recorder.attempts[0] == ("a", Outcome.UNRESOLVED)
        assert failures(rig, "a") == 0
        rig.context.upstreams[rig.server("b")].pool.close()
        rig.context.upstreams[rig.server("b")].pool = Pool(
            "http://b.test:1", None, Resolver(look_up)
        )
        got = await rig.post()
        assert (got.status, got.code) == (503, "name_not_resolved")
        assert int(got[b"retry-after"]) >= 1
        assert failures(rig, "a") == failures(rig, "b") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_exchange_silent_server_is_504_without_retry(autojump_clock, stream):
    async with lab(silent, answering(GOOD), first_byte_timeout=7) as rig:
        rig.prefer("a")
        got = await rig.post({"model": "m", "stream": stream})
        assert (got.status, got.code, got.took) == (504, "first_byte_timeout", pytest.approx(7.0))
        assert rig.recorder.attempts == [("a", Outcome.FIRST_BYTE_TIMEOUT)]
        assert failures(rig, "a") == stream  # a JSON response may take longer
        assert rig.server("a").current_state(trio.current_time())[0] is State.SILENT
        assert rig.requests()["b"] == 0


async def test_exchange_stalled_body_is_idle_timeout(autojump_clock):
    async def stops(talk: Talk) -> None:
        await talk.request()
        await talk.send(ok(b"x" * 100)[:-50])
        await talk.gone()

    async with lab(stops, answering(GOOD), first_byte_timeout=50, idle_timeout=7) as rig:
        rig.prefer("a")
        got = await rig.post()
        assert (got.status, got.code, got.took) == (504, "idle_timeout", pytest.approx(7.0))
        assert rig.recorder.attempts == [("a", Outcome.IDLE_TIMEOUT)]


async def test_exchange_total_timeout_bounds_all_attempts_uncounted(autojump_clock):
    async def slow_failure(talk: Talk) -> None:
        await talk.request()
        await trio.sleep(6)

    async with lab(slow_failure, silent, total_timeout=10) as rig:
        rig.prefer("a")
        got = await rig.post()
        assert (got.status, got.code, got.took) == (504, "total_timeout", pytest.approx(10.0))
        assert rig.recorder.outcomes == [Outcome.CONNECTION_LOST, Outcome.TOTAL_TIMEOUT]
        assert failures(rig, "b") == 0


async def test_exchange_router_error_counts_against_no_server(autojump_clock, monkeypatch):
    from vllm_router.errors import OwnFault

    async def out_of_descriptors():
        raise OwnFault("too many open files")

    async with lab(answering(GOOD), answering(GOOD)) as rig:
        for server in rig.servers:
            rig.context.upstreams[server].pool.open = out_of_descriptors
        got = await rig.post()
        assert (got.status, got.code) == (503, "router_overloaded")
        assert rig.recorder.outcomes == [Outcome.OWN_FAULT]
        assert failures(rig, "a") == failures(rig, "b") == 0


# -- which server next -------------------------------------------------------------------------


async def test_exchange_max_retries_bounds_attempts_on_distinct_servers(
    autojump_clock,
):
    empty, full = answering(ok(b"")), answering(BUSY)
    async with lab(empty, empty, empty, empty, empty, max_retries=2) as rig:
        assert (await rig.post()).code == "empty_answer"
        assert sorted(rig.requests().values()) == [0, 0, 1, 1, 1]
    async with lab(full, full, max_retries=50) as rig:
        assert (await rig.post()).status == 503
        assert rig.requests() == {"a": 1, "b": 1}


async def test_exchange_that_crashed_two_servers_goes_to_no_third(autojump_clock):
    async with lab(once(), once(), once(), answering(GOOD)) as rig:
        rig.server("d").drain(on=True)
        got = await rig.post()
        assert (got.status, got.code) == (502, "server_disconnected")
        assert rig.requests().total() == 2


@pytest.mark.parametrize(
    "said",
    [
        answer(500, b"{}"),
        ok(b'{"error":{"message":"dead","code":500}}'),
        b"no HTTP\r\n\r\n",
        ABORT,
    ],
)
async def test_exchange_that_failed_on_two_servers_goes_to_no_third(autojump_clock, said):
    async with lab(answering(said), answering(said), answering(said)) as rig:
        assert (await rig.post()).status >= 500
        assert rig.requests().total() == 2


async def test_exchange_that_crashed_two_kept_servers_goes_to_no_third(autojump_clock):
    """The crash looks like a connection closed while idle; then the port refuses."""

    def lives_once(name: str) -> Script:
        async def script(talk: Talk) -> None:
            await talk.request()
            await talk.send(GOOD)
            await talk.request()
            rig.scripted[name].refuses = True

        return script

    async with lab(*map(lives_once, "abcd")) as rig:
        for name in "abcd":
            rig.prefer(name)
            assert (await rig.post()).status == 200
        rig.recorder.attempts.clear()
        got = await rig.post()
        assert (got.status, got.code) == (502, "server_disconnected")
        assert sum(scripted.refuses for scripted in rig.scripted.values()) == 2
        assert rig.recorder.outcomes == [Outcome.CONNECTION_LOST, Outcome.CONNECTION_LOST]


def body(number: int) -> dict:
    return {"model": "m", "user": str(number)}


async def test_quarantine_lasts_a_minute(autojump_clock):
    def dies_of_body(talk: Talk):
        return _dies_of(b'"crash"', talk)

    async with lab(*[dies_of_body] * 4, failure_threshold=1000) as rig:
        killer = {"model": "m", "user": "crash"}
        assert (await rig.post(killer)).code == "server_disconnected"
        for _ in range(10):
            got = await rig.post(killer)
            assert (got.status, got.code) == (502, "poison_request")
            assert got.took == 0.0
            assert b"x-vllm-router-attempts" not in dict(got.headers)
        assert rig.requests().total() == 2
        for number in range(8):
            assert (await rig.post(body(number))).status == 200
        await trio.sleep(61)
        assert (await rig.post(killer)).code == "server_disconnected"
        assert rig.requests().total() == 2 + 8 + 2


async def _dies_of(mark: bytes, talk: Talk) -> None:
    while mark not in (await talk.request()).body:
        await talk.send(GOOD)


async def test_quarantine_body_answered_later_is_released(autojump_clock):
    """Two servers are killed one after the other: the requests on both are not the cause."""
    dying = trio.Event()

    async def mortal(talk: Talk) -> None:
        await talk.request()
        await dying.wait()

    async with lab(mortal, mortal, answering(GOOD)) as rig:
        c = rig.server("c")
        c.drain(on=True)
        unlucky = rig.start()
        await trio.testing.wait_all_tasks_blocked()
        dying.set()
        await trio.sleep(1)
        assert unlucky.got.code == "server_disconnected"
        assert (await rig.post()).code == "poison_request"
        rig.context.quarantine.answered(
            CHAT.encode(), b'{"model": "m"}'
        )  # a response that was on its way
        c.drain(on=False)
        rig.prefer("c")
        assert (await rig.post()).status == 200


async def test_quarantine_body_answered_lately_is_not_added(autojump_clock):
    """All servers die at once under many equal requests, which are not the cause."""
    dead = False

    async def mortal(talk: Talk) -> None:
        while True:
            await talk.request()
            if dead:
                return
            await talk.send(GOOD)

    async with lab(mortal, mortal, mortal) as rig:
        for _ in range(6):
            assert (await rig.post()).status == 200
        dead = True
        for _ in range(4):
            assert (await rig.post()).code == "server_disconnected"
        dead = False
        await trio.sleep(10)
        assert (await rig.post()).status == 200


async def test_quarantine_500_counts_only_if_server_goes_down_after(autojump_clock):
    """Like a vLLM whose engine has died: it answers once more, and exits."""
    failing = answering(answer(500, b"{}"))
    async with lab(failing, failing, answering(GOOD)) as rig:
        c = rig.server("c")
        c.drain(on=True)
        assert (await rig.post()).status == 500
        assert rig.context.quarantine.entries
        assert (await rig.post()).status == 500
        rig.down("a")
        assert (await rig.post()).status == 500
        rig.down("b")
        c.drain(on=False)
        rig.prefer("c")
        assert (await rig.post()).code == "poison_request"
        assert (await rig.post(body(1))).status == 200


async def test_exchange_client_repeating_a_bad_body_ejects_no_server(autojump_clock):
    async def picky(talk: Talk) -> None:
        while True:
            bad = b'"bad"' in (await talk.request()).body
            await talk.send(answer(500, b"{}") if bad else GOOD)

    async with lab(picky, picky, picky) as rig:
        for number in range(60):
            assert (await rig.post({"model": "m", "user": "bad"})).status == 500
            if number % 3 == 0:
                assert (await rig.post(body(number))).status == 200
        assert not any(server.passive_health.ejected for server in rig.servers)


async def test_exchange_same_body_failing_on_one_server_only_ejects_it(
    autojump_clock,
):
    async with lab(answering(answer(500, b"{}")), answering(GOOD), answering(GOOD)) as rig:
        for _ in range(10):
            rig.prefer("a")
            assert (await rig.post()).status == 200
        assert rig.requests()["a"] == 3
        assert rig.server("a").passive_health.ejected


async def test_exchange_waiting_on_server_put_to_sleep_is_retried(autojump_clock):
    async with lab(silent, answering(GOOD)) as rig:
        rig.prefer("a")
        client = rig.start()
        await trio.sleep(3)
        a = rig.server("a")
        a.scraped(gauges(0, asleep=True), trio.current_time(), 1)
        rig.proxy.maintain(a, trio.current_time())
        await trio.sleep(0.1)
        assert (client.got.status, client.got[b"x-vllm-router-server"]) == (200, b"b")
        assert rig.recorder.outcomes == [Outcome.SERVER_DOWN, Outcome.ANSWERED]
        assert failures(rig, "a") == 0


async def test_exchange_started_stream_continues_when_server_is_put_to_sleep(
    autojump_clock,
):
    awake = trio.Event()

    async def pauses(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head(), chunk(event("hi")))
        await awake.wait()
        await talk.send(chunk(DONE), END)

    async with lab(pauses) as rig:
        client = rig.start_stream()
        await client.heard.wait()
        await trio.sleep(10)
        a = rig.server("a")
        a.scraped(gauges(0, asleep=True), trio.current_time(), 1)
        rig.proxy.maintain(a, trio.current_time())
        await trio.sleep(0.1)
        awake.set()
        await trio.sleep(0.1)
        assert client.got.whole


async def test_exchange_on_damped_server_has_its_full_time(autojump_clock):
    """Its checks are good, and it is used because it is the only one."""

    async def slow(talk: Talk) -> None:
        await talk.request()
        await trio.sleep(4)
        await talk.send(GOOD)

    async with lab(slow, health_check_timeout=1) as rig:
        a = rig.server("a")
        rig.down("a")
        come_up(a, trio.current_time())
        rig.down("a")
        for _ in range(2):
            a.checked(Check.GOOD, 0.001, trio.current_time())
        assert a.damped
        client = rig.start()
        for _ in range(9):
            await trio.sleep(0.5)
            rig.proxy.maintain(a, trio.current_time())
        assert a.damped
        assert client.got.status == 200


# -- limits of keys ----------------------------------------------------------------------------

LIMITED = answer(429, b'{"error":{"message":"rate limit"}}', b"retry-after: 30")
KEYED = ((b"content-type", b"application/json"), (b"authorization", b"Bearer sk-one"))


async def test_exchange_429_for_client_key_does_not_make_server_full(
    autojump_clock,
):
    async with lab(answering(LIMITED), answering(GOOD)) as rig:
        rig.prefer("a")
        got = await rig.post(headers=KEYED)
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")
        assert rig.recorder.outcomes == [Outcome.LIMITED, Outcome.ANSWERED]
        assert failures(rig, "a") == 0
        assert rig.server("a").backoff_until == 0.0
        assert rig.context.budget.owed > 0


async def test_exchange_429_from_all_servers_for_key_passes_unmarked(autojump_clock):
    async with lab(answering(LIMITED), answering(LIMITED)) as rig:
        got = await rig.post(headers=KEYED)
        assert (got.status, got[b"retry-after"]) == (429, b"30")
        assert b"x-vllm-router-error" not in dict(got.headers)
        rig.fleet.settle(trio.current_time())
        assert {server.state for server in rig.servers} == {State.UP}


@pytest.mark.parametrize("header", [(b"authorization", b"Bearer sk-one"), (b"x-api-key", b"sk")])
@pytest.mark.parametrize("own", ["a", "b"])
async def test_exchange_429_for_routers_own_key_makes_that_server_full(autojump_clock, own, header):
    async with lab(answering(LIMITED), answering(LIMITED)) as rig:
        servers = [{"url": f"http://{name}.test:1", "name": name} for name in "ab"]
        servers["ab".index(own)]["api_key"] = "own"
        rig.fleet.apply(make_config(servers, policy="least_load"))
        rig.prefer("a")
        await rig.post(headers=(KEYED[0], header))
        expected = [Outcome.LIMITED, Outcome.LIMITED]
        expected["ab".index(own)] = Outcome.FULL
        assert rig.recorder.outcomes == expected


async def test_exchange_storm_of_limited_key_is_not_amplified(autojump_clock):
    async with lab(*[answering(LIMITED)] * 4) as rig:
        for _ in range(200):
            assert (await rig.post(headers=KEYED)).status == 429
        assert rig.requests().total() <= 200 * 1.2 + 3


async def test_exchange_429_without_client_key_makes_server_full(autojump_clock):
    async with lab(answering(LIMITED), answering(GOOD)) as rig:
        rig.prefer("a")
        assert (await rig.post()).status == 200
        assert rig.recorder.outcomes == [Outcome.FULL, Outcome.ANSWERED]
        assert rig.server("a").backoff_until == trio.current_time() + 30


# -- which server next, again ------------------------------------------------------------------


async def test_exchange_after_failure_retries_busy_server(autojump_clock):
    async with lab(once(), answering(GOOD)) as rig:
        rig.server("b").refused(trio.current_time(), 5.0)
        got = await rig.post()
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")


async def test_exchange_storm_of_failures_is_not_amplified(autojump_clock):
    failing = answering(answer(500, b"{}"))
    async with lab(failing, failing, failing, failure_threshold=1000) as rig:
        for _ in range(200):
            assert (await rig.post()).status == 500
        assert rig.requests().total() <= 200 * 1.2 + 3


async def test_exchange_crash_of_one_of_three_servers_loses_no_request(autojump_clock):
    """50 in flight; one server crashes under a third of them."""
    dying = trio.Event()

    async def mortal(talk: Talk) -> None:
        await talk.request()
        await dying.wait()

    async def slow(talk: Talk) -> None:
        while True:
            await talk.request()
            await trio.sleep(1)
            await talk.send(GOOD)

    async with lab(mortal, slow, slow) as rig:
        clients = [rig.start() for _ in range(50)]
        await trio.sleep(0.1)
        rig.scripted["a"].refuses = True
        dying.set()
        await trio.sleep(3)
        assert [client.got.status for client in clients] == [200] * 50
        assert rig.server("a").passive_health.ejected


# -- kept connections --------------------------------------------------------------------------


async def test_exchange_closed_kept_connection_is_retried_on_fresh_one(autojump_clock):
    async def closes_on_second(talk: Talk) -> None:
        await talk.request()
        await talk.send(GOOD)
        await talk.request()

    async with lab(closes_on_second) as rig:
        assert (await rig.post()).status == 200
        rig.recorder.attempts.clear()
        got = await rig.post()
        assert (got.status, got[b"x-vllm-router-attempts"]) == (200, b"1")
        assert rig.recorder.attempts == [("a", Outcome.ANSWERED)]
        assert failures(rig, "a") == 0
        assert len(rig.scripted["a"].talks) == 2


@pytest.mark.parametrize("how", ["stored", "switched off"])
async def test_exchange_unrepeatable_request_uses_fresh_connection(autojump_clock, how):
    """On a kept connection the router cannot know whether the server has started."""
    async with lab(answering(GOOD), replay=how != "switched off") as rig:
        for _ in range(3):
            got = await rig.post({"model": "m", "store": how == "stored"}, path="/v1/responses")
            assert got.status == 200
        assert len(rig.scripted["a"].talks) == 3


async def test_exchange_connection_is_reused_only_after_whole_response(autojump_clock):
    async with lab(answering(GOOD)) as rig:
        for _ in range(5):
            await rig.post()
        assert len(rig.scripted["a"].talks) == 1

    async def half_an_error(talk: Talk) -> None:
        await talk.request()
        await talk.send(answer(500, b"{}")[:-1])
        await talk.gone()

    async with lab(half_an_error, answering(GOOD)) as rig:
        rig.prefer("a")
        await rig.post()
        assert rig.context.upstreams[rig.server("a")].pool.idle == 0


async def test_exchange_idle_connection_is_closed_before_server_closes_it(autojump_clock):
    async with lab(answering(GOOD)) as rig:
        await rig.post()
        pool = rig.context.upstreams[rig.server("a")].pool
        await trio.sleep(IDLE_LIMIT)
        rig.proxy.maintain(rig.server("a"), trio.current_time())
        assert pool.idle == 0
        await rig.post()
        assert len(rig.scripted["a"].talks) == 2


# -- ejection ----------------------------------------------------------------------------------


async def test_exchange_sinkhole_is_ejected_and_returns_by_probation(autojump_clock):
    healthy = trio.Event()

    async def sick(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.send(GOOD if healthy.is_set() else answer(500, b"{}"))

    async with lab(sick, answering(GOOD), auto_recovery_threshold=5) as rig:
        rig.prefer("a")
        for _ in range(20):
            assert (await rig.post()).status == 200
        assert rig.requests()["a"] == 3
        await trio.sleep(6)
        rig.prefer("a")
        await rig.post()
        await rig.post()
        assert rig.requests()["a"] == 4
        healthy.set()
        await trio.sleep(12)
        rig.prefer("a")
        assert (await rig.post())[b"x-vllm-router-server"] == b"a"
        assert not rig.server("a").passive_health.ejected


async def test_exchange_probation_is_one_request_and_freed_by_disconnect(autojump_clock):
    async with lab(silent, answering(GOOD), auto_recovery_threshold=5) as rig:
        eject(rig.server("a"), trio.current_time())
        await trio.sleep(5.5)
        rig.prefer("a")
        trial = rig.start()
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(5):
            assert (await rig.post())[b"x-vllm-router-server"] == b"b"
        assert rig.server("a").in_flight == 1
        trial.leave()
        await trio.testing.wait_all_tasks_blocked()
        assert rig.server("a").passive_health.admits(trio.current_time())


async def test_exchange_probation_first_event_restores_server(autojump_clock):
    go_on = trio.Event()

    async def slow_stream(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head(), chunk(event("hi")))
        await go_on.wait()
        await talk.send(chunk(DONE), END)

    async with lab(slow_stream, auto_recovery_threshold=5) as rig:
        eject(rig.server("a"), trio.current_time())
        await trio.sleep(5.5)
        client = rig.start_stream()
        await client.heard.wait()
        assert not rig.server("a").passive_health.ejected
        go_on.set()
        await trio.sleep(0.1)
        assert client.got.whole


async def test_exchange_simultaneous_failures_are_one_ejection(autojump_clock):
    async with lab(answering(answer(500, b"{}")), auto_recovery_threshold=5) as rig:
        eject(rig.server("a"), trio.current_time())
        for _ in range(30):
            rig.start()
        await trio.sleep(1)
        assert rig.server("a").passive_health.ejections == 1


# -- the router itself -------------------------------------------------------------------------


async def test_exchange_while_stopping_is_refused(autojump_clock):
    async with lab(answering(GOOD)) as rig:
        rig.context.stopping = True
        got = await rig.post()
        assert (got.status, got.code, got[b"retry-after"]) == (503, "router_stopping", b"1")


async def test_exchange_stop_ends_wait_with_503(autojump_clock):
    async with lab(silent, answering(GOOD)) as rig:
        rig.prefer("a")
        client = rig.start()
        await trio.sleep(1)
        rig.context.stopping = True
        assert rig.proxy.stop() == 1
        await rig.proxy.drained()
        await trio.testing.wait_all_tasks_blocked()
        assert (client.got.status, client.got.code) == (503, "router_stopping")
        assert rig.recorder.outcomes == [Outcome.STOPPED]
        assert failures(rig, "a") == 0


async def test_exchange_failure_while_stopping_is_not_repeated(autojump_clock):
    async def fails_late(talk: Talk) -> None:
        await talk.request()
        rig.context.stopping = True
        await talk.send(answer(500, b"{}"))

    async with lab(fails_late, answering(GOOD)) as rig:
        rig.prefer("a")
        got = await rig.post()
        assert (got.status, got.code) == (503, "router_stopping")
        assert rig.requests() == {"a": 1, "b": 0}


async def test_exchange_last_one_ending_wakes_all_waiters(autojump_clock):
    async with lab(silent) as rig:
        rig.start()
        await trio.sleep(1)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for _ in range(2):  # a leader's drain and its end
                    nursery.start_soon(rig.proxy.drained)
                    await trio.testing.wait_all_tasks_blocked()
                rig.proxy.stop()
        await rig.proxy.drained()


async def test_exchange_request_loop_is_refused(autojump_clock):
    via = (b"via", b", ".join([b"1.1 vllm-router"] * 8))
    async with lab(answering(GOOD)) as rig:
        got = await rig.post(headers=(via,))
        assert (got.status, got.code) == (508, "loop_detected")


async def test_exchange_reload_leaves_running_requests_alone(autojump_clock):
    async def slow(talk: Talk) -> None:
        await talk.request()
        await trio.sleep(5)
        await talk.send(GOOD)

    async with lab(slow, answering(GOOD)) as rig:
        rig.prefer("a")
        client = rig.start()
        await trio.sleep(1)
        left = rig.server("a")
        config = make_config([{"url": "http://b.test:1", "name": "b"}])
        rig.fleet.apply(config)
        rig.proxy.apply(config)
        for _ in range(3):
            assert (await rig.post())[b"x-vllm-router-server"] == b"b"
        await trio.sleep(5)
        assert (client.got.status, client.got.whole) == (200, True)
        assert rig.fleet.gone() == [left]
        rig.proxy.forget(left)
        assert left not in rig.context.upstreams


async def test_exchange_error_has_openai_shape(autojump_clock):
    async with lab(once()) as rig:
        got = await rig.post()
        assert got[b"content-type"] == b"application/json"
        error = json.loads(got.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "test:1" not in error["message"]
        assert got[b"x-request-id"] == rig.recorder.last.request_id
        assert got[b"x-vllm-router-attempts"] == b"1"


async def test_exchange_streams_and_json_mix_on_one_connection(autojump_clock):
    async with lab(streaming(event("a"), DONE)) as rig:
        for _ in range(3):
            got = await rig.stream(path=CHAT)
            assert got.body == event("a") + DONE
        assert len(rig.scripted["a"].talks) == 1
