"""The policies in force: one for all, others for some models, and those that requests ask for."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING

from vllm_router.routing.policies import POLICIES, Knobs, Policy

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server


class PolicySet:
    """Policies by name, each made when it is first wanted, and kept with what it has learnt.

    `by_model` has the models that do not use `default`. `on_request` allows any policy by the
    header `X-Router-Policy`; which facts are read is then up to the most demanding of all.
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
        self._knobs = knobs
        self._made: dict[str, Policy] = {}
        self._on_request = on_request
        self.default = self.named(default)
        self._by_model = {model: self.named(name) for model, name in by_model.items()}
        used = [POLICIES[name] for name in POLICIES] if on_request else [
            type(policy) for policy in self._made.values()
        ]  # fmt: skip
        self.needs_prompt = any(policy.needs_prompt for policy in used)
        self.needs_session = any(policy.needs_session for policy in used)

    def named(self, name: str) -> Policy:
        policy = self._made.get(name)
        if policy is None:
            policy = self._made[name] = POLICIES[name](self._rng, self._knobs)
        return policy

    def choose(self, model: str | None, wanted: bytes = b"") -> Policy:
        """The policy for a request; `wanted` is its `X-Router-Policy`, which counts if allowed."""
        if wanted and self._on_request:
            name = wanted.decode("latin-1")
            if name in POLICIES:
                return self.named(name)
        if model is None:
            return self.default
        return self._by_model.get(model, self.default)

    def forget(self, server: Server) -> None:
        """The server has left the fleet."""
        for policy in self._made.values():
            policy.forget(server)
