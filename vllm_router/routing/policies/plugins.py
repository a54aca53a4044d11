"""Policies of other distributions, by the entry points `vllm_router.policies`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from importlib.metadata import EntryPoint, entry_points

from vllm_router.errors import RouterError
from vllm_router.routing.policies.base import Policy

GROUP = "vllm_router.policies"


class BadPolicy(RouterError):
    """An installed distribution offers a policy that cannot be used."""


def load_policies(
    taken: Collection[str], found: Iterable[EntryPoint] | None = None
) -> list[type[Policy]]:
    """The policies of all installed distributions, by name. `taken` are the router's own names.

    Raises BadPolicy with the distribution and the reason; a router that silently lacks a policy
    would refuse a configuration for the wrong reason.
    """
    policies: dict[str, type[Policy]] = {}
    for entry in entry_points(group=GROUP) if found is None else found:
        source = (
            f"policy {entry.name} of {entry.dist.name if entry.dist is not None else 'a package'}"
        )
        try:
            policy = entry.load()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise BadPolicy(f"{source} cannot be imported from {entry.value}: {reason}") from error
        if not (isinstance(policy, type) and issubclass(policy, Policy)):
            raise BadPolicy(f"{source}: expected a subclass of Policy at {entry.value}")
        if policy.name != entry.name:
            raise BadPolicy(f"{source}: its name is {policy.name!r}; both names must be equal")
        if entry.name in taken or entry.name in policies:
            raise BadPolicy(f"{source}: another policy has this name")
        policies[entry.name] = policy
    return [policies[name] for name in sorted(policies)]
