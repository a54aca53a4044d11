"""One HTTP/1.1 connection to a server."""

from __future__ import annotations

import math
from collections.abc import Callable

from vllm_router.errors import ConnectionLost, NotSent
from vllm_router.http.client.response_parser import ResponseParser
from vllm_router.http.client.transport import Transport
from vllm_router.http.head_cache import ResponseCache
from vllm_router.http.response_head import ResponseHead


class Connection(ResponseParser):
    """Sends requests and reads their responses, one at a time, used by one task at a time.

    Every failure is a ConnectionLost (ProtocolViolation is one), and the connection is not reused
    after it. Owns the transport. `can_stream` and `is_alive` are the transport's: whether
    `stream_into` is the cheaper way to read a body that comes in many pieces, and whether an idle
    connection can be reused, as far as the event loop knows.
    """

    __slots__ = ("_transport", "can_stream", "idle_since", "is_alive", "reused")

    def __init__(self, transport: Transport, cache: ResponseCache | None = None) -> None:
        super().__init__(cache)
        self._transport = transport
        self.can_stream = transport.can_stream
        self.is_alive = transport.is_alive
        self.idle_since = 0.0
        self.reused = False

    def send_nowait(self, head: bytes, body: bytes) -> bool:
        """Write a request without waiting. False if it needs `send`; then nothing is written."""
        self._next_response()
        return self._transport.write_nowait(head, body)

    async def send(self, head: bytes, body: bytes) -> None:
        """Write a request. Raises ConnectionLost, and NotSent as `read_head` does."""
        self._next_response()
        try:
            sent_all = await self._transport.write(head, body)
        except BaseException:
            self._reusable = False
            raise
        if not sent_all:
            self._reusable = False

    def interrupt(self) -> bool:
        """End the current read with Interrupted; False if input has arrived."""
        return self._transport.interrupt()

    async def read_head(self, until: float = math.inf) -> ResponseHead:
        """Wait for the head of the final response.

        Raises ConnectionLost if the connection ends before it, NotSent if the request was not
        sent, and ProtocolViolation if the response is not HTTP/1.1 or ambiguously framed. If the
        connection `can_stream`, raises Interrupted at the time `until` on Trio's clock.
        """
        while True:
            try:
                data = await self._transport.read(until, self._cache.read_size)
            except ConnectionAbortedError as error:
                raise NotSent(str(error)) from error  # see AsyncSocket.write_request
            except OSError as error:
                raise ConnectionLost(str(error)) from error
            head = self._feed_head(data)
            if head is not None:
                return head

    async def read_body(self, until: float = math.inf) -> bytes:
        """The next bytes of the body as they arrive; b"" at its end.

        Raises ConnectionLost if the connection ends before the body does. `until` as `read_head`.
        """
        while not self._parts:
            if self.complete:
                return b""
            try:
                data = await self._transport.read(until, self._cache.read_size)
            except OSError as error:
                raise ConnectionLost(str(error)) from error
            if data:
                self._feed(data)
                if not self._parts:
                    self._count_overhead(data)
            else:
                self._end_of_stream()
        self._overhead = 0
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def stream_into(self, take: Callable[[bytes], bool]) -> None:
        """Call `take` with each piece of the body as it arrives, between tasks.

        Ends when `take` returns False or the body has ended. Raises ConnectionLost as `read_body`
        does, and what `take` raises.
        """

        def on_data(data: bytes) -> bool:
            if data:
                self._feed(data)
            else:
                self._end_of_stream()
            parts, more = self._parts, not self.complete
            if parts:
                self._parts, self._overhead = [], 0
                return take(parts[0] if len(parts) == 1 else b"".join(parts)) and more
            self._count_overhead(data)
            return more

        try:
            await self._transport.stream_into(on_data)
        except OSError as error:
            raise ConnectionLost(str(error)) from error

    def close(self) -> None:
        """Close the socket. Never blocks; may be called repeatedly."""
        self._reusable = False
        self._transport.close()
