"""The drain rate: how fast waiting requests get a server, and for how long it is valid."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.routing.queue.drain_rate import (
    IDLE_RESET,
    MAX_SAMPLES,
    MIN_SAMPLES,
    SAMPLE_EXPIRY,
    DrainRate,
    ShortestResponse,
)


def rate_after(*moments: float, begin: float = 0.0) -> DrainRate:
    rate = DrainRate()
    rate.begin(begin)
    for now in moments:
        rate.freed(now)
    return rate


def test_drain_rate_is_freed_slots_per_second_of_waiting():
    rate = rate_after(*(n / 10 for n in range(1, 21)))
    assert rate.per_second(2.0) == pytest.approx(10)
    rate.end(2.0)
    assert rate.per_second(6.0) == pytest.approx(10)  # no request waited meanwhile
    rate.begin(6.0)
    assert rate.per_second(8.0) == pytest.approx(5)  # but now no slot becomes free


def test_drain_rate_after_idle_time_is_unknown():
    rate = rate_after(*(n / 10 for n in range(1, 21)))
    rate.end(2.0)
    assert rate.per_second(2.0 + IDLE_RESET + 1) is None
    rate.begin(2.0 + IDLE_RESET + 1)
    assert rate.per_second(2.0 + IDLE_RESET + 2) is None


def test_drain_rate_of_stalled_fleet_becomes_unknown():
    rate = rate_after(1.0, 2.0, 3.0, 4.0, 5.0)
    assert rate.per_second(10.0) == pytest.approx(0.5)
    assert rate.per_second(10.0 + SAMPLE_EXPIRY) is None


def test_drain_rate_is_current_only_after_enough_frees():
    rate = rate_after(1.0, 2.0, 3.0, 4.0)
    assert rate.is_current
    rate.end(4.0)
    rate.begin(5.0)
    assert not rate.is_current
    assert rate.per_second(5.0) == pytest.approx(1.0)
    for now in (5.1, 5.2, 5.3, 5.4):
        rate.freed(now)
    assert rate.is_current
    assert rate.per_second(5.4) == pytest.approx(10.0)  # earlier times no longer count


def test_drain_rate_before_measurement_is_unknown():
    assert DrainRate().per_second(5.0) is None
    assert rate_after(*([1.0] * (MIN_SAMPLES - 1))).per_second(2.0) is None


def test_drain_rate_follows_latest_frees():
    rate = rate_after(*(n / 10 for n in range(1, 101)), *(10.0 + n for n in range(1, 101)))
    assert rate.per_second(110.0) == pytest.approx(1)


def test_drain_rate_ignores_returning_server():
    rate = DrainRate()
    for _ in range(50):
        rate.freed(1.0)
    assert rate.per_second(2.0) is None


def test_drain_rate_forget_measures_anew_while_requests_wait():
    rate = rate_after(1.0, 2.0, 3.0, 4.0)
    rate.forget(4.0)
    assert rate.per_second(4.0) is None
    assert not rate.is_current
    for now in (4.1, 4.2, 4.3, 4.4):
        rate.freed(now)
    assert rate.per_second(4.4) == pytest.approx(10.0)


@given(st.lists(st.tuples(st.sampled_from("bef!"), st.floats(0.0, 90.0)), max_size=60))
def test_drain_rate_is_never_negative_or_stale(steps: list[tuple[str, float]]):
    rate, now, freed = DrainRate(), 0.0, []
    for what, seconds in steps:
        now += seconds
        if what == "b":
            rate.begin(now)
        elif what == "e":
            rate.end(now)
        elif what == "f":
            if rate.running:
                freed.append(now)
            rate.freed(now)
        else:
            rate.forget(now)
            freed.clear()
        found = rate.per_second(now)
        recent = [moment for moment in freed if now - moment <= SAMPLE_EXPIRY]
        assert found is None or (found > 0.0 and len(recent) >= MIN_SAMPLES)


def test_drain_rate_quickest_is_of_latest_responses():
    quickest = ShortestResponse()
    for seconds in (5.0, 1.0, 3.0):
        quickest.add(seconds, 0.0)
    assert quickest.seconds(0.0) == 0.0  # too few to be known
    quickest.add(4.0, 0.0)
    assert quickest.seconds(0.0) == pytest.approx(1.1)
    for _ in range(MAX_SAMPLES):
        quickest.add(2.0, 0.0)
    assert quickest.seconds(0.0) == pytest.approx(2.2)


def test_drain_rate_quickest_forgets_old_responses():
    quickest = ShortestResponse()
    for now in range(8):
        quickest.add(9.0, float(now))
    assert quickest.seconds(SAMPLE_EXPIRY + 3.0) == pytest.approx(9.9)
    assert quickest.seconds(SAMPLE_EXPIRY + 3.5) == pytest.approx(9.9)
    assert quickest.seconds(SAMPLE_EXPIRY + 4.5) == 0.0
