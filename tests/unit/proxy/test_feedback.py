"""What the end of an attempt shows of its server: its health, the evidence, the policy's view."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from support.fleet_makers import eject, gauges
from support.proxy_harness import Rig, lab
from support.scripted_server import (
    DONE,
    END,
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
from vllm_router.fleet.silence import LEFT_AFTER
from vllm_router.proxy.retry import Outcome

GOOD = ok(b'{"choices":[{"text":"a","finish_reason":"stop"}]}')
NO_TOKENS = streaming(event("", "stop"), DONE)
UNCLEAR = streaming(b'data: {"error":{"message":"odd"}}\n\n', DONE)
ABORTED = streaming(event("a"), event("", "abort"), DONE)
TOKENS = streaming(event("a"), event("", "stop"), DONE)


def failures(rig: Rig, name: str = "a") -> int:
    return rig.server(name).passive_health.failures_in_row


def fail_once(rig: Rig, name: str = "a") -> None:
    """One failure before: an answer would end the row."""
    rig.server(name).failed(trio.current_time(), trial=False, jitter=1.0)


def is_free(rig: Rig, name: str = "a") -> bool:
    return rig.context.failures.is_free(rig.server(name), trio.current_time())


# -- the row of failures ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scripts", "outcomes", "row"),
    [
        ([answering(GOOD)], [Outcome.ANSWERED], 0),
        ([TOKENS], [Outcome.ANSWERED], 0),
        ([answering(answer(422, b"{}"))], [Outcome.ANSWERED], 0),
        ([NO_TOKENS], [Outcome.NO_TOKENS], 0),
        ([NO_TOKENS, TOKENS], [Outcome.NO_TOKENS, Outcome.ANSWERED], 2),
        ([UNCLEAR], [Outcome.UNCLEAR_ERROR], 1),
        ([UNCLEAR, TOKENS], [Outcome.UNCLEAR_ERROR, Outcome.ANSWERED], 2),
        ([ABORTED], [Outcome.ENGINE_ABORT], 0),
        ([answering(answer(429, b"{}"))], [Outcome.FULL], 1),
    ],
    ids=[
        "answer",
        "stream",
        "client error",
        "no tokens anywhere",
        "no tokens here",
        "unclear error anywhere",
        "unclear error here",
        "aborted after tokens",
        "full",
    ],
)
async def test_feedback_answer_ends_row_of_failures(
    autojump_clock, scripts: Sequence[Script], outcomes, row
):
    async with lab(*scripts) as rig:
        rig.prefer("a")
        fail_once(rig)
        await rig.stream()
        assert rig.recorder.outcomes == outcomes
        assert failures(rig) == row


@pytest.mark.parametrize(
    ("script", "outcome", "free"),
    [
        (answering(answer(429, b"{}")), Outcome.FULL, True),
        (answering(answer(404, b'{"detail":"Not Found"}')), Outcome.REFUSED, True),
        (NO_TOKENS, Outcome.NO_TOKENS, True),
        (answering(answer(500, b"{}")), Outcome.SERVER_ERROR, False),
        (once(), Outcome.CONNECTION_LOST, False),
    ],
)
async def test_feedback_only_failures_are_evidence_against_server(
    autojump_clock, script, outcome, free
):
    async with lab(script, answering(GOOD)) as rig:
        rig.prefer("a")
        await rig.stream()
        assert rig.recorder.attempts[0] == ("a", outcome)
        assert is_free(rig) is free


@pytest.mark.parametrize(("same", "status"), [(True, 500), (False, 200)])
async def test_feedback_equal_request_timing_out_elsewhere_clears_no_request(
    autojump_clock, same, status
):
    """Two servers fail under a request, and a third one in the same second, under an equal one.

    Only if the third failed another request, the servers may have failed by another reason.
    """
    error = answering(answer(500, b"{}"))
    async with lab(error, error, silent, answering(GOOD), first_byte_timeout=10) as rig:
        rig.prefer("c")
        waiting = rig.start({"model": "m", "user": "x" if same else "y"})
        await trio.sleep(10.2)
        assert waiting.got.code == "first_byte_timeout"
        for load, name in enumerate("abdc"):
            rig.server(name).scraped(gauges(load), trio.current_time(), leases=0)
        assert (await rig.post({"model": "m", "user": "x"})).status == status
        assert rig.recorder.outcomes[1:3] == [Outcome.SERVER_ERROR] * 2
        assert rig.requests()["d"] == (status == 200)


# -- the policy ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "failed"),
    [(once(), True), (answering(answer(500, b"{}")), True), (silent, False)],
    ids=["lost", "error", "silent"],
)
async def test_feedback_output_for_others_excuses_only_a_timeout(
    autojump_clock, monkeypatch, script: Script, failed
):
    async def serve(talk: Talk) -> None:
        request = await talk.request()
        if b"fails" not in request.body:
            await talk.send(GOOD)
            return
        await trio.sleep(3)
        talk.server.requests.pop()
        talk._buffer = request.head + request.body
        await script(talk)

    async with lab(serve, first_byte_timeout=9, max_retries=0) as rig:
        ends: dict[bool, bool] = {}

        def ended(_policy, lease, _now, *, failed, refused):
            ends[lease.committed] = failed

        monkeypatch.setattr(type(rig.context.policies.default), "ended", ended)
        client = rig.start({"model": "m", "user": "fails"})
        await trio.sleep(1)
        assert (await rig.post()).status == 200
        await trio.sleep(10)
        assert client.done
        assert ends == {True: False, False: failed}


# -- times --------------------------------------------------------------------------------------


async def slow(talk: Talk) -> None:
    """The first token after two seconds, the rest two seconds later."""
    while True:
        request = await talk.request()
        await trio.sleep(2)
        if b'"stream"' not in request.body:
            await talk.send(GOOD)
            continue
        await talk.send(sse_head(), chunk(event("a")))
        await trio.sleep(2)
        await talk.send(chunk(event("", "stop")), chunk(DONE), END)


async def test_feedback_first_token_time_is_learnt_from_streams(autojump_clock):
    async with lab(slow) as rig:
        load = rig.server("a").load_estimate
        await rig.post()
        assert (load.response_seconds, load.first_token_seconds) == (2.0, 0.0)
        await rig.stream()
        assert load.first_token_seconds == 2.0


async def test_feedback_error_of_the_clients_in_a_stream_gives_no_times(autojump_clock):
    async def rejects(talk: Talk) -> None:
        await talk.request()
        await trio.sleep(3)
        error = b'data: {"error":{"message":"too long","code":400}}\n\n'
        await talk.send(sse_head(), chunk(error), chunk(DONE), END)

    async with lab(rejects) as rig:
        got = await rig.stream()
        assert (got.status, rig.recorder.outcomes) == (200, [Outcome.ANSWERED])
        load = rig.server("a").load_estimate
        assert (load.response_seconds, load.first_token_seconds) == (0.0, 0.0)


async def test_feedback_doubted_trial_leaves_the_ejection_as_it_is(autojump_clock):
    """The other server's answer speaks against it, but its own trial has had no result."""
    async with lab(NO_TOKENS, TOKENS, auto_recovery_threshold=5) as rig:
        a = rig.server("a")
        for server in rig.servers:
            eject(server, trio.current_time())
        await trio.sleep(10)
        rig.prefer("a")
        await rig.stream()
        assert rig.recorder.attempts == [("a", Outcome.NO_TOKENS), ("b", Outcome.ANSWERED)]
        assert (a.passive_health.ejected, a.passive_health.ejections) == (True, 1)


