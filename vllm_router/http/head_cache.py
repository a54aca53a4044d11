"""Caches of heads: the last one of a connection or server, and recent ones of all of them.

Clients send the same head with every request, except for the digits of Content-Length; so do
servers within one second. An unchanged head is not parsed again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from vllm_router.http.io.async_socket import READ_SIZE
from vllm_router.http.request_head import Head
from vllm_router.http.response_head import ResponseHead
from vllm_router.http.syntax import MAX_LENGTH_DIGITS, Headers

LARGE_READ_SIZE = 1 << 18
"""Bytes of one read from a server that has sent more than READ_SIZE bytes of a plain response: each
read of a response costs a turn of the loop, and a response that arrives in one is not parsed."""

HEAD_SIZE = 1024
"""Bytes that are taken for the head of a response."""

MAX_FIRST_HEADS = 256
LONGEST_KNOWN_HEAD = 4096
"""Heads that are remembered for new connections, and the bytes of the longest one: 3 MB with what
other layers derive from them."""

MAX_KNOWN_RESPONSES = 64
"""Response heads of all servers that are remembered, of at most LONGEST_KNOWN_HEAD bytes each."""

H = TypeVar("H", Head, ResponseHead)

_LENGTH_LINE = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)[ \t]*\r\n", re.IGNORECASE)


class HeadTemplate:
    """The bytes of a head before and after its Content-Length.

    `place` is the index of Content-Length among the fields; -1 while no head is remembered.
    """

    __slots__ = ("_after", "_before", "place")

    def __init__(self) -> None:
        self._before = self._after = b""
        self.place = -1

    @property
    def parts(self) -> tuple[bytes, bytes]:
        """The bytes before and after the digits of Content-Length."""
        return self._before, self._after

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


class KnownHeads(Generic[H]):
    """At most `most` recent heads with their templates.

    A head is known by its bytes, its Content-Length left out, and by everything else that what is
    derived from it depends on: `origin`.
    """

    __slots__ = ("_known", "_most")

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[tuple[Hashable, bytes, bytes], tuple[H, HeadTemplate]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def find(self, origin: Hashable, data: bytes, end: int) -> tuple[H, HeadTemplate] | None:
        """The head that equals `data[:end]` but for its length, and its template."""
        line = _LENGTH_LINE.search(data, 0, end)
        if line is None:
            return None
        return self._known.get((origin, data[: line.start(1)], data[line.end(1) : end]))

    def add(self, origin: Hashable, head: H, template: HeadTemplate) -> None:
        """Remember a parsed head. The oldest one is dropped if there are too many."""
        before, after = template.parts
        if len(before) + len(after) > LONGEST_KNOWN_HEAD:
            return
        known = self._known
        if len(known) >= self._most:
            del known[next(iter(known))]
        known[origin, before, after] = head, template


class FirstHeads:
    """The first heads of recent connections: a client that connects anew mostly sends the same.

    `peer` is the client's address and everything else that the `memo` of a head may depend on.
    """

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: KnownHeads[Head] = KnownHeads(MAX_FIRST_HEADS)

    def find(self, peer: Hashable, data: bytes) -> tuple[Head, HeadTemplate] | None:
        """A copy of the head that equals `data` but for its length, and its template."""
        found = self._known.find(peer, data, len(data))
        return (found[0].copy(), found[1]) if found is not None else None

    def add(self, peer: Hashable, head: Head, template: HeadTemplate) -> None:
        """Remember a parsed head."""
        self._known.add(peer, head.copy(), template)


class CachedRequestParser:
    """Parses request heads of one connection with `parse`, unless the head is the last one again.

    `parse` gets the bytes that begin with the head, and the head's length. It may return None for
    a request that another server takes, and may raise HttpError. With `firsts`, the first head is
    not parsed either if an earlier connection with the same `peer` began with it.
    """

    __slots__ = ("_firsts", "_head", "_parse", "_peer", "_template")

    def __init__(
        self,
        parse: Callable[[bytes, int], Head | None],
        firsts: FirstHeads | None = None,
        peer: Hashable = None,
    ) -> None:
        self._parse = parse
        self._template = HeadTemplate()
        self._head: Head | None = None
        self._firsts = firsts
        self._peer = peer

    def parse(self, data: bytes, end: int) -> Head | None:
        """The head that is `data[:end]`. Repeated heads are one object, changed in place."""
        firsts, self._firsts = self._firsts, None
        known = firsts.find(self._peer, data[:end]) if firsts is not None else None
        if known is not None:
            self._head, self._template = known
        head = self._head
        digits = self._template.match(data, end) if head is not None else None
        if head is None or digits is None:
            head = self._parse(data, end)
            if head is not None:
                # A client that expects 100 Continue is served by the parsed head only.
                template = HeadTemplate()
                cached = not head.expects_continue and template.remember(data[:end], head.headers)
                self._head, self._template = (head if cached else None), template
                if cached and firsts is not None:
                    firsts.add(self._peer, head, template)
            return head
        head.content_length = int(digits)
        head.headers = fields = head.headers.copy()
        fields[self._template.place] = (b"content-length", digits)
        return head


class KnownResponses(KnownHeads[ResponseHead]):
    """Response heads that all servers of a router have sent in the last seconds.

    Servers of one kind send the same head within one second, since it contains the date. So where
    each of a thousand servers answers once or twice a second, most heads are known from another.
    """

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(MAX_KNOWN_RESPONSES)


class ResponseCache:
    """The last response head of one server, shared by all of its connections.

    `match` finds only responses that arrived in one read, with a Content-Length and the whole body,
    on a connection that stays open: a parser has nothing else to find in such a response. Others
    are parsed, but heads that are the same share their `memo`, see `share_memo`.

    `read_size` are the bytes of one read, more where a response did not fit a usual one. `others`
    has heads of all servers: the first of them that sends a head has it parsed.
    """

    __slots__ = ("_fields", "_head", "_memo", "_others", "_template", "read_size")

    def __init__(self, others: KnownResponses | None = None) -> None:
        self._others = others if others is not None else KnownResponses()
        self._template = HeadTemplate()
        self._head: ResponseHead | None = None
        self._fields: Headers | None = None
        self._memo: dict[object, Any] = {}
        self.read_size = READ_SIZE

    def remember(self, data: bytes, head: ResponseHead) -> None:
        """`data` was parsed and is exactly one response with this head."""
        end = data.find(b"\r\n\r\n") + 4
        template = HeadTemplate()  # the last one may be another server's, too
        fits = not head.chunked and head.content_length == len(data) - end
        if fits and template.remember(data[:end], head.headers):
            self._head, self._template = head, template
            self._others.add(None, head, template)
        else:
            self._head = None

    def share_memo(self, head: ResponseHead) -> None:
        """Give a parsed head the memo of the last one if all fields but Content-Length are equal.

        Also notes the length of its body for `read_size`.
        """
        fields, length = head.headers, head.content_length
        if length is not None:
            if [name for name, _ in fields].count(b"content-length") > 1:
                return
            fields = [(name, b"" if name == b"content-length" else v) for name, v in fields]
            if length > READ_SIZE - HEAD_SIZE:
                self.read_size = LARGE_READ_SIZE
        if fields != self._fields:
            self._fields, self._memo = fields, {}
        head.memo = self._memo

    def match(self, data: bytes) -> tuple[ResponseHead, bytes] | None:
        """Head and body if `data` is one whole response with the remembered head."""
        end = data.find(b"\r\n\r\n") + 4
        head = self._head
        digits = self._template.match(data, end) if head is not None else None
        if head is None or digits is None:
            found = self._others.find(None, data, end)
            if found is None:
                return None
            head, template = found
            digits = template.match(data, end)
            if digits is None:
                return None
            self._head, self._template = found
        length = int(digits)
        if length != len(data) - end:
            return None
        if length != head.content_length:
            headers = head.headers.copy()
            headers[self._template.place] = (b"content-length", digits)
            head = ResponseHead(head.status, headers, length, False, head.memo)
        return head, data[end:]
