"""The policies in force: one for all, others for some models, and those that requests ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import TYPE_CHECKING

from vllm_router.routing.accounts import PrefixStatistics
from vllm_router.routing.policies import POLICIES, Knobs, Policy

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server


class PolicySet:
    """Policies by name, each made when it is first wanted, and kept with what it has learnt.

    `by_model` has the models, by public name, that do not use `default`. `on_request` says whether
    a request may name another one. `needs_prompt` and `needs_session` are those of the most
    demanding of the policies that requests get without asking.
    """

    def __init__(
        self,
        rng: Random,
        default: str,
        by_model: Mapping[str, str],
        knobs: Knobs,
        *,
        on_request: bool = False,
    ) -> None:
        self._rng = rng
        self._made: dict[str, Policy] = {}
        self._knobs = knobs
        self.apply(default, by_model, knobs, on_request=on_request)

    def apply(
        self, default: str, by_model: Mapping[str, str], knobs: Knobs, *, on_request: bool
    ) -> None:
        """Follow the configuration. Other knobs make new policies, which know nothing yet."""
        if knobs != self._knobs:
            self._knobs = knobs
            self._made = {}
        self.on_request = on_request
        self.default = self.named(default)
        self._by_model = {model: self.named(name) for model, name in by_model.items()}
        used = {self.default, *self._by_model.values()}
        if not on_request:
            # What is not in use learns nothing, and would be out of date when it is used again.
            self._made = {policy.name: policy for policy in used}
        self.needs_prompt = any(policy.needs_prompt for policy in used)
        self.needs_session = any(policy.needs_session for policy in used)

    def named(self, name: str) -> Policy:
        """The policy of that name, which must be one."""
        policy = self._made.get(name)
        if policy is None:
            policy = self._made[name] = POLICIES[name](self._rng, self._knobs)
        return policy

    def for_model(self, public: str | None) -> Policy:
        """The policy of requests for this model that do not name another one."""
        if public is None:
            return self.default
        return self._by_model.get(public, self.default)

    def forget(self, server: Server) -> None:
        """The server has left the fleet."""
        for policy in self._made.values():
            policy.forget(server)

    def statistics(self, server: Server) -> PrefixStatistics | None:
        """Of all policies that look at prompts together; None if there is none."""
        found = [policy.statistics(server) for policy in self._made.values()]
        known = [one for one in found if one is not None]
        return PrefixStatistics(*map(sum, zip(*known, strict=True))) if known else None

    def __iter__(self) -> Iterator[Policy]:
        """Those that have been made."""
        return iter(self._made.values())
