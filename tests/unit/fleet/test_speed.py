"""Learnt speeds: from times per token, for servers without a configured capacity."""

from __future__ import annotations

from random import Random

import pytest

from support.fleet_makers import gauges, go_down, make_config, make_fleet
from vllm_router.fleet.active_health import Check
from vllm_router.fleet.capacity import ASSUMED, EQUAL_SHARE, CapacityEstimate, CapacityPool
from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.server import Server
from vllm_router.fleet.speed import (
    FASTEST,
    HALF_LIFE,
    MARGIN,
    MOST_WEIGHT,
    PER_REQUEST,
    PRIOR,
    SLOWEST,
    SpeedEstimate,
    SpeedPool,
)
from vllm_router.routing.policies.least_load import LeastLoad
from vllm_router.routing.policies.power_of_two import PowerOfTwo
from vllm_router.routing.policies.prefix import Prefix
from vllm_router.routing.policies.session import Session
from vllm_router.routing.prompt.routing_info import RoutingInfo

MANY = 100 * MOST_WEIGHT
"""Tokens beside which the prior is little."""

NEARLY = 4 * PRIOR / MOST_WEIGHT
"""Relative difference that the prior leaves."""


class Counters:
    """An estimate, and the counters of its server."""

    def __init__(self, pool: SpeedPool | None = None) -> None:
        self.estimate = SpeedEstimate(pool)
        self.sum = self.count = 0.0
        self.seen = self.page(0.0)

    def page(self, running: float) -> EngineMetrics:
        return EngineMetrics(
            running=running, token_latency_sum=self.sum, token_latency_count=self.count
        )

    def generate(
        self, tokens: float, each: float, *, running: float = 0.0, elapsed: float = 0.0
    ) -> SpeedEstimate:
        """Generate tokens that take `each` so many seconds, and scrape."""
        self.sum, self.count = self.sum + tokens * each, self.count + tokens
        before, self.seen = self.seen, self.page(running)
        self.estimate.observe(before, self.seen, elapsed)
        return self.estimate


def fleet_of(*times: float) -> list[Counters]:
    """Servers that have generated many tokens, each of its time, and know of each other."""
    pool = SpeedPool()
    servers = [Counters(pool) for _ in times]
    for _ in range(2):
        for server, each in zip(servers, times, strict=True):
            server.generate(MANY, each)
    return servers


def ratios_of(*times: float) -> list[float]:
    return [server.estimate.ratio for server in fleet_of(*times)]


def test_speed_is_the_median_time_over_its_own():
    assert ratios_of(0.01, 0.02, 0.04) == pytest.approx([2.0, 1.0, 0.5], rel=NEARLY)


def test_speed_of_a_single_server_is_one():
    assert SpeedEstimate().ratio == 1.0
    assert ratios_of(0.01) == [1.0]


def test_speed_of_loaded_server_is_as_of_an_empty_one():
    """With 100 requests, a step of the model below takes two and a half times as long."""
    pool = SpeedPool()
    loaded, empty = Counters(pool), Counters(pool)
    for _ in range(20):
        empty.generate(MANY, 0.01)
        loaded.generate(MANY, 0.01 * (1 + 100 * PER_REQUEST), running=100)
    assert loaded.estimate.time == pytest.approx(empty.estimate.time, rel=0.05)
    assert loaded.estimate.ratio == 1.0


def test_speed_counts_from_the_margin_on_without_a_jump():
    def ratio(speed: float) -> float:
        return ratios_of(0.01, 0.01, 0.01 / speed)[2]

    assert ratio(1 + 0.9 * MARGIN) == ratio(1 - 0.9 * MARGIN) == 1.0
    assert ratio(1 + 1.5 * MARGIN) == pytest.approx(1 + MARGIN, rel=NEARLY)
    assert ratio(1 - 1.5 * MARGIN) == pytest.approx(1 - MARGIN, rel=NEARLY)
    assert ratio(1 + 2.1 * MARGIN) == pytest.approx(1 + 2.1 * MARGIN, rel=NEARLY)
    assert ratio(1 - 2.1 * MARGIN) == pytest.approx(1 - 2.1 * MARGIN, rel=NEARLY)


def test_speed_is_limited():
    servers = fleet_of(0.0001, 0.01, 1.0)
    assert [server.estimate.ratio for server in servers] == [FASTEST, 1.0, SLOWEST]
    assert servers[0].estimate.pool.fastest == FASTEST


def test_speed_of_few_tokens_is_drawn_to_the_median():
    pool = SpeedPool()
    for _ in range(2):
        Counters(pool).generate(MANY, 0.01)
    assert Counters(pool).generate(PRIOR, 0.03).ratio == pytest.approx(0.5)


