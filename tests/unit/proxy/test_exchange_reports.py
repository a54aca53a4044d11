"""Reports of an exchange on its attempts: to the policy, the retry budget, the server, the queue.

Each of these keeps accounts, so a missing or repeated report is a leak.
"""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from support.fleet_makers import eject, gauges
from support.proxy_harness import Rig, lab
from support.scripted_server import (
    DONE,
    END,
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
from vllm_router.config.auth import KeyConfig
from vllm_router.config.types import digest_of
from vllm_router.http.asgi_types import IDENTITY
from vllm_router.proxy.candidates import SHOWN_MODEL
from vllm_router.proxy.identity import Identity
from vllm_router.proxy.record import Phase
from vllm_router.proxy.retry import Outcome

GOOD = ok(b'{"choices":[{"text":"a","finish_reason":"stop"}]}')
GOOD_STREAM = streaming(event("a"), event("", "stop"), DONE)
ERROR = answer(500, b"{}")
REJECTED = answer(400, b'{"error":{"message":"no"}}')


class PolicyLog:
    """The ends reported to the policy of a rig: server, failed, refused."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: list[tuple[str, bool, bool]] = []
        self.leased = 0
        kind = type(rig.context.policies.default)
        monkeypatch.setattr(
            kind, "ended", lambda _policy, *given, **how: self._ended(*given, **how)
        )
        monkeypatch.setattr(kind, "leased", lambda _policy, *given: self._leased())

    def _ended(self, lease: Any, _now: float, *, failed: bool, refused: bool = False) -> None:
        self.ends.append((lease.server.name, failed, refused))

    def _leased(self) -> None:
        self.leased += 1


# -- the policy ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "ends"),
    [
        (answering(GOOD), [("a", False, False)]),
        (GOOD_STREAM, [("a", False, False)]),
        (answering(REJECTED), [("a", False, True)]),
        (answering(ERROR), [("a", True, True), ("b", False, False)]),
        (once(), [("a", True, True), ("b", False, False)]),
        (answering(answer(503, b"{}")), [("a", False, True), ("b", False, False)]),
        (once(sse_head(), chunk(event("a"))), [("a", True, False)]),
    ],
    ids=["answer", "stream", "rejected", "error", "lost", "busy", "truncated"],
)
async def test_reports_each_attempt_end_reaches_policy_once(
    autojump_clock, monkeypatch, script, ends
):
    async with lab(script, answering(GOOD)) as rig:
        rig.prefer("a")
        log = PolicyLog(rig, monkeypatch)
        await rig.stream()
        assert log.ends == ends
        assert log.leased == len(ends)


async def test_reports_client_disconnect_reaches_policy(autojump_clock, monkeypatch):
    async with lab(silent) as rig:
        log = PolicyLog(rig, monkeypatch)
        client = rig.start()
        await trio.sleep(1)
        client.leave()
        await wait_all_tasks_blocked()
        assert log.ends == [("a", False, False)]


async def test_reports_timeout_on_server_answering_others_is_no_failure(
    autojump_clock, monkeypatch
):
    """A server that gives output to other requests has not failed; it is slow with this one."""

    async def slow_with_some(talk: Talk) -> None:
        request = await talk.request()
        if b"slow" in request.body:
            await talk.gone()
        await talk.send(GOOD)

    async with lab(slow_with_some, first_byte_timeout=10) as rig:
        log = PolicyLog(rig, monkeypatch)
        slow = rig.start({"model": "m", "user": "slow"})
        await trio.sleep(5)
        await rig.post()
        await trio.sleep(6)
        assert slow.got.status == 504
        assert log.ends == [("a", False, False), ("a", False, True)]
        await rig.post({"model": "m", "user": "slow"})
        assert log.ends[2:] == [("a", True, True)]


@pytest.mark.parametrize(
    ("begun", "counts"),
    [([sse_head()], False), ([sse_head(), chunk(event("a"))], True)],
    ids=["only the head", "a token"],
)
async def test_reports_timeout_looks_for_other_output_since_its_phase_began(
    autojump_clock, begun, counts
):
    """After a token only output since the last byte speaks for the server.

    Before it, any output since the request was sent does.
    """

    async def late(talk: Talk) -> None:
        request = await talk.request()
        if b"slow" not in request.body:
            await talk.send(GOOD)
            return
        await trio.sleep(5)
        await talk.send(*begun)
        await talk.gone()

    async with lab(late, first_byte_timeout=10, idle_timeout=10) as rig:
        slow = rig.start({"model": "m", "stream": True, "user": "slow"})
        await trio.sleep(3)
        await rig.post()
        await trio.sleep(15)
        assert slow.done
        assert (rig.server("a").passive_health.failures_in_row > 0) is counts


# -- the retry budget ---------------------------------------------------------------------------


async def test_reports_success_pays_retry_budget_back(autojump_clock):
    async with lab(answering(ERROR), answering(GOOD), failure_threshold=1000) as rig:
        rig.prefer("a")
        budget = rig.context.budget
        await rig.post()
        assert rig.recorder.outcomes == [Outcome.SERVER_ERROR, Outcome.ANSWERED]
        after_replay = budget.owed
        assert after_replay == pytest.approx(1.0 - budget.share)
        rig.prefer("b")
        await rig.post({"model": "m", "user": "other"})
        assert budget.owed == pytest.approx(after_replay - budget.share)
        for _ in range(10):
            await rig.post()
        assert budget.owed == 0


# -- the server ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 400, 404, 422])
async def test_reports_status_decides_between_success_and_error(
    autojump_clock, monkeypatch, status
):
    """A fast error says nothing of the duration of a response."""
    async with lab(answering(answer(status, b'{"choices":[{"text":"a"}]}'))) as rig:
        reported: list[str] = []
        fleet = rig.fleet
        for name in ("record_success", "record_error"):
            before = getattr(fleet, name)

            def note(*given: Any, name: str = name, before: Any = before) -> None:
                reported.append(name)
                before(*given)

            monkeypatch.setattr(fleet, name, note)
        await rig.post()
        assert reported == ["record_success" if status == 200 else "record_error"]


async def test_reports_success_keeps_own_failures_of_server(autojump_clock, monkeypatch):
    """Another server's success is reported only to the servers that failed the request before."""
    async with lab(answering(ERROR), answering(GOOD), failure_threshold=1000) as rig:
        rig.prefer("a")
        reported: list[str] = []
        before = rig.fleet.answered_elsewhere

        def note(server: Any, *given: Any, **how: Any) -> None:
            reported.append(server.name)
            before(server, *given, **how)

        monkeypatch.setattr(rig.fleet, "answered_elsewhere", note)
        await rig.post()
        assert reported == ["a"]


async def test_reports_repeated_body_losing_connections_ejects_server(autojump_clock):
    """A lost connection counts each time; only an error response may be caused by the body."""

    async def loses(talk: Talk) -> None:
        await talk.request()

    async with lab(loses, failure_threshold=3, max_retries=0) as rig:
        for _ in range(3):
            await rig.post()
            await trio.sleep(20)
        assert rig.server("a").passive_health.ejected


async def test_reports_probation_stream_broken_later_does_not_restore(autojump_clock):
    """Its first event restored the server. A later ejection is not undone by its end."""
    go_on = trio.Event()

    async def slow_stream(talk: Talk) -> None:
        request = await talk.request()
        if b'"stream"' not in request.body:
            return
        await talk.send(sse_head(), chunk(event("hi")))
        await go_on.wait()
        await talk.send(chunk(event("", "stop")), chunk(DONE), END)

    async with lab(slow_stream, auto_recovery_threshold=5, max_retries=0) as rig:
        server = rig.server("a")
        eject(server, trio.current_time())
        await trio.sleep(5.5)
        client = rig.start_stream()
        await client.heard.wait()
        assert not server.passive_health.ejected
        eject(server, trio.current_time())
        go_on.set()
        await wait_all_tasks_blocked()
        assert client.got.whole
        assert server.passive_health.ejected


async def test_reports_two_servers_put_to_sleep_cause_no_quarantine(autojump_clock):
    async with lab(silent, silent, answering(GOOD)) as rig:
        rig.prefer("a")
        client = rig.start({"model": "m", "user": "sleepy"})
        for name in "ab":
            await trio.sleep(3)
            rig.prefer("b")
            server = rig.server(name)
            server.scraped(gauges(0, asleep=True), trio.current_time(), 1)
            rig.proxy.maintain(server, trio.current_time())
            await trio.sleep(0.5)
        assert client.done
        assert rig.recorder.outcomes[:2] == [Outcome.SERVER_DOWN, Outcome.SERVER_DOWN]
        got = await rig.post({"model": "m", "user": "sleepy"})
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"c")


