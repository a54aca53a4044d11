"""The less loaded of two random candidates (Mitzenmacher 2001)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_router.routing.policies.base import Choice, Policy

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.prompt.routing_info import RoutingInfo


class PowerOfTwo(Policy):
    """Avoids herding even with stale loads: for many routers before the same servers."""

    name = "power_of_two"

    def pick(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Choice:
        if len(candidates) == 1:
            return candidates[0], None
        one, other = self.rng.sample(candidates, 2)
        return (
            one if one.load_estimate.effective <= other.load_estimate.effective else other
        ), None
