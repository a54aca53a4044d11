"""The results of a run: the latencies and shares that users notice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_router.lab.simulate.world import Call, World

GOOD_FIRST_TOKEN = 1.0
GOOD_TOKEN_TIME = 0.05
"""Seconds per token; slower responses do not count as goodput."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds and shares. `token_time` is the mean between the tokens of one answer; `balance`
    the busiest server's busy time over the mean; `shares` which part of the requests was sent to
    each server, in vain or not: from a second after servers begin to fail, where some do.
    `good_per_second` counts good responses that ended between the warm-up and the last request,
    also to requests from before it.
    """

    requests: int
    failed: int
    first_p50: float
    first_p99: float
    token_p50: float
    token_p99: float
    goodput: float
    hit_rate: float
    balance: float
    preemptions: int
    shares: tuple[float, ...]
    good_per_second: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {key: _rounded(value) for key, value in asdict(self).items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def figures(world: World) -> Figures:
    """Over the requests that arrived after the warm-up. What is still unanswered counts with the
    time it has waited.
    """
    calls = [call for call in world.calls if call.arrived >= world.scene.warm_up]
    firsts = sorted(min(call.first_at, world.now) - call.arrived for call in calls)
    times = sorted(map(_token_time, (call for call in calls if call.ended_at < math.inf)))
    good = sum(map(_is_good, calls))
    scene = world.scene
    ended_in_time = [call for call in world.calls if scene.warm_up <= call.ended_at < scene.seconds]
    busy = [engine.busy for engine in world.engines]
    asked = sum(call.prompt_tokens for call in calls)
    return Figures(
        len(calls),
        sum(call.failed for call in calls),
        percentile(firsts, 0.5),
        percentile(firsts, 0.99),
        percentile(times, 0.5),
        percentile(times, 0.99),
        good / len(calls) if calls else 0.0,
        sum(call.cached for call in calls) / asked if asked else 0.0,
        max(busy) * len(busy) / sum(busy) if any(busy) else 1.0,
        sum(engine.preemptions for engine in world.engines),
        _shares(world, calls),
        sum(map(_is_good, ended_in_time)) / (scene.seconds - scene.warm_up),
    )


def _is_good(call: Call) -> bool:
    return (
        call.first_at - call.arrived <= GOOD_FIRST_TOKEN
        and call.ended_at < math.inf
        and _token_time(call) <= GOOD_TOKEN_TIME
    )


def _shares(world: World, calls: Sequence[Call]) -> tuple[float, ...]:
    scene = world.scene
    since = scene.failing_from + 1.0 if scene.failing else 0.0
    counted = [call for call in calls if call.arrived >= since]
    sent = [0] * len(scene.speeds)
    for call in counted:
        for place in {call.server, *(call.router.place[server] for server in call.tried)}:
            sent[place] += 1
    return tuple(count / max(1, len(counted)) for count in sent)


def _token_time(call: Call) -> float:
    if call.failed:
        return 0.0
    return (call.ended_at - call.first_at) / max(1, call.output_tokens - 1)


def percentile(ordered: Sequence[float], share: float) -> float:
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: what was tried, and what came out."""

    workload: str
    load: float
    seed: int
    policy: str
    figures: Figures
