"""The drain rate and the shortest response at the borders of their memory."""

from __future__ import annotations

import pytest

from vllm_router.routing.queue.drain_rate import (
    IDLE_RESET,
    MARGIN,
    MAX_SAMPLES,
    MIN_SAMPLES,
    SAMPLE_EXPIRY,
    DrainRate,
    ShortestResponse,
)


def freed(*moments: float) -> DrainRate:
    rate = DrainRate()
    rate.begin(0.0)
    for now in moments:
        rate.freed(now)
    return rate


def test_drain_rate_new_is_idle_and_unknown():
    rate = DrainRate()
    assert (rate.running, rate.is_current) == (False, False)
    rate.end(5.0)
    rate.freed(5.0)
    rate.forget(5.0)
    assert (rate.running, rate.is_current, rate.per_second(5.0)) == (False, False, None)


def test_drain_rate_servers_freed_while_none_waits_do_not_count():
    rate = DrainRate()
    for _ in range(MIN_SAMPLES):
        rate.freed(1.0)
    rate.begin(2.0)
    assert (rate.is_current, rate.per_second(3.0)) == (False, None)


def test_drain_rate_needs_its_least_samples():
    assert freed(*[1.0] * (MIN_SAMPLES - 1)).is_current is False
    rate = freed(*[1.0] * MIN_SAMPLES)
    assert rate.is_current is True
    assert rate.per_second(2.0) == MIN_SAMPLES / 2.0
    assert freed(*[0.0] * MIN_SAMPLES).per_second(0.0) is None


def test_drain_rate_begins_once_while_requests_wait():
    rate = freed(1.0, 1.0, 1.0, 1.0)
    rate.begin(3.0)
    assert (rate.running, rate.is_current) == (True, True)
    assert rate.per_second(4.0) == 1.0


@pytest.mark.parametrize(("idle", "known"), [(IDLE_RESET, True), (IDLE_RESET + 0.1, False)])
def test_drain_rate_survives_an_idle_time_up_to_its_limit(idle, known):
    rate = freed(1.0, 1.0, 1.0, 1.0)
    rate.end(2.0)
    assert (rate.running, rate.is_current) == (False, False)
    assert (rate.per_second(2.0 + idle) is not None) is known
    rate.end(2.0 + idle)
    rate.begin(2.0 + idle)
    assert rate.per_second(2.0 + idle) == (2.0 if known else None)
    for _ in range(MIN_SAMPLES):
        rate.freed(4.0 + idle)
    assert rate.per_second(4.0 + idle) == (MIN_SAMPLES / (4.0 - 1.0) if known else 2.0)


@pytest.mark.parametrize(
    ("age", "count"), [(SAMPLE_EXPIRY, MIN_SAMPLES + 1), (SAMPLE_EXPIRY + 0.1, MIN_SAMPLES)]
)
def test_drain_rate_samples_expire(age, count):
    rate = DrainRate()
    rate.begin(9.0)
    for now in (10.0, *[20.0] * MIN_SAMPLES):
        rate.freed(now)
    start = 9.0 if count == MIN_SAMPLES + 1 else 10.0
    assert rate.per_second(10.0 + age) == pytest.approx(count / (10.0 + age - start))


def test_drain_rate_forgotten_measures_from_that_moment():
    rate = freed(1.0, 1.0, 1.0, 1.0)
    rate.forget(10.0)
    assert (rate.running, rate.is_current, rate.per_second(11.0)) == (True, False, None)
    for _ in range(MIN_SAMPLES):
        rate.freed(11.0)
    assert rate.per_second(12.0) == MIN_SAMPLES / 2.0
    rate.end(12.0)
    rate.forget(12.0)
    rate.begin(13.0)
    assert rate.per_second(14.0) is None


@pytest.mark.parametrize("how", ["end", "forget"])
def test_drain_rate_is_current_anew_only_after_all_samples(how):
    rate = freed(1.0, 1.0, 1.0, 1.0)
    if how == "end":
        rate.end(2.0)
        rate.begin(2.0)
    else:
        rate.forget(2.0)
    for _ in range(MIN_SAMPLES - 1):
        rate.freed(3.0)
    assert rate.is_current is False
    rate.freed(3.0)
    assert rate.is_current is True


def test_drain_rate_keeps_its_most_samples():
    rate = freed(*(float(n) for n in range(2 * MAX_SAMPLES)))
    now = 2.0 * MAX_SAMPLES
    assert rate.per_second(now) == pytest.approx(MAX_SAMPLES / (MAX_SAMPLES + 1))


def test_shortest_response_has_a_margin_and_needs_samples():
    shortest = ShortestResponse()
    for seconds in (5.0, 3.0, 4.0):
        shortest.add(seconds, 10.0)
    assert shortest.seconds(10.0) == 0.0
    shortest.add(9.0, 11.0)
    assert shortest.seconds(11.0) == MARGIN * 3.0
    assert shortest.seconds(10.0 + SAMPLE_EXPIRY) == MARGIN * 3.0
    assert shortest.seconds(10.1 + SAMPLE_EXPIRY) == 0.0
    assert ShortestResponse().seconds(0.0) == 0.0


def test_shortest_response_is_of_the_last_ones():
    shortest = ShortestResponse()
    shortest.add(1.0, 0.0)
    for _ in range(MAX_SAMPLES):
        shortest.add(2.0, 0.0)
    assert shortest.seconds(0.0) == MARGIN * 2.0
