"""Tallies of servers on which nothing happens: read at little cost, and right afterwards."""

from __future__ import annotations

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


class Plain:
    """The same rates, with every reading observed."""

    def __init__(self) -> None:
        self.requests, self.tokens = Rate(), Rate()
        self.prefix, self.expected = Ratio(), Ratio()

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


def test_rate_with_gap_between_equal_values_counts_from_begin_of_window():
    rate = Rate(window=5.0)
    for now, total in ((0.0, 7.0), (99.0, 7.0), (100.0, 17.0)):
        rate.observe(total, now)
    assert rate.per_second == pytest.approx(2.0)
