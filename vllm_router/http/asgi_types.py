"""ASGI 3 types, and the ASGI extensions between the server and the proxy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

IDENTITY = "vllm_router.identity"
"""Scope key: the client's `Identity`, if API keys are in use."""

OWN_MACHINE = "vllm_router.runtime.own_machine"
"""Scope key: true for a request that arrived on the Unix socket of the router's own user."""

CANCEL_ON_DISCONNECT = "vllm_router.cancel_on_disconnect"
"""Extension: the server cancels the application when the client leaves."""

OUTLET = "vllm_router.outlet"
"""Extension: the server offers an `Outlet`."""

HEAD_MEMO = "vllm_router.head_memo"
"""Extension: a dictionary shared by all requests of a connection whose heads differ in
Content-Length alone. It caches values derived from the head."""


class Outlet(Protocol):
    """Receives and sends without waiting where possible; a cheaper `receive` and `send`."""

    def whole_body(self) -> bytes | None:
        """The request's body if all of it has arrived and none was received yet, else None."""
        ...

    def send_whole(self, start: Message, last: Message) -> bool:
        """Send a response whose body is one message.

        False if the client is slow or has left: then await `caught_up`.
        """
        ...

    def send_part(self, piece: bytes) -> bool:
        """Send a piece of a body that `send` has begun; more follows.

        False if the client is slow or has left: then await `caught_up`, or the next `send` waits.
        """
        ...

    async def caught_up(self) -> None:
        """Wait until all sent bytes have left. Raises OSError if the client has left."""
        ...
