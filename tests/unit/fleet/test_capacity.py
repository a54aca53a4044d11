"""Learnt capacities: what shows that a server is full, and what does not."""

from __future__ import annotations

import pytest

from support.fleet_makers import gauges, go_down, make_config, make_fleet
from vllm_router.fleet.active_health import Check
from vllm_router.fleet.capacity import (
    ASSUMED,
    EQUAL_SHARE,
    HALF_LIFE,
    NOTICEABLE,
    QUEUE_STAYS,
    CapacityEstimate,
    CapacityPool,
    CapacitySource,
)

FULL = 1 + round(QUEUE_STAYS / 0.5)
"""Scrapes with a queue until the server counts as full."""


class Scrapes:
    """An estimate, and a clock that goes on by half a second per scrape."""

    def __init__(self, configured: int | None = None, pool: CapacityPool | None = None) -> None:
        self.estimate = CapacityEstimate(configured, pool)
        self.now = 100.0

    def see(self, running: float, waiting: float = 0.0, kv: float | None = None, times: int = 1):
        for _ in range(times):
            self.now += 0.5
            self.estimate.observe(running, waiting, kv, self.now)
        return self.estimate


def test_capacity_never_full_is_assumed_and_shares_are_equal():
    estimate = Scrapes().see(24, times=10)
    assert (estimate.source, estimate.shown) == (CapacitySource.ASSUMED, ASSUMED)
    assert (estimate.share, estimate.peak) == (EQUAL_SHARE, 24)
    assert Scrapes().see(400).shown == 400


def test_capacity_is_learnt_from_queue_that_stays():
    scrapes = Scrapes()
    scrapes.see(60)
    assert scrapes.see(64, 3, times=FULL - 1).full_at is None  # it may admit them in a moment
    estimate = scrapes.see(64, 3)
    assert (estimate.source, estimate.shown) == (CapacitySource.LEARNT, 64)
    assert estimate.share == EQUAL_SHARE  # it is the only one


def test_capacity_is_not_learnt_while_waiting_requests_are_admitted():
    """A burst of long prompts: vLLM admits them as its token budget allows."""
    scrapes = Scrapes()
    for running in range(1, 20):
        scrapes.see(running, 20)
    assert scrapes.estimate.full_at is None
    assert scrapes.see(20, 0).full_at is None


def test_capacity_is_not_learnt_from_queue_that_empties_between_scrapes():
    scrapes = Scrapes()
    for _ in range(20):
        scrapes.see(30, 1, times=FULL - 1)
        scrapes.see(30)
    assert scrapes.estimate.full_at is None


def test_capacity_is_learnt_from_full_kv_cache():
    assert Scrapes().see(12, 0, 0.94).full_at is None
    assert Scrapes().see(12, 0, 0.95).shown == 12


def test_capacity_rises_at_once_when_more_runs_without_queue():
    scrapes = Scrapes()
    scrapes.see(10, 2, times=FULL)
    assert scrapes.see(30).shown == 30


def test_capacity_falls_by_half_the_way_in_a_half_life():
    scrapes = Scrapes()
    scrapes.see(60, 2, times=FULL)
    assert scrapes.see(20, 9, times=round(HALF_LIFE / 0.5)).shown == pytest.approx(40, abs=2)
    assert scrapes.see(20, 9, times=200).shown == 20


def test_capacity_without_new_scrapes_weighs_no_more_than_a_half_life():
    scrapes = Scrapes()
    scrapes.see(60, 2, times=FULL)
    scrapes.now += 1e6
    assert scrapes.see(20, 9).shown == 40


def test_capacity_idle_server_learns_nothing():
    estimate = Scrapes().see(0, 5, 0.99, times=5)
    assert (estimate.full_at, estimate.peak) == (None, 0)


def test_capacity_small_changes_leave_share_and_pool():
    pool = CapacityPool()
    scrapes = Scrapes(pool=pool)
    scrapes.see(100, 2, times=FULL)
    scrapes.see(100 * (1 + NOTICEABLE) - 1)
    assert (scrapes.estimate.shown, pool.largest) == (109, 100)
    scrapes.see(round(100 * (1 + NOTICEABLE)) + 1)
    assert pool.largest == 111


def test_capacity_counts_next_to_the_largest_of_pool():
    pool = CapacityPool()
    small, large, unknown = (Scrapes(pool=pool) for _ in range(3))
    small.see(8, 3, times=FULL)
    assert [one.estimate.share for one in (small, large, unknown)] == [EQUAL_SHARE] * 3
    large.see(40, 3, times=FULL)
    shares = [one.estimate.share for one in (small, large, unknown)]
    assert shares == [8 / 40 * EQUAL_SHARE, EQUAL_SHARE, EQUAL_SHARE]
    large.estimate.forget()
    assert (pool.largest, small.estimate.share) == (8, EQUAL_SHARE)


