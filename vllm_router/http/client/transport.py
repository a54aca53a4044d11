"""`Transport`: the byte stream below a client connection."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Protocol

from vllm_router.http.io.async_socket import READ_SIZE


class Transport(Protocol):
    """One connection to a server.

    On failure `write` raises ConnectionLost, NotSent if it has sent nothing because a reused
    connection had been closed; `read` and `stream_into` raise ConnectionLost or an OSError.
    """

    @property
    def can_stream(self) -> bool:
        """Whether `stream_into` costs less than reads, and reads support `until`, `interrupt`."""
        ...

    def read(self, until: float = math.inf, size: int = READ_SIZE) -> Awaitable[bytes]:
        """1 to `size` bytes, or b"" at the end of the stream.

        If the transport `can_stream`, raises Interrupted at the time `until` and after
        `interrupt`; otherwise ignores `until`.
        """
        ...

    def interrupt(self) -> bool:
        """End the current read with Interrupted; False if no task waits."""
        ...

    def stream_into(self, take: Callable[[bytes], bool]) -> Awaitable[None]:
        """Call `take` with each read's result, between tasks, until it returns False."""
        ...

    def write_nowait(self, head: bytes, body: bytes) -> bool:
        """Write both without waiting. False if they need `write`; then nothing is written."""
        ...

    async def write(self, head: bytes, body: bytes) -> bool:
        """Write both in order. False if the server responded or closed before it read all."""
        ...

    def is_alive(self) -> bool:
        """Whether an idle connection is still open, without unexpected input."""
        ...

    def close(self) -> None: ...
