"""Edge cases of the admission queue: full, with blocked requests, and after slow times."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from support.fleet_makers import come_up
from support.proxy_harness import Client, Rig
from support.scripted_server import Talk, ok, silent
from unit.proxy.test_exchange_queue import (
    PRIORITY,
    body,
    limited,
    order,
    raise_cap,
    started,
    waiting,
    working,
)
from vllm_router.config.auth import KeyConfig
from vllm_router.config.types import digest_of
from vllm_router.http.asgi_types import IDENTITY
from vllm_router.proxy.identity import Identity

FALLBACK = '[models.m]\nfallback = "spare"\n[models.plain]\nserves = "m"\n'
"""Requests for `m` may go to `spare`; requests for `plain` get the same model and may not."""


async def dying_once(talk: Talk) -> None:
    """A server that fails its first request after a second, and answers the others in one."""
    while True:
        request = await talk.request()
        await trio.sleep(1)
        if talk.number == 0:
            return
        await talk.send(ok(request.body))


class Paced:
    """A server that takes `seconds` for each request."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def __call__(self, talk: Talk) -> None:
        while True:
            request = await talk.request()
            await trio.sleep(self.seconds)
            await talk.send(ok(request.body))


async def started_by(rig: Rig, key: str, number: int, **more: Any) -> Client:
    """A request with an API key that has advanced as far as it can for now."""
    client = client_of(rig, key, number, **more)
    rig.nursery.start_soon(client.run)
    await wait_all_tasks_blocked()
    return client


def client_of(rig: Rig, key: str, number: int, **more: Any) -> Client:
    client = rig.client(body(number, **more))
    client._scope[IDENTITY] = Identity(KeyConfig(name=key, digest=digest_of(key)), given=True)
    return client


# -- a full queue -----------------------------------------------------------------------------


async def test_full_queue_new_key_displaces_last_of_greediest_key(autojump_clock):
    async with limited(working(), queue_size=4) as rig:
        greedy = [await started_by(rig, "greedy", n) for n in range(5)]
        modest = await started_by(rig, "modest", 9)
        assert waiting(rig) == 4
        refused = greedy[-1].got
        assert (refused.status, refused.code) == (429, "queue_displaced")
        assert 1 <= int(refused[b"retry-after"] or 0) <= 30
        await trio.sleep(10)
        assert order(*greedy, modest) == [0, 1, 9, 2, 3]


async def test_full_queue_gives_keys_equal_shares_then_refuses(autojump_clock):
    async with limited(working(), queue_size=6) as rig:
        a = [await started_by(rig, "a", n) for n in range(7)]
        b = [await started_by(rig, "b", 10 + n) for n in range(6)]
        codes = [client.got.code for client in a if client.done]
        assert codes == ["queue_displaced"] * 3
        assert [client.got.code for client in b if client.done] == ["queue_full"] * 3
        # Requests of the one cannot displace requests of the other any more.
        for number in range(20, 26):
            assert (await started_by(rig, "a", number)).got.code == "queue_full"
        await trio.sleep(20)
        assert order(*a, *b) == [0, 1, 10, 2, 11, 3, 12]


async def test_full_queue_of_one_key_admits_other_keys(autojump_clock):
    async with limited(working(0.1), queue_size=8) as rig:
        answered = {"greedy": 0, "modest": 0}

        async def keep_asking(key: str) -> None:
            while rig.requests().total() < 100:
                got = await client_of(rig, key, 0).run()
                answered[key] += got.status == 200
                await trio.sleep(0.5)

        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(keep_asking, "greedy")
            for _ in range(4):
                nursery.start_soon(keep_asking, "modest")
        assert answered["modest"] >= 0.45 * sum(answered.values()), answered


async def test_full_queue_better_priority_displaces_worst(autojump_clock):
    async with limited(working(), queue_size=3) as rig:
        clients = [await started(rig, body(n)) for n in range(3)]
        worst = await started(rig, body(3, priority=5))
        better = await started(rig, body(4), headers=(PRIORITY,))
        assert (worst.got.status, worst.got.code) == (429, "queue_displaced")
        alike = await started(rig, body(5))
        assert (alike.got.status, alike.got.code) == (429, "queue_full")
        worse = await started(rig, body(6, priority=7))
        assert (worse.got.status, worse.got.code) == (429, "queue_full")
        await trio.sleep(10)
        assert order(*clients, better) == [0, 4, 1, 2]


async def test_full_queue_displaced_without_server_gets_no_server_error(autojump_clock):
    async with limited(working(), queue_size=2) as rig:
        rig.down("a")
        greedy = [await started_by(rig, "greedy", n) for n in range(2)]
        modest = await started_by(rig, "modest", 9)
        assert (greedy[1].got.status, greedy[1].got.code) == (503, "no_server_available")
        assert greedy[1].got[b"retry-after"] is not None
        come_up(rig.server("a"), trio.current_time())
        rig.fleet.settle(trio.current_time())
        await trio.sleep(5)
        assert order(greedy[0], modest) == [0, 9]


async def test_full_queue_retries_take_no_place(autojump_clock):
    async with limited(dying_once, working(5.0), queue_size=1) as rig:
        rig.prefer("a")
        clients = [await started(rig, body(n)) for n in range(2)]
        rig.server("a").drain(on=True)
        await trio.sleep(1.5)  # the first has returned, and waits for the other server
        assert waiting(rig) == 1
        late = await started(rig, body(2))
        assert not late.done
        await trio.sleep(30)
        assert order(*clients, late) == [1, 0, 2]