@pytest.mark.parametrize("begun", [False, True], ids=["no byte", "a token"])
@pytest.mark.parametrize("how", ["total timeout", "client leaves"])
async def test_feedback_long_wait_without_a_byte_is_evidence_of_silence(autojump_clock, begun, how):
    async def hang(talk: Talk) -> None:
        await talk.request()
        if begun:
            await talk.send(sse_head(), chunk(event("a")))
        await talk.gone()

    wait = LEFT_AFTER + 1
    timeout = wait if how == "total timeout" else 10 * wait
    async with lab(hang, total_timeout=timeout, first_byte_timeout=1000, idle_timeout=1000) as rig:
        client = rig.start_stream()
        await trio.sleep(wait)
        if how == "client leaves":
            client.leave()
        await trio.sleep(0.1)
        await wait_all_tasks_blocked()
        assert client.done
        assert (rig.server("a").silence.since is not None) is not begun


@pytest.mark.parametrize(
    ("begun", "stream", "row"),
    [(False, False, 0), (True, False, 1), (False, True, 1), (True, True, 1)],
    ids=["no byte", "half a body", "no event", "half a stream"],
)
async def test_feedback_timeout_counts_unless_a_plain_response_has_no_byte(
    autojump_clock, begun, stream, row
):
    """A plain response shows no byte until it is complete, and may take longer than the limit."""

    async def hang(talk: Talk) -> None:
        await talk.request()
        if begun:
            await talk.send(*[sse_head(), chunk(event("a"))] if stream else [GOOD[:-5]])
        await talk.gone()

    async with lab(hang, first_byte_timeout=9, idle_timeout=9) as rig:
        await rig.post({"model": "m", "stream": stream})
        expected = Outcome.IDLE_TIMEOUT if begun else Outcome.FIRST_BYTE_TIMEOUT
        assert rig.recorder.outcomes == [expected]
        assert failures(rig) == row
        assert rig.server("a").silence.since is not None


# -- quarantine and retries ---------------------------------------------------------------------


async def test_feedback_error_after_one_death_causes_no_quarantine(autojump_clock):
    """An error event kills no server: the request has taken one server down, not two."""
    failing = streaming(b'data: {"error":{"message":"x","code":500}}\n\n')
    async with lab(once(), failing, failure_threshold=1000) as rig:
        for number in (1, 2):
            rig.server("a").scraped(gauges(0), trio.current_time(), leases=0)
            assert (await rig.stream()).status == 502
            assert rig.requests() == {"a": number, "b": number}
        assert set(rig.recorder.outcomes) == {Outcome.CONNECTION_LOST, Outcome.ERROR_EVENT}


async def test_feedback_two_broken_servers_without_a_third_are_reported_at_once(autojump_clock):
    async with lab(once(), once()) as rig:
        got = await rig.stream()
        assert rig.recorder.outcomes == [Outcome.CONNECTION_LOST] * 2
        assert (got.status, got.took) == (502, 0.0)


async def test_feedback_server_that_cannot_be_reached_clears_the_request(autojump_clock):
    """The request was not sent to it: three servers have failed at once by another reason."""
    async with lab(once(), once(), answering(GOOD)) as rig:
        rig.scripted["c"].refuses = True
        rig.prefer("c")
        assert (await rig.post()).status == 502
        assert rig.recorder.outcomes == [
            Outcome.CONNECT_FAILED,
            Outcome.CONNECTION_LOST,
            Outcome.CONNECTION_LOST,
        ]
        assert not rig.context.quarantine.entries