# -- the queue and the memory -------------------------------------------------------------------


async def after_three_seconds(talk: Talk, *reply: bytes) -> None:
    await talk.request()
    await trio.sleep(3)
    await talk.send(*reply)


@pytest.mark.parametrize(
    ("reply", "times"),
    [
        ([GOOD], [3.0]),
        ([REJECTED], []),
        ([sse_head(), chunk(event("a"))], []),
        ([sse_head(), chunk(event("a")), chunk(event("", "stop")), chunk(DONE), END], [3.0]),
    ],
    ids=["answer", "rejected", "truncated", "stream"],
)
async def test_reports_queue_learns_times_of_successes_only(
    autojump_clock, monkeypatch, reply, times
):
    """The time of a quick refusal would make a request with little time look promising."""

    async def script(talk: Talk) -> None:
        await after_three_seconds(talk, *reply)

    async with lab(script, limits={"max_in_flight": 4}) as rig:
        await trio.sleep(5)
        found: list[float] = []
        assert rig.context.admission is not None
        monkeypatch.setattr(
            rig.context.admission, "served", lambda _model, took: found.append(took)
        )
        await rig.stream()
        assert found == times


async def test_reports_started_stream_frees_body_memory(autojump_clock):
    go_on = trio.Event()

    async def slow_stream(talk: Talk) -> None:
        await talk.request()
        await talk.send(sse_head(), chunk(event("hi")))
        await go_on.wait()
        await talk.send(chunk(event("", "stop")), chunk(DONE), END)

    async with lab(slow_stream) as rig:
        client = rig.start([b'{"model":"m","stream":true,', b'"user":"%b"}' % (b"x" * 100_000)])
        await wait_all_tasks_blocked()
        assert client.got.pieces
        assert rig.context.bodies.held == 0
        go_on.set()


