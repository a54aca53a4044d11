"""Policies that ignore load, as references."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from vllm_router.routing.policies.base import Choice, Policy, PolicySettings

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.prompt.routing_info import RoutingInfo

MAX_MODELS = 256
"""Models whose turn is remembered: clients may name any on a server whose list is not known."""


class RoundRobin(Policy):
    """Each server of a model in turn, whatever its load: a reference, not a recommendation.

    Every model has its turn: with a common one, two models that are asked for alternately would
    each use every other server.
    """

    name = "round_robin"

    def __init__(self, rng: Random, settings: PolicySettings = PolicySettings()) -> None:  # noqa: B008 (frozen)
        super().__init__(rng, settings)
        self._turns: dict[str | None, int] = {}

    def __copy__(self) -> RoundRobin:
        one = RoundRobin(self.rng, self.settings)
        one._turns = dict(self._turns)
        return one

    def pick(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Choice:
        server, turn = candidates[0], self._turns.get(info.model, 0)
        for _ in candidates:
            turn += 1
            server = candidates[turn % len(candidates)]
            if self.accepts(server):
                break
        if len(self._turns) >= MAX_MODELS:
            self._turns.clear()
        self._turns[info.model] = turn
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
