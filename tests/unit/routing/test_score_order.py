"""Large fleets: the order of base scores, and picks that score a few candidates."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fleet_makers import gauges, make_fleet
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Lease, Server
from vllm_router.routing.policies.adaptive import REFRESH, REFRESHED_AT_ONCE, Adaptive
from vllm_router.routing.prompt.routing_info import EXPLAIN, RoutingInfo, read_at_once
from vllm_router.routing.score_cache import LARGE, ScoreCache
from vllm_router.routing.score_order import ScoreOrder

NOW = 1000.0
SYSTEM = "You are a helpful assistant. " * 100


def large_fleet(count: int, **settings: object) -> Fleet:
    servers = [
        {"url": f"http://s{n}.test:1", "name": f"s{n}", "max_concurrent_requests": 8}
        for n in range(count)
    ]
    return make_fleet(servers, **settings)


class Rig:
    """The policy among many servers, all scraped once."""

    def __init__(self, count: int) -> None:
        self.fleet = large_fleet(count)
        self.servers = list(self.fleet.servers.values())
        for server in self.servers:
            server.scraped(gauges(0.0, kv_usage=0.1, kv_tokens=100_000), NOW, 0)
        while self.fleet.candidates("m", NOW) is not self.fleet.candidates("m", NOW):
            pass  # a hundred servers are settled at a time
        self.policy = Adaptive(Random(1))

    def info(self, text: str) -> RoutingInfo:
        body = (
            f'{{"model":"m","messages":[{{"role":"system","content":"{SYSTEM}"}},'
            f'{{"role":"user","content":"{text}"}}]}}'
        )
        seeds = self.fleet.seeds.of
        found = read_at_once(
            EXPLAIN,
            b"application/json",
            body.encode(),
            None,
            with_prompt=True,
            shortest=0,
            seeds=seeds,
        )
        assert found is not None
        return found

    def send(self, info: RoutingInfo, now: float = NOW) -> Lease:
        server, note = self.policy.pick(self.fleet.candidates("m", now), info, now)
        lease = server.lease(now)
        self.policy.leased(lease, note, info, now)
        return lease

    def end(self, lease: Lease, now: float, *, failed: bool = False) -> None:
        lease.last_byte_at = now
        if not failed:
            self.policy.first_byte(lease)
        self.policy.ended(lease, now, failed=failed)
        lease.release()

    def cache(self) -> ScoreCache:
        return self.policy._caches["m"]

    def scores(self, info: RoutingInfo, now: float) -> dict[Server, float]:
        """The scores of all candidates, computed as for a small fleet."""
        rows = self.policy.explain(self.fleet.candidates("m", now), info, now)
        return {row.server: row.score for row in rows}


CHANGES = st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0.0, 0.5, 1.0, 2.5])))


@given(CHANGES)
def test_score_order_changes_keep_all_positions_sorted(changes):
    scores = [1.0] * 7
    order = ScoreOrder(scores)
    for position, score in changes:
        scores[position] = score
        order.change(position, score)
    found = order.lowest(7)
    assert sorted(found) == list(range(7))
    assert [scores[position] for position in found] == sorted(scores)


def test_score_order_equals_are_in_random_order():
    first = Counter(ScoreOrder([1.0] * 50 + [2.0] * n).lowest(1)[0] for n in range(200))
    assert len(first) > 30
    assert max(first) < 50


def test_adaptive_among_many_picks_have_the_lowest_score():
    """Without prompts the base scores, which are all known, decide."""
    rig = Rig(2 * LARGE)
    info = RoutingInfo("m")
    for number, server in enumerate(rig.servers):
        for _ in range(1 + number % 5):
            server.lease(NOW)
    idle = rig.servers[77]
    while idle.leases:
        next(iter(idle.leases)).release()
    picked = rig.send(info).server
    assert picked is idle
    assert rig.cache().is_large


def test_adaptive_among_many_follows_a_conversation():
    rig = Rig(2 * LARGE)
    lease = rig.send(rig.info("x" * 4000))
    rig.end(lease, NOW)
    for number in range(40):
        rig.send(RoutingInfo("m"), NOW + number / 1000)  # the others are as idle
    again = rig.send(rig.info("x" * 8000), NOW + 0.05)
    assert again.server is lease.server


def test_adaptive_among_many_shared_prefix_spreads():
    """A prefix of all requests must not gather them on the servers that have it."""
    rig = Rig(2 * LARGE)
    for number in range(4 * LARGE):
        rig.send(rig.info(f"{number} " + "y" * 40), NOW + number / 1000)
    loads = Counter(server.in_flight for server in rig.servers)
    assert max(loads) <= 6
    assert loads[0] < LARGE


@pytest.mark.parametrize("seed", range(3))
def test_adaptive_among_many_choice_is_close_to_the_best_of_all(seed):
    """In random traffic, by the rule for small fleets, the chosen server is among the best."""
    rig = Rig(LARGE + 40)
    rng = Random(seed)
    running: list[Lease] = []
    for step in range(300):
        now = NOW + step / 50
        info = rig.info(f"{rng.randrange(60)} " + "z" * rng.randrange(6000))
        if step % 10 == 9:
            scores = rig.scores(info, now)
            lease = rig.send(info, now)
            best = min(scores.values())
            assert scores[lease.server] <= best + 0.5
        else:
            lease = rig.send(info, now)
        running.append(lease)
        if len(running) > 120:
            rig.end(running.pop(rng.randrange(len(running))), now)


def test_adaptive_among_many_updates_a_part_of_the_servers_at_a_time():
    rig = Rig(3 * REFRESHED_AT_ONCE)
    rig.send(RoutingInfo("m"))
    for server in rig.servers:
        server.scraped(gauges(1.0, kv_usage=0.2), NOW + 0.01, 0)
    updated = [0]
    for turn in range(1, 5):
        rig.send(RoutingInfo("m"), NOW + turn * (REFRESH + 0.001))
        followed = [rig.policy._estimate(server).scraped_at for server in rig.servers]
        updated.append(sum(at == NOW + 0.01 for at in followed))
    assert updated == [0, 100, 200, 300, 300]


def test_adaptive_among_many_avoids_a_failing_server_at_once():
    rig = Rig(2 * REFRESHED_AT_ONCE)
    lease = rig.send(rig.info("x" * 4000))
    rig.end(lease, NOW, failed=True)
    again = rig.send(rig.info("x" * 4000), NOW + 0.001)
    assert again.server is not lease.server
    assert not rig.cache().credited & rig.policy._estimate(lease.server).bit


def test_adaptive_among_many_affinity_server_is_stable():
    """All routers find the same server for a key, and a change of the fleet moves few keys."""
    keys = [Random(number).getrandbits(64) for number in range(300)]

    def homes(fleet: Fleet, *, reverse: bool = False) -> list[str]:
        policy = Adaptive(Random(1))
        servers = list(fleet.servers.values())
        candidates = tuple(servers[::-1] if reverse else servers)
        cache = policy._cache(candidates, "m", NOW)
        return [cache.affinity_of(key).server.name for key in keys]

    whole = homes(large_fleet(200))
    assert homes(large_fleet(200), reverse=True) == whole
    smaller = homes(large_fleet(199))
    moved = sum(one != other for one, other in zip(whole, smaller, strict=True))
    assert moved <= 30
    assert len(set(whole)) > 60