def test_speed_half_life_is_counted_in_seconds():
    server = Counters()
    server.generate(1000, 0.03)
    assert server.generate(500, 0.01, elapsed=HALF_LIFE).time == pytest.approx(0.02)


def test_speed_of_an_idle_server_is_forgotten_after_two_minutes():
    *_, slow = fleet_of(0.01, 0.01, 0.04)
    assert slow.generate(0, 0, elapsed=1.0).ratio == pytest.approx(0.25, rel=NEARLY)
    assert slow.generate(0, 0, elapsed=100.0).ratio > 0.35
    assert slow.generate(0, 0, elapsed=60.0).ratio > 0.7
    assert slow.generate(MANY, 0.04).ratio == pytest.approx(0.25, rel=NEARLY)


@pytest.mark.parametrize(
    "page",
    [
        EngineMetrics(),
        EngineMetrics(token_latency_count=100.0),
        EngineMetrics(token_latency_sum=1.0),
    ],
)
def test_speed_without_times_is_one(page: EngineMetrics):
    estimate = SpeedEstimate(fleet_of(0.01, 0.01)[0].estimate.pool)
    full = EngineMetrics(token_latency_sum=9.0, token_latency_count=3.0)
    for before, after in ((page, full), (full, page), (page, page), (EngineMetrics(), full)):
        estimate.observe(before, after, 1.0)
    assert (estimate.ratio, estimate.time) == (1.0, 0.0)


def test_speed_of_a_fraction_of_a_token_is_not_learnt():
    pool = SpeedPool()
    odd = [Counters(pool) for _ in range(3)]
    for one in odd:
        one.sum, one.count = 1e14, 1e-300
        before, one.seen = one.seen, one.page(0.0)
        one.estimate.observe(before, one.seen, 1.0)
    assert [one.estimate.ratio for one in odd] == [1.0, 1.0, 1.0]
    assert pool.median == 0.0


def test_speed_pool_has_one_time_per_server():
    pool = SpeedPool()
    rng = Random(1)
    counters = [Counters(pool) for _ in range(5)]
    for _ in range(200):
        rng.choice(counters).generate(rng.randint(1, 500), rng.choice([0.01, 0.02, 0.03]))
    times = sorted(one.estimate.time for one in counters)
    assert (pool.median, pool.fastest) == (times[2], pytest.approx(_fastest(times), rel=1e-9))
    for one in counters[1:]:
        one.estimate.forget()
    assert (pool.median, pool.fastest) == (0.0, 1.0)


def _fastest(times: list[float]) -> float:
    ratio = times[2] / times[0]
    return ratio if ratio >= 1 + 2 * MARGIN else 1 + 2 * max(0.0, ratio - 1 - MARGIN)


# -- capacities -------------------------------------------------------------------------------


def capacities(*full_at: tuple[float, float]) -> list[float]:
    """The shares of servers from (requests when full, 0 for never; seconds per token)."""
    pool = CapacityPool()
    estimates = [
        CapacityEstimate(None, pool, server.estimate)
        for server in fleet_of(*(each for _, each in full_at))
    ]
    for estimate, (full, _) in zip(estimates, full_at, strict=True):
        if full:
            estimate.observe(full, 0.0, 1.0, 1.0)
    return [estimate.share for estimate in estimates]


def test_capacity_never_full_counts_times_speed():
    assert capacities((0, 0.01), (0, 0.02), (0, 0.04)) == pytest.approx([64, 32, 16], rel=NEARLY)


def test_capacity_of_equal_settings_counts_by_speed():
    """All run 256 at once by default, but the slow ones for four times as long."""
    shares = capacities((256, 0.01), (256, 0.02), (256, 0.04))
    assert shares == pytest.approx([64, 32, 16], rel=NEARLY)


def test_capacity_learnt_by_one_server_changes_no_other():
    """Servers are scraped in turn: a new scale would send all requests to the first."""
    before = capacities((0, 0.01), (0, 0.02), (0, 0.01))
    assert capacities((256, 0.01), (0, 0.02), (0, 0.01)) == before


def test_capacity_of_server_with_little_room_counts_as_room():
    """One is slow and has a small KV cache: its capacity says both, and must not count twice."""
    fast, _, slow = capacities((256, 0.01), (256, 0.01), (60, 0.04))
    assert slow / fast == pytest.approx(60 / 256, rel=NEARLY)
    large, _, small = capacities((256, 0.01), (256, 0.01), (8, 0.01))
    assert small / large == 8 / 256


