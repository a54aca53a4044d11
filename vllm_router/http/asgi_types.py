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

OWN_MACHINE = "vllm_router.runtime.own_machine"
"""In the scope, and true, of a request that came in by the Unix socket of the router's own user."""

CANCEL_ON_DISCONNECT = "vllm_router.cancel_on_disconnect"
"""Extension by which a server says that it cancels the application when the client leaves."""

OUTLET = "vllm_router.outlet"
"""Extension by which a server offers an Outlet."""


HEAD_MEMO = "vllm_router.head_memo"
"""Extension by which a server offers a dictionary that is the same for all requests of a connection
whose heads are the same but for Content-Length: for what follows from the head alone."""


class Outlet(Protocol):
    """Ways to receive and send without a wait, where there is none."""

    def whole_body(self) -> bytes | None:
        """The request's body if all of it has come and none of it has been received, else None."""
        ...

    def send_whole(self, start: Message, last: Message) -> bool:
        """Send an answer that is but its head and one message with all of the body.

        False if the client does not keep up, or has left: `caught_up` waits for it then.
        """
        ...

    def send_part(self, piece: bytes) -> bool:
        """Send a piece of the answer's body that is not the last, after `send` has begun it.

        False if the client does not keep up, or has left: then the next `send` waits for it.
        """
        ...

    async def caught_up(self) -> None:
        """Wait until the client has taken everything. Raises OSError if it has left."""
        ...
