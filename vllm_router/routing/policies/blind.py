"""The references: policies that look at nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_router.routing.policies.base import Policy

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.prompt.facts import Facts


class RoundRobin(Policy):
    """Each in turn, whatever its load: a reference, not a recommendation."""

    name = "round_robin"

    _turn = 0

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        server = candidates[0]
        for _ in candidates:
            self._turn += 1
            server = candidates[self._turn % len(candidates)]
            if self.takes(server):
                break
        return server


class RandomChoice(Policy):
    """Any of them: the other reference."""

    name = "random"

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        server = self.rng.choice(candidates)
        for _ in candidates:
            if self.takes(server):
                break
            server = self.rng.choice(candidates)
        return server
