"""The policies, by the names that the configuration uses.

To add one, put a module here with a subclass of `Policy` in it that has a `name`.
"""

from __future__ import annotations

import importlib
import pkgutil

from vllm_router.routing.policies.base import Explained, Knobs, Policy

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in sorted(Policy.__subclasses__(), key=lambda one: one.name)
}
POLICY_NAMES: tuple[str, ...] = tuple(POLICIES)

__all__ = ["POLICIES", "POLICY_NAMES", "Explained", "Knobs", "Policy"]
