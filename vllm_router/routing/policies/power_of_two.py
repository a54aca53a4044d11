"""Two candidates at random, the less loaded of them (Mitzenmacher 2001)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_router.routing.policies.base import Policy

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.prompt.facts import Facts


class PowerOfTwo(Policy):
    """Never herds, however stale the load is: for many routers before the same servers."""

    name = "power_of_two"

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        if len(candidates) == 1:
            return candidates[0]
        one, other = self.rng.sample(candidates, 2)
        return one if one.burden <= other.burden else other
