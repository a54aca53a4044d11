"""Large fleets: the order of base scores, and picks that score a few candidates."""

from __future__ import annotations

import math
from collections import Counter
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fleet_makers import gauges, make_fleet
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import ChangeLog, Lease, Server
from vllm_router.routing.adapters import WAIT_PENALTY
from vllm_router.routing.large_score_cache import (
    HOLDERS,
    LARGE,
    SEARCHED,
    SHORTLIST,
    LargeScoreCache,
)
from vllm_router.routing.policies import PolicySettings
from vllm_router.routing.policies.adaptive import REFRESH, REFRESHED_AT_ONCE, Adaptive
from vllm_router.routing.prompt.routing_info import EXPLAIN, RoutingInfo, read_at_once
from vllm_router.routing.score_cache import (
    AFFINITY_BONUS,
    DELAYED,
    HOT_MARGIN,
    HOT_SHARE,
    ScoreCache,
)
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


def test_score_order_infinite_scores_change_as_others_do():
    """Servers at their cap have equal keys; each is found all the same."""
    order = ScoreOrder([1.0] * 9)
    for position in (3, 5, 7):
        order.change(position, math.inf)
    order.change(5, 0.0)
    order.change(3, math.inf)
    assert order.lowest(1) == [5]
    assert sorted(order.lowest(9)[-2:]) == [3, 7]


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


def test_adaptive_among_many_blocks_of_an_overloaded_server_are_explained_as_picked():
    rig = Rig(LARGE)
    info = rig.info("x" * 4000)
    lease = rig.send(info)
    home = lease.server
    rig.end(lease, NOW)
    for server in rig.servers:
        figures = gauges(9.0, 2.0) if server is home else gauges(4.0)
        server.scraped(figures, NOW + 1.0, 0)
    picked = rig.send(info, NOW + 2.0).server
    rows = rig.policy.explain(rig.fleet.candidates("m", NOW + 2.0), info, NOW + 2.0)
    cached = {row.server: row.parts["cached_tokens"] for row in rows}
    assert picked is not home
    assert cached[home] == 0


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


def test_adaptive_among_many_first_picks_measure_a_part_of_the_servers_each():
    rig = Rig(3 * REFRESHED_AT_ONCE)
    for turn in range(1, 4):
        picked = rig.send(RoutingInfo("m")).server
        assert rig.servers.index(picked) < turn * REFRESHED_AT_ONCE
        assert rig.cache().is_complete is (turn == 3)
        assert sum(base < math.inf for base in rig.cache().bases) == turn * REFRESHED_AT_ONCE
    assert all(rig.policy._estimate(server).scraped_at == NOW for server in rig.servers)


def test_adaptive_among_many_first_pick_goes_on_until_a_server_has_room():
    rig = Rig(3 * REFRESHED_AT_ONCE)
    for server in rig.servers[: 2 * REFRESHED_AT_ONCE]:
        server.cap = 0
    picked = rig.send(RoutingInfo("m")).server
    assert rig.servers.index(picked) >= 2 * REFRESHED_AT_ONCE


def test_adaptive_among_many_peers_are_detected_once_all_servers_are_measured():
    rig = Rig(3 * REFRESHED_AT_ONCE)
    for server in rig.servers:
        server.scraped(gauges(2.0), NOW + 1.0, 0)
    for turn in range(5):
        rig.send(RoutingInfo("m"), NOW + 1.0)
        assert rig.cache().has_peers is (turn >= 3)


def test_adaptive_among_many_new_servers_are_measured_a_part_with_each_pick():
    rig = Rig(5 * REFRESHED_AT_ONCE)
    candidates = rig.fleet.candidates("m", NOW)
    old, info = candidates[: 3 * REFRESHED_AT_ONCE], RoutingInfo("m")
    for _ in range(4):
        rig.policy.pick(old, info, NOW)
    for new in range(1, 3):
        rig.policy.pick(candidates, info, NOW + 0.01)
        measured = [base < math.inf for base in rig.cache().bases]
        assert measured == [place < (3 + new) * REFRESHED_AT_ONCE for place in range(len(measured))]
    assert rig.cache().is_complete


