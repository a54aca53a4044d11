"""What routers of a simulation tell each other, with the messages and the code of the product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from vllm_router.fleet.fleet import Fleet
from vllm_router.routing.policies.base import Policy
from vllm_router.routing.policy_set import PolicySet
from vllm_router.routing.sharing.messages import About, ServerLevel
from vllm_router.routing.sharing.outbox import Outbox
from vllm_router.routing.sharing.peers import Peers

_ABOUT = About("", "", "", 0.0, 0)


class Router(Protocol):
    """A simulated router."""

    fleet: Fleet
    policy: Policy


class Sharing:
    """Every router announces its prompts, and with `queued` its uncached tokens under way."""

    def __init__(self, routers: Sequence[Router], *, queued: bool) -> None:
        self._routers = routers
        self._queued = queued
        self._outboxes = [Outbox(f"router-{number}") for number in range(len(routers))]
        self._peers = [
            # A policy has the methods of a set of policies that peers call.
            Peers(outbox.router, cast("PolicySet", router.policy), router.fleet.by_url)
            for router, outbox in zip(routers, self._outboxes, strict=True)
        ]
        for router, outbox in zip(routers, self._outboxes, strict=True):
            router.policy.placements = outbox

    def publish(self, number: int, now: float) -> None:
        """The batch of one router reaches all others."""
        levels = {}
        if self._queued:
            policy = self._routers[number].policy
            tokens, adapters = policy.queued_tokens(), policy.adapter_requests()
            levels = {
                server.url: ServerLevel(tokens.get(server, 0), 0, dict(adapters.get(server, {})))
                for server in {**tokens, **adapters}
            }
        batch = self._outboxes[number].batch(_ABOUT, levels, {}, now)
        for peers in self._peers:
            peers.hear(batch, now)
            peers.settle(now)
