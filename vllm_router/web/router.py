"""The router as the control plane uses it; the supervisor implements the protocol."""

from __future__ import annotations

from typing import Protocol

from vllm_router.observability.router_state import RouterState
from vllm_router.web.guard import Guard
from vllm_router.web.sessions import Sessions


class Router(RouterState, Protocol):
    """The router's state, and the parts that admit requests to the control plane."""

    guard: Guard
    sessions: Sessions
