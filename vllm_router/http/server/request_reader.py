"""Sans-I/O reader of one connection's requests: heads, bodies, and bytes beyond them."""

from __future__ import annotations

import enum
from collections.abc import Hashable

from vllm_router.http.chunked import ChunkedBody
from vllm_router.http.head_cache import CachedRequestParser
from vllm_router.http.http_error import head_too_large
from vllm_router.http.request_head import Head, check_partial, without_empty_lines
from vllm_router.http.server.host import Host
from vllm_router.http.server.response_writer import ResponseWriter


class Body(enum.Enum):
    """Progress of the current request's body."""

    ARRIVING = enum.auto()  # the client still owes a part of it
    COMPLETE = enum.auto()  # the application has not received its last piece
    DELIVERED = enum.auto()


ARRIVING, COMPLETE, DELIVERED = Body.ARRIVING, Body.COMPLETE, Body.DELIVERED
"""Module-level names: access to an Enum member takes ten times as long (CPython 3.11)."""


class RequestReader:
    """Takes received bytes; has at most one request at a time.

    `_head` is the current request's head, None while there is none. `_buffer` holds bytes beyond
    the current request, or the start of the next head. `_pieces` holds the part of the body that
    the application has not received, `_body` says whether more belongs to it.
    """

    __slots__ = (
        "_body",
        "_body_received",
        "_body_waited",
        "_buffer",
        "_chunks",
        "_handed_over",
        "_head",
        "_left",
        "_limits",
        "_parser",
        "_pieces",
        "_response",
        "_unfed",
    )

    def __init__(self, host: Host, peer: Hashable = None) -> None:
        """`peer`: see `FirstHeads`."""
        self._limits = host.limits
        self._parser = CachedRequestParser(host.parse_head, host.first_heads, peer)
        self._buffer = bytearray()
        self._handed_over: bytes | None = None
        self._head: Head | None = None
        self._response: ResponseWriter | None = None
        self._body = COMPLETE
        self._chunks: ChunkedBody | None = None
        self._unfed = b""
        self._left = 0
        self._pieces: list[bytes] = []
        self._body_received = 0
        self._body_waited = 0.0

    def _feed_head(self, data: bytes) -> None:
        """Begin the next request if its head is complete; `data` follows the buffer.

        After it, `_head` is set, or `_handed_over` is, or the buffer holds an incomplete head.
        Raises HttpError.
        """
        if self._buffer:
            self._feed_rest_of_head(data)
            return
        # RFC 9112 2.2: some old clients send empty lines before a request.
        if data.startswith(b"\r\n"):
            data = without_empty_lines(data)
            if not data:
                return
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            self._buffer += data
            self._check_partial(0)
        else:
            self._begin(data, end)

    def _feed_rest_of_head(self, data: bytes) -> None:
        buffer = self._buffer
        checked = max(0, len(buffer) - 3)
        buffer += data
        if buffer.startswith(b"\r"):
            buffer[:] = without_empty_lines(bytes(buffer))
            checked = 0
            if not buffer:
                return
        end = buffer.find(b"\r\n\r\n", checked) + 4
        if end < 4:
            self._check_partial(checked)
        else:
            whole = bytes(buffer)
            self._begin(whole, end, buffered=True)

    def _check_partial(self, checked: int) -> None:
        if len(self._buffer) > self._limits.max_head_bytes:
            raise head_too_large()
        check_partial(self._buffer, checked)

    def _begin(self, data: bytes, end: int, *, buffered: bool = False) -> None:
        """`data` starts with a complete head of `end` bytes. Raises HttpError.

        With `buffered`, `data` is a copy of the buffer.
        """
        if end > self._limits.max_head_bytes:
            raise head_too_large()
        head = self._parser.parse(data, end)
        if buffered:
            self._buffer.clear()
        if head is None:
            self._handed_over = data
            return
        self._head = head
        self._response = ResponseWriter(head)
        length = head.content_length
        if not head.chunked and len(data) - end >= length:
            # The whole request in one read: nearly all requests.
            self._body = COMPLETE
            stop = end + length
            if length:
                self._pieces.append(data[end:stop])
            if stop < len(data):
                self._buffer += data[stop:]
        else:
            self._body = ARRIVING
            self._chunks = ChunkedBody() if head.chunked else None
            self._left = length
            self._body_received = 0
            self._body_waited = 0.0
            if end < len(data):
                self._feed_body(data[end:])

    def _feed_body(self, data: bytes) -> None:
        """More of the current request's body, and perhaps bytes beyond it. Raises HttpError."""
        chunks = self._chunks
        if chunks is None:
            used = min(len(data), self._left)
            self._left -= used
            complete = not self._left
            self._pieces.append(data if used == len(data) else data[:used])
        else:
            pieces, used = chunks.feed(data)
            self._pieces += pieces
            complete = chunks.complete
            if not complete:
                self._unfed = data[used:]
        self._body_received += used
        if complete:
            self._body = COMPLETE
            if used < len(data):
                self._buffer += data[used:]
