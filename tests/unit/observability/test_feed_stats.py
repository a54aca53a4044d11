"""Rates, ratios and percentiles over sliding windows."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.observability.sliding import Rate, Ratio, SlidingPercentiles, bucket_of, step_of
from vllm_router.steps import finish
from vllm_router.web.history import COLUMNS_AT_ONCE, FIGURES, Memory, Series, digest_rows
from vllm_router.web.schema import History


def percentiles(durations, now=0.0):
    window = SlidingPercentiles()
    for seconds in durations:
        window.add(bucket_of(seconds), step_of(now))
    return window.read(now)


def test_percentiles_of_no_durations_are_none():
    assert percentiles([]) is None


@given(st.lists(st.floats(1e-4, 3600), min_size=1, max_size=300))
def test_percentiles_are_exact_to_2_5_percent(durations):
    found = percentiles(durations)
    durations.sort()
    for value, share in ((found.p50, 0.50), (found.p95, 0.95), (found.p99, 0.99)):
        rank = max(1, -int(-share * len(durations) // 1))
        assert value == pytest.approx(durations[rank - 1], rel=0.026)
    assert found.count == len(durations)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-9])
def test_percentiles_unmeasurably_short_duration_counts_as_shortest(seconds):
    assert percentiles([seconds]).p99 < 2e-5


def test_window_forgets_what_is_older_than_a_minute():
    window = SlidingPercentiles(60.0)
    window.add(bucket_of(5.0), step_of(0.0))
    window.add(bucket_of(1.0), step_of(30.0))
    assert window.read(59.0).count == 2
    later = window.read(75.0)
    assert later.count == 1
    assert later.p99 == pytest.approx(1.0, rel=0.03)
    assert window.read(200.0) is None


def test_window_memory_is_bounded_by_buckets_and_steps():
    window = SlidingPercentiles(60.0)
    for moment in range(5000):
        window.add(bucket_of(0.001 * (1 + moment % 100)), step_of(moment))
    assert len(window._steps) <= 31
    assert window.read(4999).count <= 60 + 2


def test_rate_is_rise_per_second_within_window():
    rate = Rate(window=5.0)
    for second in range(20):
        rate.observe(second * 3, float(second))
    assert rate.per_second == pytest.approx(3.0)
    for second in range(20, 40):
        rate.observe(60, float(second))
    assert rate.per_second == 0.0


def test_rate_of_one_reading_is_zero():
    rate = Rate()
    assert rate.per_second == 0.0
    rate.observe(1000, 1.0)
    assert rate.per_second == 0.0


def test_rate_of_restarted_counter_is_not_negative():
    rate = Rate()
    rate.observe(1000, 1.0)
    rate.observe(1100, 2.0)
    rate.observe(5, 3.0)
    assert rate.per_second == 0.0
    rate.observe(15, 4.0)
    assert rate.per_second == pytest.approx(10.0)


def test_ratio_is_of_window_or_of_lifetime_if_constant():
    ratio = Ratio(window=60.0)
    assert ratio.value is None
    ratio.observe(10, 100, 0.0)
    assert ratio.value == pytest.approx(0.1)
    ratio.observe(60, 200, 1.0)
    assert ratio.value == pytest.approx(0.5)


def test_ratio_of_missing_figures_is_unknown():
    ratio = Ratio()
    ratio.observe(None, 100, 0.0)
    ratio.observe(0, 0, 0.0)
    assert ratio.value is None


# -- history ----------------------------------------------------------------------------------


def row(value):
    return (value,) * len(FIGURES)


def message(series: Series) -> History:
    return msgspec.json.decode(finish(series.encode()), type=History)


def test_history_keeps_last_rows_of_present_servers():
    series = Series(1.0, 3)
    for second, loads in enumerate([{"a": 0.1}, {"a": 0.2}, {"a": 0.3, "b": 1.0}, {"b": 2.0}]):
        series.add(row(second), loads, 100.0 + second)
    found = message(series)
    assert found.end == 103.0
    assert found.fleet["load"] == [1, 2, 3]
    assert found.servers == {"b": [None, 1.0, 2.0]}


def test_history_of_new_router_is_empty_but_complete():
    assert message(Series(1.0, 3)).fleet == {name: [] for name in FIGURES}


def test_history_ten_seconds_become_means_and_worst_percentiles():
    rows = [row(None), row(1.0), row(4.0)]
    digested = dict(zip(FIGURES, digest_rows(rows), strict=True))
    assert digested["running"] == 2.5
    assert digested["ttft_p95"] == 4.0
    assert digest_rows([row(None)]) == row(None)


def test_history_of_an_hour_is_bounded():
    memory = Memory()
    for second in range(5000):
        memory.add(row(float(second)), {"a": 1.0}, float(second))
    minutes, hour = finish(memory.encode())
    assert len(minutes) < 60_000
    assert b'"interval":10.0' in hour
    assert finish(memory.encode())[0] is minutes


def test_history_row_that_comes_during_encoding_is_added_afterwards():
    memory = Memory()
    loads = {f"s{number}": 0.5 for number in range(3 * COLUMNS_AT_ONCE)}
    memory.add(row(1.0), loads, 1.0)
    steps = memory.encode()
    next(steps)
    memory.add(row(2.0), loads, 2.0)
    minutes = msgspec.json.decode(finish(steps)[0], type=History)
    assert minutes.end == 1.0
    assert {len(values) for values in minutes.servers.values()} == {1}
    after = msgspec.json.decode(finish(memory.encode())[0], type=History)
    assert after.fleet["load"] == [1.0, 2.0]
    assert {len(values) for values in after.servers.values()} == {2}


def test_history_encoding_that_is_given_up_loses_no_row():
    memory = Memory()
    loads = {f"s{number}": 0.5 for number in range(3 * COLUMNS_AT_ONCE)}
    memory.add(row(1.0), loads, 1.0)
    steps = memory.encode()
    next(steps)
    memory.add(row(2.0), loads, 2.0)
    steps.close()
    found = msgspec.json.decode(finish(memory.encode())[0], type=History)
    assert found.fleet["load"] == [1.0, 2.0]
