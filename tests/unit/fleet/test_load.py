"""The load estimate by itself: gauges, leases, slow start and the penalty of fast errors."""

from __future__ import annotations

import math

import pytest

from support.fleet_makers import gauges
from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.load import (
    DEFAULT_RESPONSE_SECONDS,
    EWMA_WEIGHT,
    MIN_ERROR_PENALTY,
    SLOW_START_MIN,
    LoadEstimate,
)


def make(capacity: float = 1.0, *, slow_start: float = 0.0, interval: float = 0.5) -> LoadEstimate:
    load = LoadEstimate()
    load.configure(capacity, slow_start, interval)
    return load


def shown(load: LoadEstimate, in_flight: int) -> tuple[float, float]:
    load.update(in_flight)
    return load.running, load.waiting


def test_new_estimate_is_idle_and_without_metrics():
    load = LoadEstimate()
    assert (load.value, load.running, load.waiting, load.active, load.effective) == (0, 0, 0, 0, 0)
    assert (load.slow_start_factor, load.error_penalty, load.advancing) == (1.0, 0.0, False)
    assert (load.metrics, load.scraped_at, load.fresh, load.asleep) == (None, None, False, False)
    assert (load.response_seconds, load.first_token_seconds) == (0.0, 0.0)
    assert (load.stuck, load.leases_at_scrape, load.stale_after) == (0.0, 0, math.inf)
    assert load.age(5.0) == math.inf


def test_new_estimate_has_capacity_one_and_no_slow_start():
    load = LoadEstimate()
    assert load.advance(5.0, 5.0) is False
    load.update(3)
    assert (load.value, load.effective) == (3.0, 3.0)


def test_load_metrics_are_stale_after_three_intervals():
    assert make(interval=0.5).stale_after == 1.5


@pytest.mark.parametrize(
    ("page", "at_scrape", "in_flight", "expected"),
    [
        (gauges(5, 3), 2, 2, (5, 3)),
        (gauges(5, 3), 2, 4, (7, 3)),
        (gauges(5, 3), 2, 0, (3, 3)),
        (gauges(5, None), 0, 0, (5, 0)),
        (gauges(0, 0), 4, 4, (4, 0)),  # the gauges lag
        (gauges(1, 5), 6, 2, (0, 2)),  # of the waiting requests four have ended
    ],
)
def test_load_is_gauges_corrected_by_leases(page, at_scrape, in_flight, expected):
    load = make(capacity=2.0)
    load.take_scrape(page, 0.0, at_scrape)
    assert shown(load, in_flight) == expected
    running, waiting = expected
    assert load.active == running + 0.5 * waiting
    assert load.value == load.effective == (running + 0.5 * waiting) / 2.0


def test_load_stuck_requests_are_subtracted_but_ours_count():
    load = make()
    load.take_scrape(gauges(5, 0), 0.0, 0)
    load.stuck = 4.0
    assert shown(load, 0) == (1, 0)
    assert shown(load, 3) == (4, 0)
    load.stuck = 9.0
    assert shown(load, 2) == (2, 0)


@pytest.mark.parametrize("lost", ["stale", "no load", "none yet"])
def test_load_without_usable_metrics_is_our_leases(lost):
    load = make()
    if lost != "none yet":
        load.take_scrape(gauges(5, 3), 0.0, 0)
    if lost == "stale":
        load.fresh = False
    elif lost == "no load":
        load.take_scrape(EngineMetrics(prompt_tokens=1), 1.0, 0)
        assert (load.metrics, load.scraped_at, load.fresh) == (None, None, False)
    assert shown(load, 2) == (2, 0)


def test_load_scrape_dates_metrics_and_reports_sleep():
    load = make()
    load.take_scrape(gauges(1, asleep=True), 3.0, 1)
    assert (load.age(5.0), load.asleep, load.leases_at_scrape) == (2.0, True, 1)
    load.take_scrape(gauges(1), 4.0, 0)
    assert (load.age(5.0), load.asleep, load.leases_at_scrape) == (1.0, False, 0)


# -- slow start --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "factor"),
    [(0.0, SLOW_START_MIN), (0.5, SLOW_START_MIN), (2.5, 0.25), (9.0, 0.9), (10.0, 1.0)],
)
def test_slow_start_factor_grows_with_time_since_return(age, factor):
    load = make(slow_start=10.0)
    assert load.advance(100.0 + age, 100.0) is (factor < 1.0)
    assert load.slow_start_factor == pytest.approx(factor)
    assert load.advancing is (factor < 1.0)