# -- blocked requests -------------------------------------------------------------------------


@pytest.mark.parametrize("stuck_at", [0, 1, 2])
async def test_queue_request_without_fallback_delays_none_with_fallback(autojump_clock, stuck_at):
    async with limited(silent, working(1), more={"tables": FALLBACK}) as rig:
        come_up(rig.server("b"), 0.0, "spare")
        first = await started(rig, body(9))
        names = ["m", "m"]
        names.insert(stuck_at, "plain")
        clients = [await started(rig, body(n, model=name)) for n, name in enumerate(names)]
        await trio.sleep(1)
        rig.down("a")
        await trio.sleep(5)
        stuck = clients.pop(stuck_at)
        assert [client.got.status for client in clients] == [200, 200]
        assert not stuck.done
        assert first.got.status == 200
        await trio.sleep(30)
        assert stuck.got.code == "no_server_available"


async def test_queue_unknown_names_do_not_delay_each_other(autojump_clock):
    async with limited(working(100), working(1)) as rig:
        rig.server("a").catalog.names = rig.server("b").catalog.names = None
        rig.server("b").drain(on=True)
        running = await started(rig, {"model": "x", "n": 0})
        waits = await started(rig, {"model": "x", "n": 1})
        other = await started(rig, {"model": "y", "n": 2})
        come_up(rig.server("b"), trio.current_time(), "y")
        come_up(rig.server("a"), trio.current_time(), "x")
        rig.server("b").drain(on=False)
        rig.fleet.settle(trio.current_time())
        await trio.sleep(2)
        assert other.got.status == 200
        assert not waits.done
        running.leave()
        waits.leave()


async def test_queue_retry_with_better_priority_delays_no_other(autojump_clock):
    async with limited(dying_once, working(20), more={"failure_threshold": 1000}) as rig:
        rig.prefer("a")
        back = await started(rig, body(0), headers=(PRIORITY,))
        busy = await started(rig, body(1))
        await trio.sleep(1.5)
        assert waiting(rig) == 1  # it was on a, and b is busy
        new = await started(rig, body(2))
        await trio.sleep(1.5)
        assert new.got.status == 200
        await trio.sleep(60)
        assert (back.got.status, busy.got.status) == (200, 200)


async def test_queue_request_too_long_for_free_server_delays_no_shorter_one(autojump_clock):
    async with limited(working(1), working(50)) as rig:
        for name, length in (("a", 10), ("b", 100_000)):
            rig.server(name).listed({"m": {"id": "m", "max_model_len": length}}, 0.0)
        rig.fleet.settle(trio.current_time())
        running = await started(rig, body(0, max_tokens=2000))
        waits = await started(rig, body(1, max_tokens=2000))
        assert running.got.status == waits.got.status == 0
        assert rig.requests() == {"a": 0, "b": 1}
        short = [await started(rig, body(n, max_tokens=1)) for n in (2, 3, 4)]
        await trio.sleep(4)
        assert order(*short) == [2, 3, 4]
        assert rig.requests() == {"a": 3, "b": 1}
        running.leave()
        await trio.sleep(60)
        assert order(waits) == [1]


# -- after slow times -------------------------------------------------------------------------


async def slow_hour(rig: Rig) -> None:
    """Slow responses, with requests waiting all the time."""
    clients = [await started(rig, body(n)) for n in range(7)]
    while not all(client.done for client in clients):
        await trio.sleep(1)
    assert order(*clients) == list(range(7))


@pytest.mark.parametrize("idle", [0, 15, 3600, 86400])
async def test_queue_idle_fleet_accepts_burst_after_slow_time(autojump_clock, idle):
    server = Paced(5.0)
    async with limited(server, queue_size=64, queue_timeout=31) as rig:
        await slow_hour(rig)
        await trio.sleep(idle)
        server.seconds = 0.1
        burst = [await started(rig, body(n)) for n in range(60)]
        await trio.sleep(20)
        assert [client.got.status for client in burst] == [200] * 60


async def test_queue_deadline_ignores_response_times_of_hours_ago(autojump_clock):
    server = Paced(20.0)
    async with limited(server, queue_timeout=200) as rig:
        await slow_hour(rig)
        await trio.sleep(3600)
        server.seconds = 1.0
        deadline = ((b"x-request-timeout", b"5"),)
        burst = [await started(rig, body(n), headers=deadline) for n in range(4)]
        await trio.sleep(10)
        assert [client.got.status for client in burst] == [200] * 4


async def test_queue_returning_server_is_not_predicted_slow(autojump_clock):
    async with limited(Paced(5), Paced(0.1), queue_size=64, queue_timeout=31) as rig:
        rig.down("b")
        clients = [await started(rig, body(n)) for n in range(7)]
        await trio.sleep(21)
        come_up(rig.server("b"), trio.current_time())
        rig.fleet.settle(trio.current_time())
        clients += [await started(rig, body(n)) for n in range(40)]
        await trio.sleep(30)
        assert [client.got.status for client in clients] == [200] * 47


async def test_queue_raised_cap_resets_drain_measurement(autojump_clock):
    async with limited(Paced(5), queue_size=64, queue_timeout=31) as rig:
        clients = [await started(rig, body(n)) for n in range(7)]
        await trio.sleep(21)
        raise_cap(rig, 20)
        clients += [await started(rig, body(n)) for n in range(40)]
        await trio.sleep(30)
        assert [client.got.status for client in clients] == [200] * 47
