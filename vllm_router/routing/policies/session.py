"""Sessions keep their server while its load is near the mean."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from vllm_router.routing.hashing import preference, preferred, seed_of
from vllm_router.routing.policies.base import Choice, Policy, PolicySettings
from vllm_router.routing.policies.least_load import LeastLoad

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.prompt.routing_info import RoutingInfo

BOUND = 1.25
"""A server takes a session only while its load stays below BOUND times the mean."""


class Session(Policy):
    """Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018).

    The session is the client's session id, else the conversation's first turn. All routers agree
    on a session's affinity server without shared state. If its load is above BOUND times the mean,
    the next server in the session's order takes the request. Requests with neither, short ones,
    go to the lowest load: they are no session that would have one server.
    """

    name = "session"
    needs_prompt = True
    needs_session = True

    def __init__(self, rng: Random, settings: PolicySettings = PolicySettings()) -> None:  # noqa: B008 (frozen)
        super().__init__(rng, settings)
        self._least_load = LeastLoad(rng, settings)

    def pick(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Choice:
        session = info.session
        key = seed_of(session) if session is not None else info.prompt.conversation
        if not key:
            return self._least_load.pick(candidates, info, now)
        total = sum(server.load_estimate.active for server in candidates)
        limit = BOUND * (total + 1) / sum(server.weighted_capacity for server in candidates)
        affinity = preferred(key, candidates)
        if _fits(affinity, limit):
            return affinity, None
        for server in preference(key, candidates):
            if _fits(server, limit):
                return server, None
        return min(candidates, key=lambda server: server.load_estimate.effective), None


def _fits(server: Server, limit: float) -> bool:
    """Whether one more request stays within the limit; a first request always does."""
    one = 1 / server.weighted_capacity
    return server.load_estimate.effective + one <= max(limit, one)
