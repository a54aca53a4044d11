"""The active policies: a default, one per model, and the policies that requests select."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING

from vllm_router.routing.adapters import summed_requests
from vllm_router.routing.policies import POLICIES, Policy, PolicySettings
from vllm_router.routing.policies.base import Placements
from vllm_router.routing.server_estimate import PrefixStatistics

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server


class PolicySet:
    """Policies by name, created on first use and kept with their state.

    `by_model` maps public model names to policies other than `default`. `on_request` is whether a
    request may select a policy. `needs_prompt` and `needs_session` are True if any of the default
    policies needs them.
    """

    def __init__(
        self,
        rng: Random,
        default: str,
        by_model: Mapping[str, str],
        settings: PolicySettings,
        *,
        on_request: bool = False,
    ) -> None:
        self._rng = rng
        self._policies: dict[str, Policy] = {}
        self._settings = settings
        self._placements: Placements | None = None
        self._hears_routers = False
        self.apply(default, by_model, settings, on_request=on_request)

    def apply(
        self,
        default: str,
        by_model: Mapping[str, str],
        settings: PolicySettings,
        *,
        on_request: bool,
    ) -> None:
        """Apply a configuration. Changed settings replace all policies, which lose their state."""
        if settings != self._settings:
            self._settings = settings
            self._policies = {}
        self.on_request = on_request
        self.default = self.named(default)
        self._by_model = {model: self.named(name) for model, name in by_model.items()}
        used = {self.default, *self._by_model.values()}
        if not on_request:
            # An unused policy sees no events; its state would be outdated when it is used again.
            self._policies = {policy.name: policy for policy in used}
        self.needs_prompt = any(policy.needs_prompt for policy in used)
        self.needs_session = any(policy.needs_session for policy in used)

    def named(self, name: str) -> Policy:
        """The policy of this name, which must exist."""
        policy = self._policies.get(name)
        if policy is None:
            policy = self._policies[name] = POLICIES[name](self._rng, self._settings)
            policy.placements = self._placements
            policy.hear_routers(self._hears_routers)
        return policy

    def for_model(self, public: str | None) -> Policy:
        """The policy of requests for this model that do not select another."""
        if public is None:
            return self.default
        return self._by_model.get(public, self.default)

    def forget(self, server: Server) -> None:
        """The server has left the fleet."""
        for policy in self._policies.values():
            policy.forget(server)

    # -- other processes before the same servers ----------------------------------------------

    def tell(self, placements: Placements) -> None:
        """Tell of all prompts that are placed from now on."""
        self._placements = placements
        for policy in self._policies.values():
            policy.placements = placements

    def placed_elsewhere(self, server: Server, hashes: Sequence[int], now: float) -> None:
        """See `Policy.placed_elsewhere`; so for the other methods of this section."""
        for policy in self._policies.values():
            policy.placed_elsewhere(server, hashes, now)

    def hear_routers(self, hears: bool) -> None:
        self._hears_routers = hears
        for policy in self._policies.values():
            policy.hear_routers(hears)

    def withdrawn_elsewhere(self, server: Server, hashes: Sequence[int]) -> None:
        for policy in self._policies.values():
            policy.withdrawn_elsewhere(server, hashes)

    def blocks(self, most: int) -> Iterator[tuple[Server, Sequence[int]]]:
        for policy in self._policies.values():
            yield from policy.blocks(most)

    def queued_elsewhere(self, server: Server, tokens: float) -> None:
        for policy in self._policies.values():
            policy.queued_elsewhere(server, tokens)

    def queued_tokens(self) -> dict[Server, float]:
        total: dict[Server, float] = {}
        for policy in self._policies.values():
            for server, tokens in policy.queued_tokens().items():
                total[server] = total.get(server, 0.0) + tokens
        return total

    def adapters_elsewhere(self, server: Server, requests: Mapping[str, int]) -> None:
        for policy in self._policies.values():
            policy.adapters_elsewhere(server, requests)

    def adapter_requests(self) -> dict[Server, dict[str, int]]:
        total: dict[Server, dict[str, int]] = {}
        for policy in self._policies.values():
            for server, requests in policy.adapter_requests().items():
                total[server] = summed_requests(total.get(server, {}), requests)
        return total

    # -- for operators ------------------------------------------------------------------------

    def statistics(self, server: Server) -> PrefixStatistics | None:
        """The sum over all policies that look at prompts; None without any."""
        found = [policy.statistics(server) for policy in self._policies.values()]
        known = [one for one in found if one is not None]
        if len(known) < 2:
            return known[0] if known else None
        return PrefixStatistics(*map(sum, zip(*known, strict=True)))

    def __iter__(self) -> Iterator[Policy]:
        """The policies created so far."""
        return iter(self._policies.values())
