"""Short names for the shapes of ASGI 3."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

IDENTITY = "vllm_router.identity"
"""In the scope: the auth.Identity of whoever sent the request, if keys are in use."""

CANCEL_ON_DISCONNECT = "vllm_router.cancel_on_disconnect"
"""Extension by which a server says that it cancels the application when the client leaves."""

OUTLET = "vllm_router.outlet"
"""Extension by which a server offers an Outlet for the answer's body."""


HEAD_MEMO = "vllm_router.head_memo"
"""Extension by which a server offers a dictionary that is the same for all requests of a connection
whose heads are the same but for Content-Length: for what follows from the head alone."""


class Outlet(Protocol):
    """A way to send pieces of a body without a task: cheaper than `send` for many small ones."""

    def send_part(self, piece: bytes) -> bool:
        """Send a piece that is not the last, after `send` has begun the body.

        False if the client does not keep up, or has left: then the next `send` waits for it.
        """
        ...

    async def caught_up(self) -> None:
        """Wait until the client has taken everything. Raises OSError if it has left."""
        ...
