"""Tallies of servers on which nothing happens: read at little cost, and right afterwards."""

from __future__ import annotations

import gc
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_router.observability import tally as tally_module
from vllm_router.observability.sliding import Rate, Ratio
from vllm_router.observability.tally import Tally
from vllm_router.routing.server_estimate import PrefixStatistics


class Engine(NamedTuple):
    generation_tokens: float
    prefix_hits: float
    prefix_queries: float


class PlainRate:
    """A Rate that keeps every value of its window, and one before it, as pairs."""

    def __init__(self, window: float = 5.0) -> None:
        self._window = window
        self._readings: list[tuple[float, float]] = []

    def observe(self, total: float, now: float) -> None:
        if self._readings and total < self._readings[-1][1]:
            self._readings = []
        self._readings.append((now, total))
        begin = now - self._window
        while len(self._readings) > 2 and self._readings[1][0] <= begin:
            del self._readings[0]
        (first, total), (_, after) = (
            self._readings[0],
            self._readings[min(1, len(self._readings) - 1)],
        )
        if len(self._readings) > 2 and first < begin and total == after:
            self._readings[0] = begin, total

    @property
    def rise(self) -> float:
        return self._readings[-1][1] - self._readings[0][1] if self._readings else 0.0

    @property
    def per_second(self) -> float:
        if len(self._readings) < 2:
            return 0.0
        return self.rise / (self._readings[-1][0] - self._readings[0][0])


class PlainRatio(Ratio):
    def __init__(self, window: float = 60.0) -> None:
        super().__init__(window)
        self._part, self._whole = PlainRate(window), PlainRate(window)  # type: ignore[assignment]


class Plain:
    """The same rates, with every reading observed and kept."""

    def __init__(self) -> None:
        self.requests, self.tokens = PlainRate(), PlainRate()
        self.prefix, self.expected = PlainRatio(), PlainRatio()

    def read(self, requests: int, engine: Engine, expected: PrefixStatistics, now: float) -> None:
        self.requests.observe(requests, now)
        self.tokens.observe(engine.generation_tokens, now)
        self.prefix.observe(engine.prefix_hits, engine.prefix_queries, now)
        self.expected.observe(expected.expected_tokens, expected.prompt_tokens, now)


spells = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 130)), min_size=1, max_size=6)
"""Pairs: the rise of the counters per second, and for how many seconds."""


@settings(max_examples=25)
@given(spells, st.sampled_from([1.0, 0.5, 2.0]))
def test_tally_read_after_standstill_equals_rates_of_all_readings(spells, interval):
    tally, plain, now, count = Tally(), Plain(), 0.0, 0
    for rise, seconds in spells:
        for _ in range(seconds):
            now, count = now + interval, count + rise
            tally.requests = count
            engine = Engine(10.0 * count, 2.0 * count, 3.0 * count)
            expected = PrefixStatistics(4 * count, count, 0, 0)
            tally.read(now, 0, engine, expected)
            plain.read(count, engine, expected, now)
            assert tally.requests_per_s == pytest.approx(plain.requests.per_second, abs=1e-3)
            assert tally.tokens_per_s == pytest.approx(plain.tokens.per_second, abs=0.1)
            assert tally._prefix.value == pytest.approx(plain.prefix.value)
            assert tally._expected.value == pytest.approx(plain.expected.value)


def test_tally_read_of_still_counters_observes_no_rate(monkeypatch):
    observed = []

    class Counted(Rate):
        def observe(self, total: float, now: float) -> None:
            observed.append(now)
            super().observe(total, now)

    monkeypatch.setattr(tally_module, "Rate", Counted)
    tally = Tally()
    for second in range(100):
        tally.read(float(second), 0)
    known = len(observed)
    for second in range(100, 200):
        tally.read(float(second), 0)
    assert len(observed) == known
    tally.requests = 10
    tally.read(200.0, 0)
    assert tally.requests_per_s == pytest.approx(2.0)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(1, 20)), min_size=1, max_size=8))
def test_rate_equals_rate_that_keeps_every_value(spells):
    """A rise of -1 stands for a restart of the counter."""
    rate, plain, now, total = Rate(), PlainRate(), 0.0, 100
    for rise, readings in spells:
        for _ in range(readings):
            now, total = now + 0.5, total + rise
            rate.observe(total, now)
            plain.observe(total, now)
            assert rate.rise == plain.rise
            assert rate.per_second == pytest.approx(plain.per_second)


def test_rate_of_still_counter_keeps_three_values_at_most():
    rate = Rate(window=60.0)
    for reading in range(100):
        rate.observe(7, float(reading))
    assert len(rate._times) == len(rate._totals) <= 3


def test_rate_of_rising_counter_makes_nothing_for_the_garbage_collector():
    rates = [Rate() for _ in range(100)]
    for reading in range(20):
        for rate in rates:
            rate.observe(float(reading), float(reading))
    gc.collect()
    gc.disable()
    try:
        for reading in range(20, 40):
            for rate in rates:
                rate.observe(float(reading), float(reading))
        young = gc.get_objects(generation=0)
    finally:
        gc.enable()
    assert len([one for one in young if isinstance(one, tuple) and len(one) == 2]) < 100


def test_rate_with_gap_between_equal_values_counts_from_begin_of_window():
    rate = Rate(window=5.0)
    for now, total in ((0.0, 7.0), (99.0, 7.0), (100.0, 17.0)):
        rate.observe(total, now)
    assert rate.per_second == pytest.approx(2.0)
