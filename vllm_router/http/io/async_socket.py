"""`AsyncSocket`: the interface of a connected socket on the data path."""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

READ_SIZE = 65536
"""Bytes of one read."""

BUFFERED_WRITE_SIZE = 16384
"""Bytes of the largest write that may be buffered; a larger one is sent at once, without a copy."""


class Interrupted(Exception):
    """A read was ended by `interrupt`, or reached its `until`."""


class AsyncSocket(Protocol):
    """A connected non-blocking socket; the caller owns and closes it. One task reads at a time.

    `ended` is true once the peer has closed its side, even while unread bytes precede the end.
    `broken` is true once a write has failed: nothing can be sent any more. After either change
    `on_hangup` is called, between tasks. `unsent` holds written bytes that the kernel has not
    accepted: await `drain`.
    """

    sock: socket.socket
    ended: bool
    broken: bool
    unsent: bytes
    on_hangup: Callable[[], None] | None

    def detach(self) -> None:
        """Stop watching the socket, before it is closed or handed to another owner.

        Sends buffered writes first as far as the kernel accepts them. May be called repeatedly.
        """
        ...

    def is_silent(self) -> bool:
        """Whether no input, end or failure is known to be pending."""
        ...

    def has_input(self) -> bool:
        """Whether unread bytes, an error or the end are pending. Asks the kernel."""
        ...

    def has_unread(self) -> bool:
        """Whether unread bytes are pending. Asks the kernel."""
        ...

    def read(self, until: float = math.inf, size: int = READ_SIZE) -> Awaitable[bytes]:
        """Read 1 to `size` bytes; b"" at the end of the stream. Raises OSError.

        Raises Interrupted at the time `until` on Trio's clock, and after `interrupt`. Loses no
        data when cancelled or interrupted.
        """
        ...

    def stream_into(self, take: Callable[[bytes], bool]) -> Awaitable[None]:
        """Call `take` with each read's result until it returns False.

        Exceptions of `take` are raised here. Raises OSError. Loses no data when cancelled.
        """
        ...

    def interrupt(self) -> bool:
        """End the current read with Interrupted; False if no task waits for input."""
        ...

    def write(self, data: bytes) -> None:
        """Send all of `data` soon. Never blocks or raises; failure sets `broken`."""
        ...

    def write_request(self, data: bytes) -> None:
        """Write a request on a reused connection.

        If unread input or the end is found before sending, nothing is sent and the next `read`
        raises ConnectionAbortedError: a stray response must not become the next request's.
        """
        ...

    def flush(self) -> None:
        """Send buffered writes now."""
        ...

    async def drain(self) -> None:
        """Wait until the kernel has accepted all written bytes, or the socket is `broken`.

        Sending continues if the wait is cancelled.
        """
        ...


def has_unread(sock: socket.socket) -> bool:
    """Whether bytes that were not read are pending on a non-blocking socket."""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


def unexpected_input() -> ConnectionAbortedError:
    return ConnectionAbortedError("the peer closed the connection or sent unexpected bytes")
