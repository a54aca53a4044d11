"""How policies compare: relative to the best policy of each cell, with confidence over the seeds.

A cell is a workload at a load. Compared are three measures: the p99 time to first token plus 0.1 s,
the p99 time per token, and the share of responses that are not good plus 1 %. Differences below
these offsets are not noticeable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vllm_router.lab.simulate.report import Cell, Figures

FIRST_TOKEN_OFFSET = 0.1
"""Seconds."""

BAD_OFFSET = 0.01

MEASURES: dict[str, Callable[[Figures], float]] = {
    "p99 TTFT": lambda figures: FIRST_TOKEN_OFFSET + figures.first_p99,
    "TPOT p99": lambda figures: max(figures.token_p99, 1e-4),
    "not good": lambda figures: BAD_OFFSET + 1 - figures.goodput,
}

ORACLE = "oracle"
"""The policy that is not in the competition."""

_T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t for 95 % of both sides, by degrees of freedom from 1; 2 for more."""

Place = tuple[str, float]
Runs = dict[Place, dict[str, dict[int, Figures]]]
"""Figures by cell, policy and seed."""


class Ratio(NamedTuple):
    """A geometric mean of ratios with its 95 % confidence interval; no interval for one seed."""

    mean: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} ({self.low:.3g}–{self.high:.3g})"


class Standing(NamedTuple):
    """A policy over all cells, relative to the best policy of each: 1 is the best possible.

    overall: geometric mean of all measures.
    by_measure: geometric mean of each, and `worst` its worst cell.
    to_oracle: relative to the oracle, all measures; None without it.
    """

    policy: str
    overall: Ratio
    by_measure: dict[str, float]
    worst: dict[str, tuple[float, str]]
    first_p50: float
    to_oracle: float | None
    hit_rate: float


class Loss(NamedTuple):
    """A cell in which a policy is behind the best one in a measure; both values as measured."""

    workload: str
    load: float
    measure: str
    value: float
    best: float
    winner: str
    ratio: Ratio


def standings(cells: Sequence[Cell]) -> list[Standing]:
    """One per policy, the best first."""
    runs = by_place(cells)
    policies = list(dict.fromkeys(cell.policy for cell in cells))
    found = [_standing(policy, runs) for policy in policies]
    return sorted(found, key=lambda standing: standing.overall.mean)


def losses(cells: Sequence[Cell], policy: str, above: float = 1.05) -> list[Loss]:
    """The cells where the policy is behind by more than this factor, the worst first."""
    found = []
    for (workload, load), policies in by_place(cells).items():
        if policy not in policies:
            continue
        for name, measure in MEASURES.items():
            winner = _best(policies, measure)
            mine, best = policies[policy], policies[winner]
            ratio = interval(
                [math.log(measure(mine[s]) / measure(best[s])) for s in mine if s in best]
            )
            if ratio.mean > above:
                pooled = (_pooled(measure, mine), _pooled(measure, best))
                found.append(Loss(workload, load, name, *pooled, winner, ratio))
    return sorted(found, key=lambda loss: -loss.ratio.mean)


def by_place(cells: Sequence[Cell]) -> Runs:
    runs: Runs = {}
    for cell in cells:
        policies = runs.setdefault((cell.workload, cell.load), {})
        policies.setdefault(cell.policy, {})[cell.seed] = cell.figures
    return runs


def interval(logs: Sequence[float]) -> Ratio:
    """The mean of logarithms of ratios, one per seed, as a ratio."""
    count = len(logs)
    mean = sum(logs) / count
    if count < 2:
        return Ratio(math.exp(mean))
    half = margin(logs)
    assert half is not None
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def margin(values: Sequence[float]) -> float | None:
    """Half of the 95 % confidence interval of the mean; None for one value."""
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    deviation = math.sqrt(sum((one - mean) ** 2 for one in values) / (count - 1))
    t = _T_95[count - 2] if count - 2 < len(_T_95) else 2.0
    return t * deviation / math.sqrt(count)


def _standing(policy: str, runs: Runs) -> Standing:
    logs: dict[str, list[float]] = {name: [] for name in MEASURES}
    by_seed: dict[int, list[float]] = {}
    worst: dict[str, tuple[float, str]] = dict.fromkeys(MEASURES, (0.0, ""))
    medians, to_oracle, rates = [], [], []
    for (workload, load), policies in runs.items():
        mine = policies.get(policy)
        if mine is None:
            continue
        for name, measure in MEASURES.items():
            best = _pooled(measure, policies[_best(policies, measure)])
            ratio = _pooled(measure, mine) / best
            logs[name].append(math.log(ratio))
            worst[name] = max(worst[name], (ratio, f"{workload} {load:.0%}" if load else workload))
            for seed, figures in mine.items():
                by_seed.setdefault(seed, []).append(math.log(measure(figures) / best))
            if ORACLE in policies:
                known = _pooled(measure, policies[ORACLE])
                to_oracle.append(math.log(_pooled(measure, mine) / known))
        fastest = min(_pooled(_median, them) for them in policies.values())
        medians.append(math.log(_pooled(_median, mine) / fastest))
        rates.append(sum(figures.hit_rate for figures in mine.values()) / len(mine))
    return Standing(
        policy,
        interval([_mean(found) for found in by_seed.values()]),
        {name: math.exp(_mean(found)) for name, found in logs.items()},
        worst,
        math.exp(_mean(medians)),
        math.exp(_mean(to_oracle)) if to_oracle else None,
        _mean(rates),
    )


def _best(
    policies: Mapping[str, Mapping[int, Figures]], measure: Callable[[Figures], float]
) -> str:
    """The best policy of a cell; the oracle only if there is no other."""
    others = [name for name in policies if name != ORACLE] or list(policies)
    return min(others, key=lambda name: _pooled(measure, policies[name]))


def _pooled(measure: Callable[[Figures], float], runs: Mapping[int, Figures]) -> float:
    """Geometric mean over the seeds."""
    return math.exp(_mean([math.log(measure(figures)) for figures in runs.values()]))


def _median(figures: Figures) -> float:
    return FIRST_TOKEN_OFFSET + figures.first_p50


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
