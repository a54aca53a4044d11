"""The terms of the candidates' scores in an explanation.

The figures of all candidates are copied at once, which takes a millisecond for a thousand; the
terms of a candidate are computed from them when they are read, while other tasks may run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vllm_router.routing.adapters import WAIT_PENALTY, Levels
from vllm_router.routing.score_cache import AFFINITY_BONUS, ScoreCache


class ScoredRequest(NamedTuple):
    """The request. `levels` and `bonus`: see `ScoreCache.scores`.

    `tokens`, `uncached`, `turns`, `delay`: see `ScoreCache.with_prompt`. `swap`: tokens that
    loading the adapter costs; `loaded`: bits of the servers that have it; `spare`: of these and of
    the servers with a slot left, if others have none; `waits`: of the servers on which the request
    would wait for a slot.
    """

    levels: Levels
    bonus: int
    tokens: float
    uncached: float
    turns: float
    delay: float
    swap: float
    loaded: int
    spare: int
    waits: int


class ScoreTable:
    """The figures of all candidates for one request, copied at one moment."""

    def __init__(self, cache: ScoreCache, asked: ScoredRequest, now: float) -> None:
        estimates = cache.estimates
        loads = [one.server.load_estimate for one in estimates]
        self._asked = asked
        self._cache = cache.frozen()
        self._active = [one.active for one in loads]
        self._fast_errors = [one.error_penalty for one in loads]
        self._slow_start = [one.slow_start_factor for one in loads]
        self._shares = [one.server.weighted_capacity for one in estimates]
        self._extra = [one.extra for one in estimates]
        self._penalties = [
            one.error_penalty_now(now) if one.error_penalty else 0.0 for one in estimates
        ]
        self._queued = [one.queued for one in estimates]
        self._footprints = [one.footprint for one in estimates]

    def parts(self, position: int) -> dict[str, float]:
        """The terms of one candidate."""
        asked, cache = self._asked, self._cache
        levels, bit = asked.levels, cache.estimates[position].bit
        credit = next((tokens for tokens, bits in levels if bits & bit), 0.0)
        best = levels[0][0] if levels else 0.0
        adapter = 0.0
        if credit:
            adapter = asked.swap * (bool(bit & asked.loaded) + bool(bit & asked.spare))
        extra, penalty = self._extra[position], self._penalties[position]
        return {
            "load": self._active[position] + extra,
            "recent_errors": penalty,
            "others": extra - penalty,
            "queued_tokens": self._queued[position],
            "cached_tokens": credit - adapter,
            "adapter_tokens": adapter,
            "waste_tokens": best - credit,
            "uncached_tokens": asked.uncached,
            **cache.prompt_terms(position, asked.uncached, asked.turns, asked.delay),
            "adapter_wait": WAIT_PENALTY if bit & asked.waits else 0.0,
            "kv_pressure": cache.pressure(position, asked.tokens, levels),
            "footprint_tokens": self._footprints[position],
            "kv_tokens": cache.kv_tokens[position],
            "home": AFFINITY_BONUS if bit == asked.bonus else 0.0,
            "slow": cache.slow[position],
            "fast_errors": self._fast_errors[position],
            "slow_start": self._slow_start[position],
            "share": self._shares[position],
        }


class ScoreTerms(Mapping[str, float]):
    """The terms of one candidate by name, computed with the first look."""

    __slots__ = ("_found", "_position", "_table")

    def __init__(self, table: ScoreTable, position: int) -> None:
        self._table = table
        self._position = position
        self._found: dict[str, float] | None = None

    @property
    def _terms(self) -> dict[str, float]:
        if self._found is None:
            self._found = self._table.parts(self._position)
        return self._found

    def __getitem__(self, name: str) -> float:
        return self._terms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._terms)

    def __len__(self) -> int:
        return len(self._terms)
