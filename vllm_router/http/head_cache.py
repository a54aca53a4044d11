"""Cache of the last head on a connection.

Clients that keep a connection send the same head with every request, except for the digits of
Content-Length; so do servers within one second. An unchanged head is not parsed again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from vllm_router.http.request_head import Head
from vllm_router.http.response_head import ResponseHead
from vllm_router.http.syntax import MAX_LENGTH_DIGITS, Headers

_LENGTH_LINE = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)[ \t]*\r\n", re.IGNORECASE)


class HeadTemplate:
    """The bytes of a head before and after its Content-Length.

    `place` is the index of Content-Length among the fields; -1 while no head is remembered.
    """

    __slots__ = ("_after", "_before", "place")

    def __init__(self) -> None:
        self._before = self._after = b""
        self.place = -1

    def remember(self, head: bytes, headers: Headers) -> bool:
        """Remember a parsed head; False if it does not have exactly one Content-Length."""
        self.place = -1
        names = [name for name, _ in headers]
        found = _LENGTH_LINE.search(head)
        if found is None or names.count(b"content-length") != 1:
            return False
        place = names.index(b"content-length")
        if headers[place][1] != found[1]:
            return False
        self._before, self._after = head[: found.start(1)], head[found.end(1) :]
        self.place = place
        return True

    def match(self, data: bytes, end: int) -> bytes | None:
        """The digits of Content-Length if `data[:end]` is the remembered head, else None."""
        before, after = self._before, self._after
        if self.place < 0 or not data.startswith(before):
            return None
        start, stop = len(before), end - len(after)
        digits = data[start:stop]
        if not digits.isdigit() or len(digits) > MAX_LENGTH_DIGITS or data[stop:end] != after:
            return None
        return digits


class CachedRequestParser:
    """Parses request heads of one connection with `parse`, unless the head is the last one again.

    `parse` gets the bytes that begin with the head, and the head's length. It may return None for
    a request that another server takes, and may raise HttpError.
    """

    __slots__ = ("_head", "_parse", "_template")

    def __init__(self, parse: Callable[[bytes, int], Head | None]) -> None:
        self._parse = parse
        self._template = HeadTemplate()
        self._head: Head | None = None

    def parse(self, data: bytes, end: int) -> Head | None:
        """The head that is `data[:end]`. Repeated heads are one object, changed in place."""
        head = self._head
        digits = self._template.match(data, end) if head is not None else None
        if head is None or digits is None:
            head = self._parse(data, end)
            if head is not None:
                # A client that expects 100 Continue is served by the parsed head only.
                cached = not head.expects_continue and self._template.remember(
                    data[:end], head.headers
                )
                self._head = head if cached else None
            return head
        head.content_length = int(digits)
        head.headers = fields = head.headers.copy()
        fields[self._template.place] = (b"content-length", digits)
        return head


class ResponseCache:
    """The last response head of one server, shared by all of its connections.

    `match` finds only responses that arrived in one read, with a Content-Length and the whole body,
    on a connection that stays open: a parser has nothing else to find in such a response. Streams
    are parsed, but heads that are the same share their `memo`, see `share_memo`.
    """

    __slots__ = ("_head", "_memo", "_stream", "_template")

    def __init__(self) -> None:
        self._template = HeadTemplate()
        self._head: ResponseHead | None = None
        self._stream: Headers | None = None
        self._memo: dict[object, Any] = {}

    def remember(self, data: bytes, head: ResponseHead) -> None:
        """`data` was parsed and is exactly one response with this head."""
        end = data.find(b"\r\n\r\n") + 4
        fits = not head.chunked and head.content_length == len(data) - end
        cached = fits and self._template.remember(data[:end], head.headers)
        self._head = head if cached else None
        if cached:
            head.memo = {}

    def share_memo(self, head: ResponseHead) -> None:
        """Give a parsed head of a stream the memo of the last one if the fields are the same."""
        if head.headers != self._stream:
            self._stream, self._memo = head.headers, {}
        head.memo = self._memo

    def match(self, data: bytes) -> tuple[ResponseHead, bytes] | None:
        """Head and body if `data` is one whole response with the remembered head."""
        head = self._head
        if head is None:
            return None
        end = data.find(b"\r\n\r\n") + 4
        digits = self._template.match(data, end)
        if digits is None:
            return None
        length = int(digits)
        if length != len(data) - end:
            return None
        if length != head.content_length:
            headers = head.headers.copy()
            headers[self._template.place] = (b"content-length", digits)
            head = ResponseHead(head.status, headers, length, False, head.memo)
        return head, data[end:]
