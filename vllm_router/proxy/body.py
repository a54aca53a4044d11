"""Reading request bodies, and the memory that all of them may take."""

from __future__ import annotations

from io import BytesIO

import trio

from vllm_router.errors import ClientGone, Refused
from vllm_router.http.asgi_types import Message, Receive

MIN_BODY_RATE = 500.0
"""Bytes per second that a request body must average once `body_timeout` has passed."""


class Bodies:
    """The bytes of all request bodies in memory, and their limit."""

    __slots__ = ("held", "limit")

    def __init__(self) -> None:
        self.held = 0
        self.limit = 0


class BodyShare:
    """The part of `Bodies` that one exchange holds.

    Bytes count when they arrive: a client that only announces a large body takes no memory from
    others. `size` is how many have arrived and are held.
    """

    __slots__ = ("_bodies", "size")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.size = 0

    def check(self, announced: int) -> None:
        """Raises Refused if a body of `announced` bytes would exceed the limit now."""
        bodies = self._bodies
        if bodies.held + announced > bodies.limit:
            raise Refused(
                503,
                "bodies_full",
                "The requests in the router's memory are at the limit (max_bodies_mb). "
                "Try again later.",
                retry_after=1.0,
            )

    def take(self, size: int) -> None:
        """Count `size` bytes that have arrived. Raises Refused beyond the limit."""
        bodies = self._bodies
        self.size += size
        bodies.held += size
        if bodies.held > bodies.limit:
            self.check(0)

    def give_back(self) -> None:
        """Release the memory. May be called more than once."""
        self._bodies.held -= self.size
        self.size = 0

    def take_whole(self, body: bytes, limit: int) -> None:
        """Count a body that has arrived in one piece. Raises Refused if it is too large."""
        size = len(body)
        if size > limit:
            raise body_too_large(limit)
        bodies = self._bodies
        self.size = size
        bodies.held += size
        if bodies.held > bodies.limit:
            self.check(0)


async def read_body(
    receive: Receive, limit: int, share: BodyShare, timeout: float | None = None
) -> bytes:
    """The whole body. Each message must come within `timeout` seconds, if there is a timeout.

    Raises Refused for a body that is too large or too slow, ClientGone.
    """
    began = trio.current_time() if timeout is not None else 0.0
    message = await (receive() if timeout is None else _receive_within(timeout, receive, began))
    body: bytes = message.get("body", b"")
    if not message.get("more_body", False):
        share.take_whole(body, limit)
        return body
    # BytesIO hands out its buffer without a copy, unlike a list of parts that is joined.
    whole, total = BytesIO(), len(body)
    share.take(total)
    whole.write(body)
    while message.get("more_body", False):
        due = began + total / MIN_BODY_RATE
        message = await (receive() if timeout is None else _receive_within(timeout, receive, due))
        part = message.get("body", b"")
        total += len(part)
        share.take(len(part))
        if total > limit:
            raise body_too_large(limit)
        whole.write(part)
    return whole.getvalue()


async def _receive_within(timeout: float, receive: Receive, due: float) -> Message:
    """One message of the body. `due` is when the bytes so far are due at MIN_BODY_RATE.

    Raises Refused, or ClientGone.
    """
    with trio.move_on_at(min(due, trio.current_time()) + timeout):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message
    raise Refused(408, "body_timeout", "The request body did not arrive in time.")


def body_too_large(limit: int) -> Refused:
    return Refused(413, "body_too_large", f"The request body is larger than {limit} bytes.")
