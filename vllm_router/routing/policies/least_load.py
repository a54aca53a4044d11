"""The lowest load wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_router.routing.policies.base import Choice, Explained, Policy

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.prompt.routing_info import RoutingInfo


class LeastLoad(Policy):
    """The lowest `(running + 0.5 waiting) / capacity`, corrected by our own leases.

    The ancestor's rule without its random choice below a load of 0.5: the lowest load wins, ties
    at random. In slow start a server's capacity is scaled down.
    """

    name = "least_load"

    def pick(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Choice:
        lowest = float("inf")
        best: list[Server] = []
        for server in candidates:
            load = server.load_estimate.effective
            if load < lowest:
                lowest = load
                best = [server]
            elif load == lowest:
                best.append(server)
        return (best[0] if len(best) == 1 else self.rng.choice(best)), None

    def formula(self) -> str:
        return (
            "score = (1 + running + 0.5 × waiting + fast errors) / (share × slow start) - 1 / share"
        )

    def explain(
        self, candidates: Sequence[Server], info: RoutingInfo, now: float
    ) -> list[Explained]:
        return [
            Explained(
                server,
                server.load_estimate.effective,
                {
                    "running": server.running,
                    "waiting": server.waiting,
                    "fast_errors": server.load_estimate.error_penalty,
                    "slow_start": server.load_estimate.slow_start_factor,
                    "share": server.weighted_capacity,
                },
            )
            for server in sorted(candidates, key=lambda one: one.load_estimate.effective)
        ]
