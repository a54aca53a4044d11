"""Policies that ignore load, as references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_router.routing.policies.base import Choice, Policy

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.prompt.routing_info import RoutingInfo


class RoundRobin(Policy):
    """Each server in turn, whatever its load: a reference, not a recommendation."""

    name = "round_robin"

    _turn = 0

    def pick(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Choice:
        server = candidates[0]
        for _ in candidates:
            self._turn += 1
            server = candidates[self._turn % len(candidates)]
            if self.accepts(server):
                break
        return server, None


class RandomChoice(Policy):
    """A random server: the other reference."""

    name = "random"

    def pick(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Choice:
        server = self.rng.choice(candidates)
        for _ in candidates:
            if self.accepts(server):
                break
            server = self.rng.choice(candidates)
        return server, None
