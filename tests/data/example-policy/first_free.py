"""A policy that fills servers in the order of the configuration."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_router.fleet.server import Server
from vllm_router.routing.policies import Choice, Policy
from vllm_router.routing.prompt.routing_info import RoutingInfo


class FirstFree(Policy):
    """The first server that runs fewer requests than its capacity, else the least loaded one."""

    name = "first_free"

    def pick(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Choice:
        for server in candidates:
            if server.load < 1.0 and self.accepts(server):
                return server, None
        return min(candidates, key=lambda server: server.load_estimate.effective), None