@pytest.mark.parametrize("odd", [1, LARGE - 1, LARGE + 20])
def test_adaptive_among_many_alternating_candidates_are_all_used(odd: int):
    """Requests that only some servers may answer come between: all went to the first hundred."""
    rig = Rig(4 * REFRESHED_AT_ONCE)
    candidates = rig.fleet.candidates("m", NOW)
    few = candidates[:odd]
    picked: Counter[int] = Counter()
    for number in range(100):
        rig.policy.pick(few, RoutingInfo("m"), NOW + number / 1000)
        server, _ = rig.policy.pick(candidates, RoutingInfo("m"), NOW + number / 1000)
        picked[rig.servers.index(server) // REFRESHED_AT_ONCE] += 1
    assert min(picked[part] for part in range(4)) > 5


def test_adaptive_among_many_new_servers_survive_a_further_change():
    rig = Rig(5 * REFRESHED_AT_ONCE)
    candidates, info = rig.fleet.candidates("m", NOW), RoutingInfo("m")
    for _ in range(4):
        rig.policy.pick(candidates[: 3 * REFRESHED_AT_ONCE], info, NOW)
    for _ in range(6):
        rig.policy.pick((*candidates,), info, NOW + 0.01)
    assert max(rig.cache().bases) < math.inf


def test_adaptive_among_many_first_explanation_scores_all_servers():
    rig = Rig(3 * REFRESHED_AT_ONCE)
    candidates = rig.fleet.candidates("m", NOW)
    assert sum(1 for _ in rig.policy.prepare(candidates, RoutingInfo("m"), NOW)) == 2
    assert sum(1 for _ in rig.policy.prepare(candidates, RoutingInfo("m"), NOW)) == 0
    for model in ("m", "n"):
        rows = rig.policy.explain(candidates, RoutingInfo(model), NOW)
        assert {row.score for row in rows} == {1 / 8}
        assert len(rows) == 3 * REFRESHED_AT_ONCE


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
        return [cache.affinity.of(key).server.name for key in keys]

    whole = homes(large_fleet(200))
    assert homes(large_fleet(200), reverse=True) == whole
    smaller = homes(large_fleet(199))
    moved = sum(one != other for one, other in zip(whole, smaller, strict=True))
    assert moved <= 30
    assert len(set(whole)) > 60


class Figures:
    """The attributes of a server or an estimate that a ScoreCache reads."""

    def __init__(self, **figures: Any) -> None:
        self.__dict__.update(figures)


def plain_some_of(cache: LargeScoreCache, bits: int, draw: float) -> list[int]:
    """`_some_of` in the plainest way: bit by bit."""
    assert cache._order is not None
    numbers = [n for n in range(bits.bit_length()) if bits >> n & 1]
    found: list[int] = []
    if len(numbers) > HOLDERS:
        front = cache._order.lowest(SEARCHED)
        found = [at for at in front if cache.estimates[at].bit & bits][:HOLDERS]
        if len(found) == HOLDERS:
            return found
        begin = int(draw * bits.bit_length())
        numbers = [n for n in numbers if n >= begin] or numbers
    by_number = {one.bit.bit_length() - 1: at for at, one in enumerate(cache.estimates)}
    return found + [by_number[n] for n in numbers[:HOLDERS]]


def plain_lowest(
    cache: LargeScoreCache,
    levels: list[tuple[float, int]],
    bonus: int,
    prompt: tuple[float, float, float, float],
    draw: float,
    waits: int,
) -> list[int]:
    """`lowest_of_few` in the plainest way: term by term for each candidate."""
    order = cache._order
    assert order is not None
    tokens, uncached, turns, delay = prompt
    hot = HOT_SHARE * (sum(cache._loads) / len(cache._loads)) + HOT_MARGIN
    cached: dict[int, float] = {}
    for credit, bits in levels:
        for position in plain_some_of(cache, bits, draw):
            if position not in cached and not cache._is_overloaded(position, hot):
                cached[position] = credit
    best = max(cached.values(), default=0.0)
    free = plain_some_of(cache, cache.everyone & ~waits, draw) if waits else []
    chosen = dict.fromkeys([*order.lowest(SHORTLIST), *free, *cached])
    home = cache._position_of_bit[bonus] if bonus else -1
    if bonus:
        chosen[home] = None
    scores = {}
    for position in chosen:
        have, factor = cached.get(position, 0.0), cache.factors[position]
        score = cache.bases[position] + (best - have) * cache._growths[position]
        score += uncached * cache._prompt_growths[position]
        score += turns * uncached * cache._overflows[position]
        score += (DELAYED * uncached * delay if turns else 0.0) * cache._arrivals[position]
        score -= factor * AFFINITY_BONUS if position == home else 0.0
        if tokens > cache._rooms[position]:
            score += factor * cache._excess_beyond(position, tokens - have)
        score += factor * WAIT_PENALTY if waits >> position & 1 else 0.0
        scores[position] = score
    lowest = min(scores.values())
    return [position for position, score in scores.items() if score == lowest]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), waste=st.booleans(), sparse=st.booleans(), data=st.data())
