"""The client's side of one exchange, however the client is connected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from vllm_router.http.asgi_types import Message, Outlet, Receive, Send

BODY = "http.response.body"
LAST: dict[str, Any] = {"type": BODY, "body": b"", "more_body": False}

EARLY_STREAM, EARLY_JSON = b"stream", b"json"
"""Kinds of responses whose head the client may get before the response is proven."""

FinalMessages = tuple[Message | None, Message]
"""The messages that end a response: its head, unless that was sent before, and its last."""


class Downstream(Protocol):
    """The client of one exchange.

    A response is `respond`, any number of `write`, and `finish`; or `finish` alone, with the head.

    `whole_body` returns the request body if all of it has arrived and none was received, else None.
    `early` is the kind of a response whose head was sent before any server had proven one.
    `blocked` is true while a write waits for the client; it stays true if that was cancelled.
    `write_now` sends a piece after the first one without a wait. It returns False if the client
    does not keep up: call `drain` then. None where every write may have to wait.
    """

    early: bytes | None
    blocked: bool
    receive: Receive

    @property
    def whole_body(self) -> Callable[[], bytes | None]: ...

    @property
    def write_now(self) -> Callable[[bytes], bool] | None: ...

    async def respond(self, start: Message) -> None:
        """Send the head."""
        ...

    async def write(self, piece: bytes) -> None:
        """Send a piece of the body, and wait until the client takes more."""
        ...

    async def drain(self) -> None:
        """Wait until the client has taken everything."""
        ...

    async def finish(self, messages: FinalMessages) -> None:
        """End the response."""
        ...


def _not_here() -> None:
    """An ASGI server does not say whether a body has arrived."""


class AsgiDownstream:
    """A client behind any ASGI server."""

    __slots__ = ("_send", "blocked", "early", "receive")

    whole_body: Callable[[], bytes | None] = staticmethod(_not_here)
    write_now: Callable[[bytes], bool] | None = None

    def __init__(self, receive: Receive, send: Send) -> None:
        self.receive = receive
        self._send = send
        self.early: bytes | None = None
        self.blocked = False

    async def respond(self, start: Message) -> None:
        self.blocked = True
        await self._send(start)
        self.blocked = False

    async def write(self, piece: bytes) -> None:
        self.blocked = True
        await self._send({"type": BODY, "body": piece, "more_body": True})
        self.blocked = False

    async def drain(self) -> None:
        """Every `write` has waited."""

    async def finish(self, messages: FinalMessages) -> None:
        start, last = messages
        if start is not None:
            await self._send(start)
        await self._send(last)


class DirectDownstream(AsgiDownstream):
    """A client of the router's own HTTP server, which offers an Outlet beside the ASGI calls."""

    __slots__ = ("_outlet", "whole_body", "write_now")

    def __init__(self, receive: Receive, send: Send, outlet: Outlet) -> None:
        self.receive = receive
        self._send = send
        self._outlet = outlet
        self.early = None
        self.blocked = False
        self.whole_body = outlet.whole_body
        self.write_now = outlet.send_part

    async def drain(self) -> None:
        self.blocked = True
        await self._outlet.caught_up()
        self.blocked = False

    async def finish(self, messages: FinalMessages) -> None:
        start, last = messages
        if start is None:
            await self._send(last)
        elif not self._outlet.send_whole(start, last):
            await self._outlet.caught_up()
