"""The policies by name.

To add one, add a module with a subclass of `Policy` that has a `name`: it is found on import.
"""

from __future__ import annotations

import importlib
import pkgutil

from vllm_router.routing.policies.base import Choice, Explained, Policy, PolicySettings

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in sorted(Policy.__subclasses__(), key=lambda one: one.name)
}
POLICY_NAMES: tuple[str, ...] = tuple(POLICIES)

__all__ = ["POLICIES", "POLICY_NAMES", "Choice", "Explained", "Policy", "PolicySettings"]