# -- requests that no server gets ---------------------------------------------------------------


async def test_reports_without_model_and_server_is_503(autojump_clock):
    async with lab(silent) as rig:
        rig.down("a")
        got = await rig.post({"messages": []})
        assert (got.status, got.code) == (503, "no_server_available")
        assert "model" not in got.json["error"]["message"]


@pytest.mark.parametrize("timeout", [b"2", b"3"])
async def test_reports_deadline_expired_while_reading_body_costs_no_attempt(
    autojump_clock, timeout
):
    class Slow:
        """A client whose body takes three seconds."""

        def __init__(self, rig: Rig) -> None:
            headers = ((b"x-request-timeout", timeout),)
            self.client = rig.client([b'{"model":', b'"m"}'], headers=headers)
            self.receive = self.client._receive
            self.client._receive = self._receive

        async def _receive(self) -> dict[str, Any]:
            await trio.sleep(1.5)
            return await self.receive()

    async with lab(answering(GOOD), limits={"max_in_flight": 4}) as rig:
        got = await Slow(rig).client.run()
        assert (got.status, got.code, got.took) == (504, "total_timeout", 3.0)
        assert (rig.recorder.last.attempts, rig.scripted["a"].talks) == (0, [])


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ({"model": "x" * 100_000}, repr("x" * SHOWN_MODEL)),
        ({"model": "other"}, "'other'"),
        ({"prompt": "x"}, "a request that names no model"),
    ],
)
async def test_reports_forbidden_model_is_named_up_to_a_limit(autojump_clock, body, shown):
    async with lab(answering(GOOD)) as rig:
        key = KeyConfig(name="k", digest=digest_of("k"), models=("m", "n"))
        client = rig.client(body)
        client._scope[IDENTITY] = Identity(key)
        got = await client.run()
        assert (got.status, got.code) == (403, "model_not_allowed")
        error = got.json["error"]
        assert error["message"] == f"This key does not allow {shown}. Allowed models: m, n."
        assert error["param"] == "model"


@pytest.mark.parametrize(
    ("script", "phase"),
    [
        (answering(GOOD), Phase.DONE),
        (answering(ERROR), Phase.DONE),
        (once(sse_head(), chunk(event("a"))), Phase.STREAM),
    ],
    ids=["answer", "error", "broken off"],
)
async def test_reports_phase_is_where_the_exchange_ended(autojump_clock, script, phase):
    async with lab(script) as rig:
        got = await rig.stream()
        assert (rig.recorder.last.phase, got.whole) == (phase, phase is Phase.DONE)


@pytest.mark.parametrize("watched", [False, True])
async def test_reports_stop_before_any_attempt_is_recorded_as_stopped(autojump_clock, watched):
    """A request that waits in the queue when the router stops is not a disconnect."""
    async with lab(silent, limits={"max_in_flight": 1}, watched=watched) as rig:
        first = rig.start()
        await wait_all_tasks_blocked()
        second = rig.start()
        await wait_all_tasks_blocked()
        rig.context.stopping = True
        second._task.cancel()
        await wait_all_tasks_blocked()
        assert rig.recorder.last.outcome is Outcome.STOPPED
        first._task.cancel()
        await wait_all_tasks_blocked()


async def test_reports_disconnect_before_any_attempt_is_recorded(autojump_clock):
    async with lab(silent, limits={"max_in_flight": 1}) as rig:
        first = rig.start()
        await wait_all_tasks_blocked()
        second = rig.start()
        await wait_all_tasks_blocked()
        second.leave()
        await wait_all_tasks_blocked()
        assert rig.recorder.last.outcome is Outcome.CLIENT_GONE
        first.leave()
        await wait_all_tasks_blocked()
