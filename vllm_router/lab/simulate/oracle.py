"""A policy that knows everything: true queues, caches, speeds, adapters and lengths of answers.

No router can know that. Its distance to `adaptive` is what better information could bring: the rule
is the same, so a policy with another rule may still be better in a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_router.routing.policies.base import Choice, Policy

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.lab.simulate.engine import Engine, Job
    from vllm_router.lab.simulate.world import World
    from vllm_router.routing.prompt.routing_info import RoutingInfo

QUEUED_WEIGHT = 2.0
GROWTH_LOAD = 32.0
"""Requests up to which a load makes recomputing dearer."""

CONTEXT_LIMIT, CONTEXT_PENALTY = 0.85, 20.0
"""Share of a server's room for context above which it is dear, and the requests that a full one
counts as much as."""


class Oracle(Policy):
    """The rule of `adaptive` with true figures; for the simulator only, see `watch`."""

    name = "oracle"
    _world: World

    def watch(self, world: World) -> None:
        """The world whose engines it sees. Called once, before the first request."""
        self._world = world
        for engine in world.engines:
            engine.announced = {}

    def pick(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Choice:
        world = self._world
        job = world.choosing
        assert job is not None
        places = world.places
        engines = [world.engines[places[server.name]] for server in candidates]
        uncached = [job.prompt_tokens - engine.cached_for(job) for engine in engines]
        least = min(uncached)
        scores = [
            self._score(engine, job, tokens, tokens - least)
            for engine, tokens in zip(engines, uncached, strict=True)
        ]
        best = min(scores)
        chosen = self.rng.choice([n for n, score in enumerate(scores) if score == best])
        job.left = uncached[chosen]
        return candidates[chosen], None

    def _score(self, engine: Engine, job: Job, uncached: int, waste: float) -> float:
        settings, hardware = self.settings, engine.hardware
        load = engine.overlap(job.output_tokens)
        if not engine.adapters.holds(job.adapter):
            waste += hardware.adapter_swap / hardware.per_prompt_token
        growth = 1.0 + settings.waste_growth * min(load, GROWTH_LOAD)
        tokens = QUEUED_WEIGHT * engine.tokens_to_compute() + waste * growth
        context = (engine.context_tokens() + uncached + job.output_tokens) / hardware.kv_tokens
        pressure = max(0.0, context - CONTEXT_LIMIT) / (1.0 - CONTEXT_LIMIT)
        requests = 1.0 + load + tokens / settings.tokens_per_request + CONTEXT_PENALTY * pressure
        return requests * hardware.per_prompt_token
