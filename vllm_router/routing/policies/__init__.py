"""The policies by name.

To add one here, add a module with a subclass of `Policy` that has a `name`: it is found on import.
Other distributions offer policies as entry points, see `plugins.py`.
"""

from __future__ import annotations

import importlib
import pkgutil

from vllm_router.routing.policies.base import Choice, Explained, Policy, PolicySettings
from vllm_router.routing.policies.plugins import BadPolicy, load_policies

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

_own = sorted(Policy.__subclasses__(), key=lambda policy: policy.name)

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (*_own, *load_policies([policy.name for policy in _own]))
}
POLICY_NAMES: tuple[str, ...] = tuple(POLICIES)

__all__ = [
    "POLICIES",
    "POLICY_NAMES",
    "BadPolicy",
    "Choice",
    "Explained",
    "Policy",
    "PolicySettings",
]