def test_slow_start_includes_the_prospective_request():
    load = make(capacity=4.0, slow_start=10.0)
    load.advance(102.0, 100.0)
    load.update(0)
    assert load.effective == pytest.approx(1 / (4 * 0.2) - 1 / 4)
    load.update(3)
    assert load.effective == pytest.approx(4 / (4 * 0.2) - 1 / 4)
    assert load.value == 0.75


def test_slow_start_time_does_not_go_back():
    load = make(slow_start=10.0)
    load.advance(109.0, 100.0)
    load.advance(102.0, 100.0)
    assert load.slow_start_factor == 0.9


def test_slow_start_disabled_at_the_moment_of_return_is_whole():
    load = make(slow_start=0.0)
    assert load.advance(100.0, 100.0) is False
    assert load.slow_start_factor == 1.0


def test_slow_start_of_clock_that_begins_at_zero():
    load = make(slow_start=1.0)
    load.advance(0.5, 0.25)
    assert load.slow_start_factor == 0.25


# -- durations ---------------------------------------------------------------------------------


def test_durations_begin_with_first_sample_and_follow_slowly():
    load = make()
    load.record_success(4.0)
    load.record_first_token(2.0)
    assert (load.response_seconds, load.first_token_seconds) == (4.0, 2.0)
    load.record_success(8.0)
    load.record_first_token(6.0)
    assert load.response_seconds == pytest.approx(4.0 + EWMA_WEIGHT * 4.0)
    assert load.first_token_seconds == pytest.approx(2.0 + EWMA_WEIGHT * 4.0)


# -- the penalty of fast errors ----------------------------------------------------------------


def penalty(load: LoadEstimate, seconds: float, fleet_mean: float = 0.0, now: float = 0.0) -> float:
    before = load.error_penalty
    added = load.record_fast_error(now, seconds, fleet_mean, -math.inf)
    assert added is (load.error_penalty > before)
    return load.error_penalty


def test_error_penalty_is_missing_part_of_good_response():
    assert penalty(make(), 0.25 * DEFAULT_RESPONSE_SECONDS) == 0.75
    assert penalty(make(), DEFAULT_RESPONSE_SECONDS) == 0.0
    assert penalty(make(), 2 * DEFAULT_RESPONSE_SECONDS) == 0.0
    load = make()
    load.record_success(4.0)
    assert penalty(load, 1.0) == 0.75
    assert penalty(load, 3.0) == 1.0
    assert load.advancing is True


def test_error_penalty_draws_estimate_to_fleet_mean():
    load = make()
    assert penalty(load, 1.0, fleet_mean=2.0) == 0.5
    assert load.response_seconds == 2.0
    penalty(load, 5.0, fleet_mean=4.0)
    assert load.response_seconds == pytest.approx(2.0 + EWMA_WEIGHT * 2.0)
    penalty(load, 5.0, fleet_mean=0.0)
    assert load.response_seconds == pytest.approx(2.0 + EWMA_WEIGHT * 2.0)


def test_error_penalty_decays_over_duration_of_good_response():
    load = make(capacity=2.0)
    load.record_success(4.0)
    penalty(load, 0.0, now=10.0)
    assert load.advance(14.0, -math.inf) is True
    assert load.error_penalty == pytest.approx(math.exp(-1))
    assert load.advance(12.0, -math.inf) is True  # time does not go back
    assert load.error_penalty == pytest.approx(math.exp(-1))
    load.update(1)
    assert load.active == pytest.approx(1 + math.exp(-1))
    assert load.effective == pytest.approx((2 + math.exp(-1)) / 2 - 0.5)
    assert (load.value, load.running) == (0.5, 1)


def test_error_penalty_that_is_small_is_dropped():
    load = make()
    load.error_penalty = 2 * MIN_ERROR_PENALTY
    assert load.advance(0.0, -math.inf) is True
    assert load.advance(math.log(1.9), -math.inf) is True
    assert load.advance(math.log(2.1), -math.inf) is False
    assert (load.error_penalty, load.advancing) == (0.0, False)
    load.update(1)
    assert load.effective == 1.0


def test_error_penalty_decays_before_another_is_added():
    load = make()
    penalty(load, 0.0, now=10.0)
    assert penalty(load, 0.0, now=11.0) == pytest.approx(1 + math.exp(-1))