def test_capacity_configured_is_used_and_a_better_one_proposed():
    scrapes = Scrapes(3)
    assert scrapes.see(4).proposed is None
    estimate = scrapes.see(24, times=4)
    assert (estimate.source, estimate.shown, estimate.share) == (CapacitySource.CONFIGURED, 3, 3)
    assert estimate.proposed == 24
    assert Scrapes(64).see(20, 4, times=FULL).proposed == 20
    assert Scrapes(64).see(60, 4, times=FULL).proposed is None
    assert Scrapes().see(20, 4, times=FULL).proposed is None


def test_capacity_configured_adds_nothing_to_pool():
    pool = CapacityPool()
    Scrapes(3, pool).see(24, 2, times=FULL)
    assert pool.largest is None


def test_capacity_refusals_count_from_two_requests():
    scrapes = Scrapes()
    scrapes.estimate.refused(1, 101.0)
    assert scrapes.estimate.full_at is None
    scrapes.estimate.refused(16, 102.0)
    assert scrapes.estimate.shown == 16


# -- in a fleet -------------------------------------------------------------------------------


def test_server_with_24_running_and_no_queue_is_not_loaded():
    server = make_fleet(1).servers["a"]
    server.scraped(gauges(24), 1.0, 0)
    assert server.load == 24 / ASSUMED
    assert server.load_estimate.effective == 24 / EQUAL_SHARE


def test_server_full_by_its_gauges_has_a_load_of_one():
    server = make_fleet(1).servers["a"]
    for second in range(5):
        server.scraped(gauges(64, 2), float(second), 0)
    assert (server.capacity, server.load) == (64, 65 / 64)
    server.scraped(gauges(32), 5.0, 0)
    assert server.load == 0.5


def test_server_weight_multiplies_learnt_capacity():
    fleet = make_fleet([{"url": "http://a.test:1", "name": "a", "weight": 2.0}])
    server = fleet.servers["a"]
    for second in range(5):
        server.scraped(gauges(64, 2), float(second), 0)
    assert (server.capacity, server.weighted_capacity) == (64, 2 * EQUAL_SHARE)
    assert server.key_share == 2 * EQUAL_SHARE


def test_server_that_restarts_learns_again():
    fleet = make_fleet(2)
    server = fleet.servers["a"]
    for second in range(5):
        server.scraped(gauges(8, 2), float(second), 0)
    assert fleet.capacities.largest == 8
    go_down(server, 7.0)
    while not server.active_health.up:
        server.checked(Check.GOOD, 0.001, 8.0)
    assert server.capacity_estimate.source is CapacitySource.ASSUMED
    assert fleet.capacities.largest is None


def test_server_without_gauges_learns_from_refusals():
    server = make_fleet(1).servers["a"]
    leases = [server.lease(1.0) for _ in range(5)]
    server.refused(2.0, None)
    assert server.capacity_estimate.full_at == 5
    server.scraped(gauges(9), 3.0, 5)
    server.refused(4.0, None)  # its gauges say more
    assert server.capacity_estimate.full_at == 9
    for lease in leases:
        lease.release()


def test_removed_server_leaves_no_capacity_behind():
    fleet = make_fleet(2)
    for second in range(5):
        fleet.servers["b"].scraped(gauges(50, 2), float(second), 0)
    fleet.apply(make_config(1))
    assert fleet.capacities.largest is None


def test_removed_server_that_still_answers_leaves_no_capacity_behind():
    fleet = make_fleet(2)
    b = fleet.servers["b"]
    leases = [b.lease(0.0) for _ in range(3)]
    b.refused(0.0, None)
    assert fleet.capacities.largest == 3
    fleet.apply(make_config(1))
    leases += [b.lease(1.0) for _ in range(3)]
    b.refused(20.0, None)
    assert fleet.capacities.largest is None
    fleet.apply(make_config(2))
    assert fleet.servers["b"] is b
    assert fleet.capacities.largest == b.capacity_estimate.full_at
    for lease in leases:
        lease.release()


def test_server_that_joins_configured_ones_has_their_median_at_once():
    known = [{"url": f"http://{name}.test:1", "max_concurrent_requests": 200} for name in "ab"]
    fleet = make_fleet(known)
    fleet.apply(make_config([*known, {"url": "http://c.test:1", "name": "c"}]))
    assert fleet.servers["c"].weighted_capacity == 200


def test_key_share_follows_configuration_alone():
    server = make_fleet(1).servers["a"]
    for second in range(5):
        server.scraped(gauges(500, 2), float(second), 0)
    assert server.key_share == EQUAL_SHARE