def test_adaptive_among_many_few_are_scored_as_all_are(seed, waste, sparse, data):
    rng = Random(seed)
    candidates = [
        Figures(
            weighted_capacity=8.0,
            load_estimate=Figures(waiting=rng.choice([0.0, 0.0, 2.0])),
            change_log=ChangeLog(),
        )
        for _ in range(LARGE)
    ]
    estimates = [
        Figures(bit=1 << n, seed=rng.getrandbits(64), server=server, adapters=None)
        for n, server in enumerate(candidates)
    ]
    cache = LargeScoreCache(cast("Any", candidates), cast("Any", estimates), PolicySettings())
    cache._prompt_growth = 0.5 * waste
    few = [0.0, 0.25, 1.0, 3.0]
    for figures in (cache.bases, cache._growths, cache._overflows, cache._arrivals, cache._loads):
        figures[:] = [rng.choice(few) for _ in figures]
    cache._overflow_seen = True
    cache._prompt_growths[:] = [rng.random() * waste for _ in candidates]
    cache._rooms[:] = [rng.choice([100.0, 1e6]) for _ in candidates]
    cache.kv_tokens[:] = [1000.0] * LARGE
    cache.least_room, cache._load_total = min(cache._rooms), sum(cache._loads)
    assert cache._order is not None
    cache._order.rebuild(cache.bases)
    holders = [rng.getrandbits(LARGE) >> rng.randrange(LARGE) | 1 for _ in range(3)]
    if sparse:  # the first HOLDERS of some are far apart
        holders = [bits & rng.getrandbits(LARGE) & rng.getrandbits(LARGE) | 1 for bits in holders]
    levels = [(100.0 * (3 - n), bits) for n, bits in enumerate(holders)][: rng.randrange(4)]
    bonus = rng.choice([0, 1 << rng.randrange(LARGE)])
    turns = data.draw(st.sampled_from([0.0, 2.0]))
    prompt = (rng.choice([50.0, 500.0]), rng.choice([0.0, 400.0]), turns, 0.1)
    draw = rng.random()
    waits = rng.choice([0, rng.getrandbits(LARGE), cache.everyone, cache.everyone ^ 1 << 77])
    found = cache.lowest_of_few(levels, bonus, prompt, draw, waits)
    plain = plain_lowest(cache, levels, bonus, prompt, draw, waits)
    if levels or bonus or waits or prompt[1] or prompt[0] > cache.least_room:
        assert sorted(found) == sorted(plain)
    else:  # one of them by chance
        assert found
        assert set(found) <= set(plain)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions whose scores were computed, one after the other."""
    found: list[int] = []
    measure = ScoreCache._measure

    def counted(cache: ScoreCache, position: int) -> None:
        found.append(position)
        measure(cache, position)

    monkeypatch.setattr(ScoreCache, "_measure", counted)
    return found


def test_adaptive_among_many_change_of_candidates_measures_the_new_ones(measured):
    rig = Rig(3 * LARGE)
    running = [rig.send(rig.info(f"{n} " + "z" * 999), NOW + n / 1000) for n in range(200)]
    rig.servers[5].drain(on=True)
    rig.servers[50].drain(on=True)
    now = NOW + 0.201
    rig.send(rig.info("again"), now)
    rig.servers[5].drain(on=False)
    rig.policy._estimate(rig.servers[7]).extra += 1.0
    rig.policy._cache(rig.fleet.candidates("m", now), "m", now)
    measured.clear()
    rig.end(running.pop(), now)
    rig.send(rig.info("again"), now)
    assert len(set(measured)) < 10
    cache = rig.cache()
    assert rig.servers[5] in cache.candidates
    assert rig.servers[50] not in cache.candidates
    assert cache.everyone == sum(rig.policy._estimate(one).bit for one in cache.candidates)
    cache._measure_at([cache._positions[rig.servers[7]]])  # it has changed without a mark
    cache.follow()
    adopted = cache.bases[:], cache._growths[:], cache._loads[:]
    cache.measure_all()
    assert (cache.bases, cache._growths, cache._loads) == adopted
    assert cache._order is not None
    lowest = cache._order.lowest(20)
    assert [cache.bases[at] for at in lowest] == sorted(cache.bases)[:20]


def test_adaptive_among_many_forgotten_server_leaves_the_figures_of_the_others(measured):
    rig = Rig(2 * LARGE)
    for number in range(50):
        rig.send(rig.info(f"{number}"), NOW + number / 1000)
    gone = rig.servers[3]
    bit = rig.policy._estimate(gone).bit
    gone.drain(on=True)
    rig.policy.forget(gone)
    joined = large_fleet(2 * LARGE + 1).servers[f"s{2 * LARGE}"]
    candidates = (*rig.fleet.candidates("m", NOW + 0.06), joined)
    measured.clear()
    cache = rig.policy._cache(candidates, "m", NOW + 0.06)
    assert rig.policy._estimate(joined).bit == bit  # the bit of the other is used again
    assert len(set(measured)) < 10
    assert cache.candidates is candidates
    assert len(cache.bases) == 2 * LARGE
    assert cache.bases[-1] > 0.0


def test_adaptive_among_many_passes_over_servers_at_their_cap(measured):
    rig = Rig(2 * LARGE)
    for server in rig.servers:
        server.cap = 1
    info = rig.info("x" * 4000)
    rig.send(info)
    cache = rig.cache()
    measured.clear()
    found = {rig.send(info, NOW + 0.001).server for _ in range(2 * LARGE - 1)}
    assert len(found) == 2 * LARGE - 1
    assert rig.cache() is cache
    assert len(measured) < 4 * LARGE
    assert all(server.in_flight == 1 for server in rig.servers)
