"""Servers that hold requests and send no token: paused, hung, or with frozen gauges."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from support.fleet_makers import detail, gauges, make_fleet
from support.proxy_harness import Client, Rig, lab
from support.scripted_server import (
    DONE,
    END,
    GOOD,
    Talk,
    answering,
    chunk,
    event,
    silent,
    sse_head,
    streaming,
)
from vllm_router.fleet.server import Server
from vllm_router.fleet.silence import STILL_FOR, TRIAL_PATIENCE, Silence
from vllm_router.fleet.state import State
from vllm_router.proxy.retry import Outcome


def state(server: Server) -> State:
    return server.current_state(trio.current_time())[0]


async def head_only(talk: Talk) -> None:
    """Like a paused vLLM: the head of a stream comes at once, and nothing else."""
    await talk.request()
    await talk.send(sse_head())
    await talk.gone()


async def comments_only(talk: Talk) -> None:
    """The same with --sse-keep-alive-interval."""
    await talk.request()
    await talk.send(sse_head())
    while True:
        await talk.send(chunk(b": keep-alive\n\n"))
        await trio.sleep(0.3)


# -- the suspicion ---------------------------------------------------------------------------------


def test_silence_probation_interval_grows():
    silence = Silence()
    assert silence.suspect(0.0, 2.0, detail("why"), 5.0)
    assert not silence.suspect(1.0, 3.0, detail("why"), 5.0)
    assert not silence.admits(6.9)
    assert silence.admits(7.0)
    assert silence.start_trial(7.0)
    assert not silence.admits(8.0)
    assert silence.suspect(7.0, 12.0, detail("why"), 5.0)
    assert (silence.since, silence.until) == (0.0, 22.0)
    assert silence.clear()
    assert silence.admits(0.0)


async def leave(client: Client) -> None:
    """Disconnect, and wait until the router has noticed."""
    client.leave()
    await trio.testing.wait_all_tasks_blocked()


# -- a client that leaves before the first byte ------------------------------------------------


@pytest.mark.parametrize("policy", ["adaptive", "least_load", "session", "prefix", "round_robin"])
@pytest.mark.parametrize("how", [silent, head_only, comments_only])
async def test_disconnect_before_any_token_marks_server_silent(autojump_clock, policy, how):
    async with lab(how, streaming(event("hi", "stop"), DONE), policy=policy) as rig:
        headers = ((b"x-session-id", b"s"), (b"content-type", b"application/json"))
        served = 0
        for _ in range(12):
            client = rig.start_stream(headers=headers)
            await trio.sleep(2)
            served += client.done
            await leave(client)
            await trio.sleep(0.01)
        assert served >= 9  # except the first, and probation requests after 5 and 10 more seconds
        assert rig.requests()["a"] <= 3


async def test_disconnect_soon_where_first_tokens_are_slow_is_ignored(autojump_clock):
    async def slow(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.send(sse_head())
            await trio.sleep(1)
            await talk.send(chunk(event("hi", "stop")), chunk(DONE), END)

    async with lab(slow, streaming(event("hi", "stop"), DONE)) as rig:
        rig.prefer("a")
        assert (await rig.stream())[b"x-vllm-router-server"] == b"a"
        for waits, expected in ((0.9, State.UP), (0.99, State.UP)):
            rig.prefer("a")
            client = rig.start_stream()
            await trio.sleep(waits)
            await leave(client)
            assert state(rig.server("a")) is expected
        assert not rig.server("a").is_evidence(2.9, stream=True)
        assert rig.server("a").is_evidence(3.1, stream=True)


async def test_disconnect_at_once_is_ignored(autojump_clock):
    async with lab(head_only, streaming(event("hi", "stop"), DONE)) as rig:
        for _ in range(5):
            rig.prefer("a")
            client = rig.start_stream()
            await trio.sleep(0.2)
            await leave(client)
        assert state(rig.server("a")) is State.UP


async def test_disconnect_while_another_request_has_tokens_is_ignored(autojump_clock):
    async def slow_for_some(talk: Talk) -> None:
        request = await talk.request()
        await talk.send(sse_head())
        if b'"wait"' in request.body:
            await talk.gone()
        for _ in range(20):
            await talk.send(chunk(event("hi")))
            await trio.sleep(0.5)
        await talk.send(chunk(event("", "stop")), chunk(DONE), END)

    async with lab(slow_for_some, streaming(event("hi", "stop"), DONE)) as rig:
        rig.prefer("a")
        rig.start_stream()
        await trio.sleep(0.1)
        rig.prefer("a")
        client = rig.start({"model": "m", "stream": True, "p": "wait"})
        await trio.sleep(3)
        await leave(client)
        assert state(rig.server("a")) is State.UP
        await trio.sleep(15)


async def test_disconnect_before_usual_json_duration_is_ignored(autojump_clock):
    async with lab(silent, answering(GOOD)) as rig:
        rig.server("a").load_estimate.record_success(30.0)
        rig.prefer("a")
        client = rig.start()
        await trio.sleep(10)
        await leave(client)
        assert state(rig.server("a")) is State.UP


async def test_disconnect_while_counters_move_is_ignored(autojump_clock):
    async with lab(head_only, streaming(event("hi", "stop"), DONE)) as rig:
        rig.prefer("a")
        client = rig.start_stream()
        await trio.sleep(2)
        for tokens in (5, 9):
            now = trio.current_time()
            rig.server("a").scraped(gauges(1, generation_tokens=tokens), now, leases=1)
            await trio.sleep(0.5)
        await leave(client)
        assert state(rig.server("a")) is State.UP


async def test_disconnect_is_not_excused_by_late_counters_of_earlier_requests(autojump_clock):
    async with lab(head_only, streaming(event("hi", "stop"), DONE)) as rig:
        a = rig.server("a")
        a.scraped(gauges(1, generation_tokens=5), trio.current_time(), leases=0)
        await trio.sleep(0.3)
        rig.prefer("a")
        a.load_estimate.metrics = gauges(1, generation_tokens=5)
        client = rig.start_stream()
        await trio.sleep(0.2)
        a.scraped(gauges(1, generation_tokens=9), trio.current_time(), leases=1)
        await trio.sleep(2)
        await leave(client)
        assert state(a) is State.SILENT


async def test_silent_server_probation_is_retried_elsewhere_after_patience(autojump_clock):
    async with lab(head_only, streaming(event("hi", "stop"), DONE)) as rig:
        rig.prefer("a")
        client = rig.start_stream()
        await trio.sleep(2)
        client.leave()
        await trio.sleep(6)
        rig.prefer("a")
        trial = rig.start_stream()
        await trio.testing.wait_all_tasks_blocked()
        assert rig.server("a").in_flight == 1
        rig.prefer("a")
        assert (await rig.stream())[b"x-vllm-router-server"] == b"b"
        while not trial.done:
            await trio.sleep(0.5)
            rig.proxy.maintain(rig.server("a"), trio.current_time())
        assert trial.got.status == 200
        assert TRIAL_PATIENCE <= trial.got.took <= TRIAL_PATIENCE + 1
        assert rig.recorder.attempts[-2:] == [("a", Outcome.SILENT), ("b", Outcome.ANSWERED)]
        assert state(rig.server("a")) is State.SILENT
        rig.prefer("a")
        assert (await rig.stream())[b"x-vllm-router-server"] == b"b"


async def test_silent_server_probation_success_ends_silence(autojump_clock):
    going_on = trio.Event()

    async def paused(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.send(sse_head())
            await going_on.wait()
            await talk.send(chunk(event("hi", "stop")), chunk(DONE), END)

    async with lab(paused, streaming(event("hi", "stop"), DONE)) as rig:
        rig.prefer("a")
        client = rig.start_stream()
        await trio.sleep(2)
        await leave(client)
        assert state(rig.server("a")) is State.SILENT
        going_on.set()
        await trio.sleep(6)
        rig.prefer("a")
        assert (await rig.stream())[b"x-vllm-router-server"] == b"a"
        assert state(rig.server("a")) is State.UP


async def silence(rig: Rig) -> None:
    """A client of server `a` disconnects before the first token."""
    rig.prefer("a")
    client = rig.start_stream()
    await trio.sleep(2)
    await leave(client)
    assert state(rig.server("a")) is State.SILENT


async def ticking(rig: Rig, seconds: float) -> None:
    for _ in range(int(seconds * 2)):
        await trio.sleep(0.5)
        rig.proxy.maintain(rig.server("a"), trio.current_time())


async def test_silent_server_waiting_requests_are_retried(autojump_clock):
    async with lab(head_only, streaming(event("hi", "stop"), DONE)) as rig:
        rig.prefer("a")
        waiting = [rig.start_stream() for _ in range(3)]
        await trio.testing.wait_all_tasks_blocked()
        await silence(rig)
        await ticking(rig, STILL_FOR - 3)
        assert not any(client.done for client in waiting)
        await ticking(rig, 2)
        assert [client.got.status for client in waiting] == [200] * 3
        assert all(b"hi" in client.got.body for client in waiting)
        assert rig.server("a").in_flight == 0
        assert state(rig.server("a")) is State.SILENT


async def test_silent_server_recovered_or_only_one_keeps_requests(
    autojump_clock,
):
    async with lab(head_only, streaming(event("hi", "stop"), DONE)) as rig:
        rig.prefer("a")
        waits = rig.start_stream()
        await trio.testing.wait_all_tasks_blocked()
        await silence(rig)
        rig.server("b").drain(on=True)
        await ticking(rig, 20)
        rig.server("b").drain(on=False)
        rig.server("a").activity.output_at = trio.current_time()  # another request has had a token
        await ticking(rig, 20)
        assert not waits.done
        assert state(rig.server("a")) is State.UP
        waits.leave()


async def test_silent_server_without_alternative_is_used(autojump_clock):
    async with lab(head_only) as rig:
        for _ in range(3):
            client = rig.start_stream()
            await trio.sleep(2)
            rig.proxy.maintain(rig.server("a"), trio.current_time())
            await leave(client)
        assert rig.requests()["a"] == 3


# -- paused through the router ---------------------------------------------------------------------


async def test_paused_server_gets_no_request_and_waiters_are_retried(autojump_clock):
    async with lab(head_only, streaming(event("hi", "stop"), DONE)) as rig:
        a = rig.server("a")
        rig.prefer("a")
        waits = rig.start_stream()
        await trio.sleep(1)
        a.pause(on=True, now=trio.current_time())
        assert state(a) is State.PAUSED
        rig.prefer("a")
        assert (await rig.stream())[b"x-vllm-router-server"] == b"b"
        rig.proxy.maintain(a, trio.current_time())
        await trio.testing.wait_all_tasks_blocked()
        assert waits.got.status == 200
        a.pause(on=False, now=trio.current_time())
        assert state(a) is State.UP


async def test_paused_server_without_alternative_keeps_requests(autojump_clock):
    async with lab(answering(GOOD)) as rig:
        rig.server("a").pause(on=True, now=trio.current_time())
        assert (await rig.post()).status == 200


def test_paused_server_with_moving_counters_is_resumed():
    server = make_fleet(1).servers["a"]
    server.scraped(gauges(1, generation_tokens=5), 1.0, leases=1)
    server.pause(on=True, now=2.0)
    server.scraped(gauges(1, generation_tokens=7), 2.5, leases=1)  # from before the pause
    assert server.paused_at == 2.0
    server.scraped(gauges(1, generation_tokens=7), 3.0, leases=1)
    assert server.paused_at == 2.0
    server.scraped(gauges(1, generation_tokens=8), 3.5, leases=1)
    assert server.paused_at is None


# -- figures that stand still ------------------------------------------------------------------


def tick(server: Server, now: float, running: float, **counters: Any) -> None:
    server.scraped(gauges(running, **counters), now, leases=server.in_flight)
    server.look_for_silence(now)


def stand_still(server: Server, running: float, until: float = STILL_FOR + 1) -> float:
    now = 0.0
    while now < until:
        tick(server, now, running, generation_tokens=50)
        now += 0.5
    return now


def names(servers) -> str:
    return "".join(server.name for server in servers)


def test_frozen_gauges_cause_one_probation_and_success_restores():
    fleet = make_fleet(2)
    a = fleet.servers["a"]
    now = stand_still(a, 100)
    assert a.silence.since is not None
    assert names(fleet.candidates("m", now)) == "ab"
    assert a.load_estimate.active == 0.0  # else no policy would ever try it
    trial = a.lease(now)
    assert trial.trial
    assert names(fleet.candidates("m", now)) == "b"
    trial.committed, trial.last_byte_at = True, now + 1
    trial.release()
    a.answered(now + 1, trial=True)
    fleet.settle(now + 1)
    assert a.state is State.UP
    tick(a, now + 2, 103, generation_tokens=60)
    assert a.load_estimate.active == 3.0
    tick(a, now + 3, 40, generation_tokens=70)
    assert a.load_estimate.active == 0.0
    tick(a, now + 4, 45, generation_tokens=80)
    assert a.load_estimate.active == 5.0


def test_frozen_gauges_of_hung_engine_keep_it_unused():
    fleet = make_fleet(2)
    a = fleet.servers["a"]
    now = stand_still(a, 7)
    for _ in range(5):
        trial = a.lease(max(now, a.silence.until))
        assert trial.trial
        now = max(now, a.silence.until) + TRIAL_PATIENCE
        trial.release()
        a.request_starved(trial.taken_at, now, detail("still silent"))
        assert names(fleet.candidates("m", now)) == "b"
        assert a.state is State.SILENT


@pytest.mark.parametrize("moves", ["counters", "gauges", "cache"])
def test_moving_gauges_of_other_clients_are_trusted(moves):
    a = make_fleet(2).servers["a"]
    for step in range(60):
        figures = {"generation_tokens": 50.0, "kv_usage": 0.5}
        running = 100.0
        if moves == "counters":
            figures["generation_tokens"] += step
        elif moves == "cache":
            figures["kv_usage"] += step / 1000
        else:
            running += step % 2
        tick(a, step * 0.5, running, **figures)
    assert a.silence.since is None
    assert a.load_estimate.stuck == 0.0


def test_idle_server_with_constant_gauges_is_healthy():
    a = make_fleet(2).servers["a"]
    stand_still(a, 0, until=100)
    assert a.silence.since is None


def test_server_without_counters_is_not_judged_by_them():
    a = make_fleet(2).servers["a"]
    for step in range(60):
        tick(a, step * 0.5, 5)
    assert a.silence.since is None


def test_waiting_requests_with_frozen_counters_mark_server_silent():
    fleet = make_fleet(2)
    a = fleet.servers["a"]
    lease = a.lease(0.0)
    now = stand_still(a, 1)
    fleet.settle(now)
    assert a.state is State.SILENT
    assert names(fleet.candidates("m", now)) == "b"
    tick(a, now + 1, 1, generation_tokens=51)
    fleet.settle(now + 1)
    assert a.state is State.UP
    lease.release()


def test_long_prefill_filling_cache_is_not_silent():
    a = make_fleet(1).servers["a"]
    a.lease(0.0)
    for step in range(100):
        tick(a, step * 0.5, 1, generation_tokens=50, kv_usage=step / 1000)
    assert a.silence.since is None


# -- a deadline counts only against a server that answers no request --------------------------


def failures(rig: Rig, name: str) -> int:
    return rig.server(name).passive_health.failures_in_row


@pytest.mark.parametrize("stream", [False, True])
async def test_deadline_on_server_answering_others_is_not_counted(autojump_clock, stream):
    async def selective(talk: Talk) -> None:
        while True:
            request = await talk.request()
            if b'"hang"' in request.body:
                await talk.gone()
            await talk.send(GOOD)

    async with lab(selective, first_byte_timeout=5) as rig:
        for _ in range(5):
            hangs = rig.start({"model": "m", "stream": stream, "p": "hang"})
            await trio.sleep(2)
            assert (await rig.post()).status == 200
            await trio.sleep(4)
            assert hangs.got.status == 504
        assert not rig.server("a").passive_health.ejected
        assert state(rig.server("a")) is State.UP


async def test_deadline_of_long_json_responses_ejects_none(autojump_clock):
    async def slow(talk: Talk) -> None:
        while True:
            await talk.request()
            await trio.sleep(8)
            await talk.send(GOOD)

    async with lab(slow, slow, first_byte_timeout=5) as rig:
        for _ in range(8):
            assert (await rig.post()).status == 504
        assert [failures(rig, name) for name in "ab"] == [0, 0]


async def test_deadline_of_streams_on_mute_server_ejects_it(autojump_clock):
    async with lab(silent, first_byte_timeout=5) as rig:
        for _ in range(3):
            assert (await rig.stream()).status == 504
        assert rig.server("a").passive_health.ejected