def test_capacity_beside_configured_ones_is_their_median_by_speed():
    pool = CapacityPool()
    assert pool.take_configured([64, None, 128, 64, None])
    assert not pool.take_configured([None, 128, 64, 64])
    usual, slow, small = (
        CapacityEstimate(None, pool, server.estimate) for server in fleet_of(0.01, 0.04, 0.01)
    )
    small.observe(8, 0.0, 1.0, 1.0)
    assert [one.share for one in (usual, slow, small)] == pytest.approx([64, 16, 8], rel=NEARLY)
    assert pool.take_configured([])
    assert usual.share == EQUAL_SHARE


# -- in a fleet -------------------------------------------------------------------------------


def scraped(server: Server, each: float, *, running: float = 4.0, tokens: float = MANY) -> None:
    """Two scrapes, between which the tokens took so many seconds each."""
    server.scraped(gauges(running, token_latency_sum=0.0, token_latency_count=0.0), 1.0, 0)
    done = gauges(running, token_latency_sum=tokens * each, token_latency_count=tokens)
    server.scraped(done, 2.0, 0)
    server.scraped(done, 3.0, 0)


def learnt(*times: float, running: float = 4.0) -> list[Server]:
    """A fleet whose servers run so many requests each, with these times per token."""
    servers = list(make_fleet(len(times)).servers.values())
    for _ in range(2):  # the median is known to all with the second round
        for server, each in zip(servers, times, strict=True):
            scraped(server, each, running=running)
    return servers


def test_server_twice_as_fast_has_half_the_load_for_policies():
    servers = learnt(0.01, 0.02, 0.02)
    loads = [server.load_estimate.effective for server in servers]
    assert loads == pytest.approx([2 / EQUAL_SHARE, 4 / EQUAL_SHARE, 4 / EQUAL_SHARE], rel=NEARLY)
    assert {server.load for server in servers} == {4 / ASSUMED}  # what operators see


def test_server_with_configured_capacity_is_compared_by_it_alone():
    fleet = make_fleet(
        [
            {"url": f"http://{name}.test:1", "name": name, "max_concurrent_requests": 8}
            for name in "abc"
        ]
    )
    servers = list(fleet.servers.values())
    for _ in range(2):
        for server, each in zip(servers, (0.01, 0.02, 0.02), strict=True):
            scraped(server, each)
    assert {server.load_estimate.effective for server in servers} == {0.5}


@pytest.mark.parametrize("policy", [LeastLoad, PowerOfTwo, Prefix, Session])
def test_policies_give_more_requests_to_faster_servers(policy):
    servers = learnt(0.005, 0.01, 0.02, running=0.0)
    under_test = policy(Random(3))
    for number in range(70):
        facts = RoutingInfo("m", session=str(number))
        server, note = under_test.pick(tuple(servers), facts, 5.0)
        under_test.leased(server.lease(5.0), note, facts, 5.0)
    fast, medium, slow = (server.in_flight for server in servers)
    assert fast > 1.25 * medium > 1.25 * 1.25 * slow


def test_server_that_restarts_learns_its_speed_again():
    server, *_ = learnt(0.01, 0.02, 0.02)
    assert server.capacity_estimate.speed.ratio == pytest.approx(2.0, rel=NEARLY)
    go_down(server, 7.0)
    while not server.active_health.up:
        server.checked(Check.GOOD, 0.001, 8.0)
    assert server.capacity_estimate.speed.ratio == 1.0


def test_removed_server_leaves_no_time_behind():
    fleet = make_fleet(3)
    servers = list(fleet.servers.values())
    for server, each in zip(servers, (0.01, 0.02, 0.04), strict=True):
        scraped(server, each, running=0.0)
    assert fleet.speeds.median == pytest.approx(0.02)
    fleet.apply(make_config(2))
    scraped(servers[2], 0.03, running=0.0)
    assert fleet.speeds.median == pytest.approx(0.01)
    fleet.apply(make_config(1))
    assert fleet.speeds.median == 0.0


def test_fleet_counts_unconfigured_servers_as_the_configured_ones():
    def with_capacities(*capacities: int | None) -> list[dict[str, object]]:
        names = zip("abc", capacities, strict=False)
        return [
            {"url": f"http://{name}.test:1", "name": name}
            | ({} if capacity is None else {"max_concurrent_requests": capacity})
            for name, capacity in names
        ]

    fleet = make_fleet(with_capacities(64, None))
    assert fleet.servers["b"].weighted_capacity == 64
    fleet.apply(make_config(with_capacities(128, None)))
    assert fleet.servers["b"].weighted_capacity == 128
    fleet.apply(make_config(with_capacities(None, None)))
    assert fleet.servers["b"].load_estimate.weighted_capacity == EQUAL_SHARE
