"""Overload: caps of servers, the order of waiting requests, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from support.fleet_makers import come_up, eject, make_config
from support.proxy_harness import Client, Rig, lab
from support.scripted_server import (
    DONE,
    MemoryPool,
    ScriptedServer,
    Talk,
    event,
    ok,
    silent,
    streaming,
)
from vllm_router.config.auth import KeyConfig
from vllm_router.config.types import digest_of
from vllm_router.http.asgi_types import IDENTITY
from vllm_router.proxy.identity import Identity
from vllm_router.proxy.record import Phase
from vllm_router.proxy.retry import Outcome

PRIORITY = (b"x-vllm-priority", b"-1")


def working(seconds: float = 1.0, most: list[int] | None = None) -> Any:
    """A server that takes a fixed time per request, and records its peak concurrency."""
    running = 0

    async def script(talk: Talk) -> None:
        nonlocal running
        while True:
            request = await talk.request()
            running += 1
            if most is not None:
                most[0] = max(most[0], running)
            try:
                with trio.move_on_after(seconds):
                    await talk.gone()
                    return
            finally:
                running -= 1
            await talk.send(ok(request.body))

    return script


def limited(*scripts: Any, cap: int = 1, more: dict[str, Any] | None = None, **limits: Any) -> Any:
    return lab(*scripts, limits={"max_in_flight": cap, **limits}, **(more or {}))


async def started(rig: Rig, *arguments: Any, **options: Any) -> Client:
    """A request that has advanced as far as it can for now."""
    client = rig.start(*arguments, **options)
    await wait_all_tasks_blocked()
    return client


def body(number: int, **more: Any) -> dict[str, Any]:
    return {"model": "m", "n": number, **more}


def order(*clients: Client) -> list[int]:
    """The numbers of the requests in the order of their responses."""
    done = sorted((client for client in clients if client.got.status == 200), key=_first)
    return [client.got.json["n"] for client in done]


def _first(client: Client) -> float:
    assert client.got.first_at is not None
    return client.got.first_at


def waiting(rig: Rig) -> int:
    assert rig.context.admission is not None
    return rig.context.admission.waiting


# -- caps and order ---------------------------------------------------------------------------


@pytest.mark.parametrize("watched", [False, True])
async def test_queue_with_cap_never_exceeds_it_and_serves_all(autojump_clock, watched):
    most_a, most_b = [0], [0]
    async with limited(
        working(1.0, most_a), working(0.3, most_b), cap=3, more={"watched": watched}
    ) as rig:
        clients = [rig.start(body(n)) for n in range(40)]
        await trio.sleep(60)
        assert [client.got.status for client in clients] == [200] * 40
        assert (most_a, most_b) == ([3], [3])
        assert rig.requests()["b"] > 2 * rig.requests()["a"]
        assert waiting(rig) == 0


async def test_queue_policy_failure_ends_waiting_request_alone(autojump_clock, monkeypatch):
    """Its server is chosen while another request ends: that one is answered, and reported."""
    async with limited(working(), working()) as rig:
        first = [await started(rig, body(n)) for n in range(2)]
        policy = rig.context.policies.default

        def fail(*_given: object) -> None:
            monkeypatch.undo()
            raise ZeroDivisionError("a defect of a policy")

        monkeypatch.setattr(policy, "leased", fail)
        second = rig.client(body(2))
        failures = []

        async def run() -> None:
            try:
                await second.run()
            except ZeroDivisionError as error:
                failures.append(error)

        rig.nursery.start_soon(run)
        await wait_all_tasks_blocked()
        third = await started(rig, body(3))
        await trio.sleep(5)
        assert [client.got.status for client in (*first, third)] == [200] * 3
        assert rig.recorder.outcomes[:2] == [Outcome.ANSWERED] * 2
        assert len(failures) == 1
        assert waiting(rig) == 0


async def test_queue_without_limits_forwards_at_once(autojump_clock):
    most = [0]
    async with lab(working(1.0, most)) as rig:
        clients = [rig.start(body(n)) for n in range(40)]
        await trio.sleep(2)
        assert [client.got.status for client in clients] == [200] * 40
        assert most == [40]
        assert rig.context.admission is None


async def test_queue_with_limits_without_cap_forwards_at_once(autojump_clock):
    most = [0]
    async with lab(working(1.0, most), limits={}) as rig:
        for n in range(40):
            rig.start(body(n))
        await trio.sleep(2)
        assert most == [40]


async def test_queue_policy_is_asked_only_with_two_known_candidates(autojump_clock, monkeypatch):
    async with limited(working(), working(), working(), cap=1) as rig:
        seen: list[Any] = []
        pick = rig.context.policies.default.pick

        def watched(candidates: Any, facts: Any, now: float) -> Any:
            seen.append(candidates)
            return pick(candidates, facts, now)

        monkeypatch.setattr(rig.context.policies.default, "pick", watched)
        for number in range(3):
            await started(rig, body(number))
        assert [len(candidates) for candidates in seen] == [3, 2]
        assert seen[0] is rig.fleet.candidates("m", trio.current_time())
        await trio.sleep(2)


async def test_queue_is_first_come_first_served(autojump_clock):
    async with limited(working()) as rig:
        clients = [await started(rig, body(n)) for n in range(6)]
        await trio.sleep(10)
        assert order(*clients) == [0, 1, 2, 3, 4, 5]
        assert [record.waited for record in rig.recorder.records] == pytest.approx(range(6))


async def test_queue_priority_of_header_and_body_decides_order(autojump_clock):
    async with limited(working()) as rig:
        clients = [
            await started(rig, body(0)),
            await started(rig, body(1, priority=3)),
            await started(rig, body(2)),
            await started(rig, body(3, priority=-1)),
            await started(rig, body(4, priority=9), headers=((b"x-vllm-priority", b"-2"),)),
            await started(rig, body(5, priority=-1.5), headers=((b"x-vllm-priority", b"no"),)),
        ]
        await trio.sleep(10)
        assert order(*clients) == [0, 4, 3, 2, 5, 1]


async def test_queue_priority_is_ignored_if_configured(autojump_clock):
    async with limited(working(), client_priority=False) as rig:
        clients = [await started(rig, body(n, priority=-n)) for n in range(4)]
        await trio.sleep(10)
        assert order(*clients) == [0, 1, 2, 3]


def with_key(rig: Rig, name: str, number: int) -> Client:
    client = rig.client(body(number))
    key = KeyConfig(name=name, digest=digest_of(name))
    client._scope[IDENTITY] = Identity(key, given=True)
    rig.nursery.start_soon(client.run)
    return client


async def test_queue_keys_take_turns(autojump_clock):
    async with limited(working()) as rig:
        clients = []
        for number, name in enumerate("aaaaabb"):
            clients.append(with_key(rig, name, number))
            await wait_all_tasks_blocked()
        await trio.sleep(10)
        assert order(*clients) == [0, 1, 5, 2, 6, 3, 4]


async def test_queue_busy_model_delays_no_other_model(autojump_clock):
    async with limited(working(5), working(1)) as rig:
        for server, model in zip(rig.servers, ("slow", "fast"), strict=True):
            come_up(server, 0.0, model)
        slow = [await started(rig, {"model": "slow", "n": n}) for n in range(3)]
        fast = [await started(rig, {"model": "fast", "n": n}) for n in range(3)]
        await trio.sleep(3.5)
        assert order(*fast) == [0, 1, 2]
        assert order(*slow) == []
        await trio.sleep(20)
        assert order(*slow) == [0, 1, 2]


# -- refusals ---------------------------------------------------------------------------------


async def test_queue_full_refuses_at_once_without_server_contact(autojump_clock):
    async with limited(working(), queue_size=3) as rig:
        clients = [await started(rig, body(n)) for n in range(4)]
        got = [await rig.post(body(9)) for _ in range(50)]
        assert {(one.status, one.code, one.took) for one in got} == {(429, "queue_full", 0.0)}
        assert "3 requests wait already" in got[0].json["error"]["message"]
        await trio.sleep(10)
        assert order(*clients) == [0, 1, 2, 3]
        assert rig.requests()["a"] == 4


async def test_queue_retry_after_is_expected_drain_time(autojump_clock):
    async with limited(working(2.0), cap=2, queue_size=10) as rig:

        async def keep_busy() -> None:
            while True:
                await rig.post(body(0))

        for _ in range(12):
            rig.nursery.start_soon(keep_busy)
        await trio.sleep(60.1)
        got = await rig.post(body(1))
        # one slot a second becomes free, and ten wait
        assert got.status == 429
        assert got[b"retry-after"] in (b"11", b"12")
        raise_cap(rig, 100)
        rig.nursery.cancel_scope.cancel()


async def test_queue_of_size_zero_refuses_at_once(autojump_clock):
    async with limited(working(3.0), queue_size=0) as rig:
        await started(rig, body(0))
        got = await rig.post(body(1))
        assert (got.status, got.code) == (429, "queue_full")
        assert "The queue is off" in got.json["error"]["message"]
        await trio.sleep(4)
        assert (await rig.post(body(2))).status == 200


async def test_queue_of_size_zero_measures_drain_rate(autojump_clock):
    async with limited(working(10.0), queue_size=0) as rig:
        for n in range(6):
            client = await started(rig, body(n))
            got = await rig.post(body(99))
            await trio.sleep(15)
            assert client.got.status == 200
        # a request has waited for a busy server for ten seconds, six times
        assert got[b"retry-after"] == b"10"


async def test_queue_wait_longer_than_limit_ends_with_error(autojump_clock):
    async with limited(working(100), queue_timeout=5) as rig:
        await started(rig, body(0))
        got = await rig.post(body(1))
        assert (got.status, got.code, got.took) == (503, "queue_timeout", 5.0)
        assert 1 <= int(got[b"retry-after"] or 0) <= 5
        assert rig.recorder.last.waited == pytest.approx(5)
        assert waiting(rig) == 0
        await trio.sleep(100)


@pytest.mark.parametrize("given", [b"x", b"0", b"-1", b"1e3", b"", b"nan", b"30s"])
async def test_queue_invalid_timeout_header_is_client_error(autojump_clock, given):
    async with limited(working()) as rig:
        got = await rig.post(body(0), headers=((b"x-request-timeout", given),))
        assert (got.status, got.code) == (400, "invalid_request_timeout")
        assert rig.requests()["a"] == 0


@pytest.mark.parametrize("given", [b"2.5", b"1", b"0.5", b".5"])
async def test_queue_deadline_ends_wait(autojump_clock, given):
    async with limited(working(100)) as rig:
        await started(rig, body(0))
        got = await rig.post(body(1), headers=((b"x-request-timeout", given),))
        assert (got.status, got.code, got.took) == (504, "total_timeout", float(given))
        await trio.sleep(100)
        assert rig.requests()["a"] == 1


async def test_queue_deadline_covers_whole_exchange(autojump_clock):
    async with limited(working(10)) as rig:
        await started(rig, body(0))
        got = await rig.post(body(1), headers=((b"x-request-timeout", b"12"),))
        assert (got.status, got.code, got.took) == (504, "total_timeout", 12)
        assert rig.requests()["a"] == 2


async def test_queue_deadline_is_ignored_without_limits(autojump_clock):
    async with lab(working(10)) as rig:
        got = await rig.post(body(1), headers=((b"x-request-timeout", b"1"),))
        assert got.status == 200


async def test_queue_expected_wait_beyond_deadline_refuses_at_once(autojump_clock):
    async with limited(working(1.0), queue_size=50) as rig:
        clients = [await started(rig, body(n)) for n in range(30)]
        await trio.sleep(9.5)  # one slot a second: the last one will wait for 20 more
        late = await rig.post(body(99), headers=((b"x-request-timeout", b"8"),))
        assert (late.status, late.code, late.took) == (503, "queue_too_long", 0.0)
        assert late[b"retry-after"] in (b"15", b"16", b"17")
        patient = await rig.post(body(100), headers=((b"x-request-timeout", b"40"),))
        assert patient.status == 200
        assert 20 < patient.took < 23
        assert order(*clients) == list(range(30))


async def test_queue_deadline_shorter_than_any_response_refuses_at_once(autojump_clock):
    async with limited(working(4.0)) as rig:
        for n in range(5):
            await rig.post(body(n))
        running = await started(rig, body(5))
        hopeless = rig.start(body(6), headers=((b"x-request-timeout", b"7"),))
        await wait_all_tasks_blocked()
        patient = await started(rig, body(7))
        await trio.sleep(9)
        # three seconds were left at its turn, and four are needed
        assert (hopeless.got.status, hopeless.got.code) == (504, "total_timeout")
        assert 4 <= hopeless.got.took < 4.1
        assert order(running, patient) == [5, 7]
        assert patient.got.took == pytest.approx(8)
        assert rig.requests()["a"] == 7


async def test_queue_first_waiter_is_never_refused_by_prediction(autojump_clock):
    async with limited(working(10.0), queue_timeout=100) as rig:
        for n in range(6):
            await started(rig, body(n))
        await trio.sleep(51)
        assert rig.servers[0].at_cap
        got = await rig.post(body(9), headers=((b"x-request-timeout", b"5"),))
        assert (got.status, got.took) == (504, 5.0)
        await trio.sleep(10)


# -- disconnects ------------------------------------------------------------------------------


@pytest.mark.parametrize("watched", [False, True])
async def test_queue_client_disconnect_frees_place(autojump_clock, watched):
    async with limited(working(10), queue_size=1, more={"watched": watched}) as rig:
        first, second = await started(rig, body(0)), await started(rig, body(1))
        assert (await rig.post(body(2))).status == 429
        second.leave()
        await wait_all_tasks_blocked()
        assert waiting(rig) == 0
        assert rig.recorder.last.outcome is Outcome.CLIENT_GONE
        assert rig.recorder.last.phase is Phase.QUEUE
        third = await started(rig, body(3))
        assert waiting(rig) == 1
        await trio.sleep(30)
        assert order(first, third) == [0, 3]


@pytest.mark.parametrize("watched", [False, True])
async def test_queue_client_disconnect_at_admission_passes_slot_on(autojump_clock, watched):
    async with limited(working(100), more={"watched": watched}) as rig:
        first, second, third = [await started(rig, body(n)) for n in range(3)]
        first.leave()
        while (
            waiting(rig) == 2
        ):  # until the second has been given the server, and not one step more
            await trio.lowlevel.checkpoint()
        assert len(rig.scripted["a"].requests) == 1
        second.leave()
        await wait_all_tasks_blocked()
        assert waiting(rig) == 0
        assert rig.servers[0].in_flight == 1
        assert rig.scripted["a"].requests[-1].body == b'{"model": "m", "n": 2}'
        third.leave()


async def test_queue_slot_given_to_disconnected_client_goes_to_next(autojump_clock):
    async with limited(working(100)) as rig:
        first, second, third = [await started(rig, body(n)) for n in range(3)]
        second.leave()
        raise_cap(rig, 2)  # before its task has noticed
        await wait_all_tasks_blocked()
        assert (waiting(rig), rig.servers[0].in_flight) == (0, 2)
        assert rig.scripted["a"].requests[-1].body == b'{"model": "m", "n": 2}'
        first.leave()
        third.leave()


async def test_queue_free_slot_wakes_only_the_next_waiter(autojump_clock):
    async with limited(working()) as rig:
        for n in range(30):
            await started(rig, body(n))
        admission = rig.context.admission
        assert admission is not None
        (queue,) = admission.model_queues
        waiters = list(queue)
        await trio.sleep(1.0)
        await wait_all_tasks_blocked()
        assert [waiter.woken.is_set() for waiter in waiters] == [True] + [False] * 28
        await trio.sleep(60)


# -- failures ---------------------------------------------------------------------------------


async def dying(talk: Talk) -> None:
    await talk.request()
    await trio.sleep(1)


async def test_queue_retry_respects_cap_and_goes_before_later_arrivals(autojump_clock):
    most = [0]
    async with limited(dying, working(3.0, most)) as rig:
        rig.prefer("a")
        first = await started(rig, body(0))
        second = await started(rig, body(1))
        third = await started(rig, body(2))
        assert rig.requests() == {"a": 1, "b": 1}
        go_down_quietly(rig, "a")
        await trio.sleep(20)
        assert most == [1]
        assert order(first, second, third) == [1, 0, 2]
        assert first.got[b"x-vllm-router-attempts"] == b"2"


def go_down_quietly(rig: Rig, name: str) -> None:
    """It accepts nothing new; running requests stay there."""
    rig.server(name).drain(on=True)


async def test_queue_of_size_zero_lets_retries_wait(autojump_clock):
    async with limited(dying, working(3.0), queue_size=0) as rig:
        rig.prefer("a")
        first, second = await started(rig, body(0)), await started(rig, body(1))
        go_down_quietly(rig, "a")
        await trio.sleep(20)
        assert order(first, second) == [1, 0]


async def test_queue_without_servers_waits_for_one_to_come_up(autojump_clock):
    async with limited(working(), cap=2, queue_size=5) as rig:
        rig.down("a")
        clients = [await started(rig, body(n)) for n in range(5)]
        got = await rig.post(body(9))
        assert (got.status, got.code) == (503, "no_server_available")
        await trio.sleep(3)
        assert waiting(rig) == 5
        come_up(rig.server("a"), trio.current_time())
        rig.fleet.settle(trio.current_time())
        assert waiting(rig) == 3  # as many as it accepts at once
        await trio.sleep(5)
        assert order(*clients) == [0, 1, 2, 3, 4]


async def test_queue_without_servers_ends_wait_with_error(autojump_clock):
    async with limited(working(), queue_timeout=5) as rig:
        rig.down("a")
        got = await rig.post(body(0))
        assert (got.status, got.code, got.took) == (503, "no_server_available", 5.0)
        assert got[b"retry-after"] is not None


async def test_queue_unknown_model_does_not_wait(autojump_clock):
    async with limited(working(100)) as rig:
        await started(rig, body(0))
        got = await rig.post({"model": "nope"})
        assert (got.status, got.code, got.took) == (404, "model_not_found", 0.0)
        await trio.sleep(100)


async def test_queue_unknown_models_share_one_limit(autojump_clock):
    async with limited(silent, queue_size=2) as rig:
        rig.server("a").catalog.names = None
        clients = [await started(rig, {"model": f"m{n}"}) for n in range(3)]
        assert (await rig.post({"model": "m4"})).code == "queue_full"
        assert rig.context.admission is not None
        assert len(rig.context.admission.model_queues) == 1
        for client in clients:
            client.leave()


async def test_queue_probation_request_is_a_waiting_one(autojump_clock):
    async with limited(working(50), working(0.1)) as rig:
        eject(rig.server("b"), trio.current_time())
        rig.fleet.settle(trio.current_time())
        await started(rig, body(0))
        second, third = await started(rig, body(1)), await started(rig, body(2))
        assert waiting(rig) == 2
        await trio.sleep(7)
        rig.fleet.settle(trio.current_time())  # as the probes do
        await trio.sleep(1)
        assert order(second, third) == [1, 2]
        await trio.sleep(50)


# -- configuration, drain ---------------------------------------------------------------------


def reload(rig: Rig, **options: Any) -> None:
    config = make_config(**{"policy": "least_load", **options})
    rig.fleet.apply(config)
    rig.proxy.apply(config)


def raise_cap(rig: Rig, cap: int) -> None:
    reload(rig, servers=len(rig.servers), limits={"max_in_flight": cap})


async def test_queue_raised_cap_admits_waiters_at_once(autojump_clock):
    most = [0]
    async with limited(working(5.0, most)) as rig:
        clients = [await started(rig, body(n)) for n in range(6)]
        raise_cap(rig, 4)
        await wait_all_tasks_blocked()
        assert (most, waiting(rig)) == ([4], 2)
        raise_cap(rig, 1)
        await trio.sleep(30)
        assert len(order(*clients)) == 6
        assert most == [4]


async def test_queue_removed_limits_admit_all_waiters(autojump_clock):
    most = [0]
    async with limited(working(5.0, most), working(5.0)) as rig:
        clients = [await started(rig, body(n)) for n in range(8)]
        reload(rig, servers=2)
        assert rig.context.admission is None
        await trio.sleep(6)
        assert len(order(*clients)) == 8
        assert rig.fleet.on_settled == []


async def test_queue_added_limits_count_running_requests(autojump_clock):
    async with lab(working(5.0)) as rig:
        clients = [await started(rig, body(n)) for n in range(3)]
        raise_cap(rig, 2)
        clients += [await started(rig, body(n)) for n in range(3, 6)]
        assert waiting(rig) == 3
        await trio.sleep(30)
        assert len(order(*clients)) == 6


async def test_queue_removed_model_ends_wait_with_not_found(autojump_clock):
    async with limited(working(9), working(1)) as rig:
        come_up(rig.server("b"), 0.0, "other")
        running = await started(rig, body(0))
        left = [await started(rig, body(n)) for n in (1, 2)]
        reload(rig, servers=[{"url": "http://b.test:1", "name": "b"}], limits={"max_in_flight": 1})
        await wait_all_tasks_blocked()
        assert [(one.got.status, one.got.code) for one in left] == [(404, "model_not_found")] * 2
        await trio.sleep(20)
        assert order(running) == [0]


async def test_queue_replaced_server_takes_its_waiters(autojump_clock):
    async with limited(working(9)) as rig:
        running, waits = await started(rig, body(0)), await started(rig, body(1))
        reload(rig, servers=[{"url": "http://b.test:1", "name": "b"}], limits={"max_in_flight": 1})
        await trio.sleep(1)
        assert not waits.done  # the new server may have the model
        scripted = rig.scripted["b"] = ScriptedServer(rig.nursery, working(1))
        rig.context.upstreams[rig.server("b")].pool = MemoryPool(scripted)
        come_up(rig.server("b"), trio.current_time(), "m")
        rig.fleet.settle(trio.current_time())
        await trio.sleep(1.5)
        assert order(waits) == [1]
        assert waits.got[b"x-vllm-router-server"] == b"b"
        await trio.sleep(20)
        assert order(running) == [0]


async def test_queue_model_dropped_by_server_ends_wait_with_not_found(autojump_clock):
    async with limited(working(5)) as rig:
        running, left = await started(rig, body(0)), await started(rig, body(1))
        come_up(rig.server("a"), trio.current_time(), "other")  # not refreshed yet
        await trio.sleep(5.5)
        assert running.got.status == 200
        assert (left.got.status, left.got.code) == (404, "model_not_found")
        assert 5 <= left.got.took < 5.5


async def test_queue_removed_server_sends_waiters_to_another(autojump_clock):
    async with limited(working(9), working(1)) as rig:
        rig.server("b").drain(on=True)
        running, waits = await started(rig, body(0)), await started(rig, body(1))
        assert waiting(rig) == 1
        rig.server("b").drain(on=False)
        servers = [{"url": "http://b.test:1", "name": "b"}]
        reload(rig, servers=servers, limits={"max_in_flight": 1})
        await trio.sleep(2)
        assert order(waits) == [1]
        await trio.sleep(20)
        assert order(running) == [0]


async def test_queue_drain_serves_waiters(autojump_clock):
    async with limited(working(1.0)) as rig:
        clients = [await started(rig, body(n)) for n in range(4)]
        await rig.proxy.drained()
        await wait_all_tasks_blocked()
        assert order(*clients) == [0, 1, 2, 3]


async def test_queue_stop_ends_wait_with_503(autojump_clock):
    async with limited(silent) as rig:
        clients = [await started(rig, body(n)) for n in range(4)]
        rig.context.stopping = True
        rig.proxy.stop()
        await wait_all_tasks_blocked()
        assert {(one.got.status, one.got.code) for one in clients} == {(503, "router_stopping")}


# -- fallbacks --------------------------------------------------------------------------------


async def test_queue_waiter_moves_to_fallback_when_model_is_lost(autojump_clock):
    tables = '[models.m]\nfallback = "spare"\n'
    async with limited(silent, working(1), more={"tables": tables}) as rig:
        come_up(rig.server("b"), 0.0, "spare")
        first, second = await started(rig, body(0)), await started(rig, body(1))
        assert waiting(rig) == 1
        await trio.sleep(1)
        rig.down("a")
        await trio.sleep(5)
        assert second.got.status == 200
        assert second.got.json["model"] == "spare"
        assert first.got.status == 200


async def test_queue_waiter_returns_to_its_model_when_it_is_back(autojump_clock):
    tables = '[models.m]\nfallback = "spare"\n'
    async with limited(working(1), working(25), more={"tables": tables}) as rig:
        come_up(rig.server("b"), 0.0, "spare")
        busy = await started(rig, {"model": "spare", "n": 9})
        first, *rest = [await started(rig, body(n)) for n in range(4)]
        rig.down("a")
        await trio.sleep(0.5)
        come_up(rig.server("a"), trio.current_time(), "m")
        rig.fleet.settle(trio.current_time())
        await trio.sleep(4)
        assert order(*rest) == [1, 2, 3]
        assert {one.got[b"x-vllm-router-server"] for one in rest} == {b"a"}
        await trio.sleep(60)
        assert (busy.got.status, first.got.status) == (200, 200)


async def test_queue_waiter_for_removed_model_waits_for_fallback(autojump_clock):
    tables = '[models.m]\nfallback = "spare"\n'
    async with limited(working(9), working(9), more={"tables": tables}) as rig:
        come_up(rig.server("b"), 0.0, "spare")
        clients = [await started(rig, body(0)), await started(rig, {"model": "spare", "n": 1})]
        clients += [await started(rig, body(n)) for n in (2, 3)]
        come_up(rig.server("a"), trio.current_time(), "other")
        rig.fleet.settle(trio.current_time())
        await trio.sleep(60)
        assert [client.got.status for client in clients] == [200] * 4


async def test_queue_waiter_for_name_found_unknown_gets_not_found(autojump_clock):
    async with limited(working(9)) as rig:
        rig.server("a").catalog.names = None
        running = await started(rig, body(0))
        left = await started(rig, {"model": "invented"})
        come_up(rig.server("a"), trio.current_time(), "m")
        rig.fleet.settle(trio.current_time())
        await wait_all_tasks_blocked()
        assert (left.got.status, left.got.code) == (404, "model_not_found")
        await trio.sleep(10)
        assert running.got.status == 200


async def test_queue_waiters_do_not_follow_a_request_that_crashes_servers(autojump_clock):
    async def mortal(talk: Talk) -> None:
        await talk.request()
        await trio.sleep(1)

    async with limited(*[mortal] * 4, more={"failure_threshold": 1000}) as rig:
        clients = [await started(rig, body(0)) for _ in range(12)]
        await trio.sleep(20)
        codes = [client.got.code for client in clients]
        assert set(codes) == {"server_disconnected", "poison_request"}
        # The requests on the four servers, and some of them once more: 17 if all went on.
        assert rig.requests().total() < len(clients)


async def test_queue_expired_waiter_does_not_count_toward_drain_rate(autojump_clock):
    async with limited(working(4.0)) as rig:
        for n in range(5):
            await rig.post(body(n))
        running = [await started(rig, body(n)) for n in range(3)]
        for n in range(20):
            await started(rig, body(n), headers=((b"x-request-timeout", b"7"), PRIORITY))
        await trio.sleep(5)
        assert rig.context.admission is not None
        (queue,) = rig.context.admission.queues(trio.current_time())
        assert queue.freed_per_s is None or queue.freed_per_s < 0.5
        await trio.sleep(20)
        assert len(order(*running)) == 3


# -- cost -------------------------------------------------------------------------------------


async def test_queue_full_stays_within_limit_under_a_burst(autojump_clock):
    async with limited(silent, cap=2, queue_size=5) as rig:
        clients = [await started(rig, body(n)) for n in range(7)]
        held, exchanges = rig.context.bodies.held, len(rig.context.exchanges)
        got = [await rig.post(body(n)) for n in range(500)]
        assert {one.status for one in got} == {429}
        assert (
            (rig.context.bodies.held, len(rig.context.exchanges)) == (held, exchanges) == (held, 7)
        )
        assert waiting(rig) == 5
        for client in clients:
            client.leave()


async def test_queue_streams_hold_their_slot_until_the_end(autojump_clock):
    async with limited(streaming(event("hi"), DONE), cap=1) as rig:
        first = rig.client({"model": "m", "stream": True})
        first.stall()
        rig.nursery.start_soon(first.run)
        await wait_all_tasks_blocked()
        second = rig.start_stream()
        await wait_all_tasks_blocked()
        assert waiting(rig) == 1
        first.resume()
        await wait_all_tasks_blocked()
        assert second.got.whole
        assert math.isclose(rig.recorder.last.waited, 0.0, abs_tol=1)
