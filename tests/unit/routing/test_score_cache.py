"""The score cache gives each candidate the score that is computed for it alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fleet_makers import make_fleet
from vllm_router.fleet.server import ChangeLog
from vllm_router.routing.policies import PolicySettings
from vllm_router.routing.score_cache import AFFINITY_BONUS, ScoreCache
from vllm_router.routing.server_estimate import ServerEstimate

LEVELS = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 63)), max_size=5)


def score_cache(loads: list[int]) -> ScoreCache:
    described = [{"url": f"http://{n}.test:1", "name": f"s{n}"} for n in range(len(loads))]
    servers = tuple(make_fleet(described).servers.values())
    estimates = [ServerEstimate(server, 1 << place) for place, server in enumerate(servers)]
    for account, load in zip(estimates, loads, strict=True):
        account.queued = 100.0 * load
        for _ in range(load):
            account.server.lease(0.0)
    cache = ScoreCache(servers, estimates, PolicySettings())
    cache.factors = [1.0 + place / 10 for place in range(len(loads))]
    cache.measure_all()
    return cache


@given(st.lists(st.integers(0, 4), min_size=6, max_size=6), LEVELS, st.integers(-1, 5))
def test_score_cache_highest_repeated_match_counts(
    loads: list[int], levels: list[tuple[int, int]], home: int
):
    cache = score_cache(loads)
    before = cache.bases.copy()
    found = [(float(tokens), bits) for tokens, bits in sorted(levels, reverse=True)]
    scores = cache.scores(found, 1 << home if home >= 0 else 0)
    best = max((tokens for tokens, _ in found), default=0.0)
    for place, (factor, load) in enumerate(zip(cache.factors, loads, strict=True)):
        cached = max((tokens for tokens, bits in found if bits & 1 << place), default=0.0)
        tokens = 2 * 100.0 * load + (best - cached) * (1 + 0.5 * load)
        bonus = AFFINITY_BONUS if place == home else 0.0
        assert scores[place] == pytest.approx(factor * (1 + load - bonus + tokens / 1000))
    assert cache.bases == before


def test_score_cache_missed_changes_are_measured_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ChangeLog, "MAX_LENGTH", 3)
    cache = score_cache([0, 0, 0])
    for count in range(1, 9):
        cache.candidates[count % 3].lease(0.0)
        if count in (2, 8):
            cache.follow()
    assert cache.bases == [factor * (1.0 + load) for factor, load in zip(
        cache.factors, (2, 3, 3), strict=True)]  # fmt: skip


def test_score_cache_new_change_log_measures_only_changed_servers(monkeypatch: pytest.MonkeyPatch):
    """A thousand servers measured anew every thousand requests took 3 µs of each."""
    monkeypatch.setattr(ChangeLog, "MAX_LENGTH", 3)
    cache = score_cache([0, 0, 0, 0])
    measured: list[int] = []
    measure = ScoreCache._measure
    monkeypatch.setattr(
        ScoreCache, "_measure", lambda cache, at: (measured.append(at), measure(cache, at))
    )
    log = cache.candidates[0].change_log
    first = log.servers
    while log.servers is first:
        cache.follow()
        cache.candidates[1].lease(0.0)
    cache.candidates[2].lease(0.0)
    cache.follow()
    assert set(measured) == {1, 2}
    loads = [server.in_flight for server in cache.candidates]
    expected = [f * (1.0 + load) for f, load in zip(cache.factors, loads, strict=True)]
    assert cache.bases == expected


def test_score_cache_servers_share_change_log_of_fleet():
    fleet = make_fleet(2)
    assert {server.change_log for server in fleet.servers.values()} == {fleet.change_log}
