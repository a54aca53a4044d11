"""Short names for the shapes of ASGI 3."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

IDENTITY = "vllm_router.identity"
"""In the scope: the auth.Identity of whoever sent the request, if keys are in use."""

CANCEL_ON_DISCONNECT = "vllm_router.cancel_on_disconnect"
"""Extension by which a server says that it cancels the application when the client leaves."""
