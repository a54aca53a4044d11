"""Requests read from bytes, without sockets: heads on llhttp, chunked bodies by hand.

llhttp sees complete heads only, and a fresh parser each (0.2 µs). So the exact bytes of a head
are known when it is handed to another server, a parser has no state that an ill-formed body or an
`Upgrade` field could confuse, and the end of a body is found here, in one place.
"""

from __future__ import annotations

import re
from typing import Any

import httptools

from vllm_router.http.head_cache import MAX_LENGTH_DIGITS, Headers, Repeated
from vllm_router.http.headers import (
    Refusal,
    check_method,
    malformed,
    request_line,
    split_target,
    too_large,
    too_many_fields,
    valid_host,
)

_NOTED = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection", b"expect"})

# A line feed without its carriage return, or the reverse: never part of a head (RFC 9112 2.2).
BARE = re.compile(rb"(?<!\r)\n|\r(?!\n)(?!\Z)|\0")

BARE_MESSAGE = "bare CR, bare LF or NUL in the head"

_EMPTY_LINES = re.compile(rb"(?:\r\n)*+")

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\n"
"""What an HTTP/2 client says first (RFC 9113 3.4), as far as it looks like a request head."""


class Head:
    """The head of a request that may be served. Field names are lower-case.

    `memo` is for what others have found to follow from it, whatever the length of the body.
    """

    __slots__ = (
        "_connection",
        "_expect",
        "_host",
        "_length",
        "_repeated",
        "_transfer",
        "chunked",
        "content_length",
        "expects_continue",
        "headers",
        "http_version",
        "keep_alive",
        "memo",
        "method",
        "path",
        "query",
    )

    def __init__(self, method: str, path: bytes, query: bytes, http_version: str) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.http_version = http_version
        self.headers: Headers = []
        self.content_length = 0
        self.chunked = False
        self.expects_continue = False
        self.keep_alive = True
        self.memo: dict[Any, Any] = {}
        self._host: bytes | None = None
        self._length: bytes | None = None
        self._transfer: bytes | None = None
        self._connection: bytes | None = None
        self._expect: bytes | None = None
        self._repeated: str | None = None

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by llhttp for each field."""
        name = name.lower()
        if value.endswith((b" ", b"\t")):
            value = value.rstrip(b" \t")
        self.headers.append((name, value))
        if name in _NOTED:
            self._note(name, value)

    def _note(self, name: bytes, value: bytes) -> None:
        if name == b"host":
            if self._host is not None:
                self._repeated = "Host"
            self._host = value
        elif name == b"content-length":
            if self._length is not None:
                self._repeated = "Content-Length"
            self._length = value
        elif name == b"transfer-encoding":
            if self._transfer is not None:
                self._repeated = "Transfer-Encoding"
            self._transfer = value
        elif name == b"connection":
            known = self._connection
            self._connection = value if known is None else known + b"," + value
        else:
            self._expect = value

    def check(self) -> None:
        """Work out framing and persistence once all fields are known. Raises Refusal."""
        if self._repeated is not None:
            raise malformed(f"more than one {self._repeated} field")
        if self._host is None:
            if self.http_version == "1.1":
                raise malformed("no Host field")
        elif not valid_host(self._host):
            raise malformed("malformed Host field")
        if self._transfer is not None:
            # RFC 9112 6.1: with Content-Length, or from HTTP/1.0, the framing is not to be trusted.
            if self._length is not None:
                raise malformed("both Content-Length and Transfer-Encoding")
            if self.http_version == "1.0":
                raise malformed("Transfer-Encoding in HTTP/1.0")
            if self._transfer.lower() != b"chunked":
                raise malformed("a Transfer-Encoding other than chunked")
            self.chunked = True
        elif self._length is not None:
            if not self._length.isdigit() or len(self._length) > MAX_LENGTH_DIGITS:
                raise malformed("malformed Content-Length")
            self.content_length = int(self._length)
        if self.http_version == "1.0":
            self.keep_alive = self._connection_has(b"keep-alive")
        elif self._connection is not None:
            self.keep_alive = not self._connection_has(b"close")
        if self._expect is not None:
            if self._expect.lower() != b"100-continue":
                raise Refusal(417, "expectation_failed", "only 100-continue can be expected")
            self.expects_continue = self.http_version == "1.1"

    def _connection_has(self, option: bytes) -> bool:
        if self._connection is None:
            return False
        return option in [token.strip(b" \t") for token in self._connection.lower().split(b",")]


def read_head(data: bytes, line: tuple[str, bytes, str]) -> Head:
    """The head that `data` is, from its first byte to the empty line. Raises Refusal.

    `line` is what `request_line` said about its first line.
    """
    if too_many_fields(data):
        raise too_large()
    method, target, version = line
    path, query = split_target(method, target)
    head = Head(method, path, query, version)
    try:
        httptools.HttpRequestParser(head).feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # an invitation we may decline (RFC 9110 7.8)
    except httptools.HttpParserInvalidMethodError:
        raise Refusal(501, "method_not_implemented", "unknown method") from None
    except httptools.HttpParserError as error:
        if BARE.search(data):
            raise malformed(BARE_MESSAGE) from None
        raise malformed(f"malformed head: {error}") from None
    head.check()
    return head


class KnownHead:
    """The last head of a connection: clients that keep one say the same again and again.

    A head of the same bytes but for the digits of Content-Length means the same but for the length
    of the body, so it is not parsed again.
    """

    __slots__ = ("_head", "_said")

    def __init__(self) -> None:
        self._said = Repeated()
        self._head: Head | None = None

    def note(self, data: bytes, head: Head) -> None:
        """`data` is what `head` was read from. Remembered if it ends a body by a length alone."""
        known = not head.expects_continue and self._said.note(data, head.headers)
        self._head = head if known else None

    def read(self, data: bytes, end: int) -> Head | None:
        """The head that `data` begins with, `end` bytes long, if it is known.

        The object is the same every time: a connection has one request after the other.
        """
        head = self._head
        digits = self._said.length_of(data, end) if head is not None else None
        if head is None or digits is None:
            return None
        head.content_length = int(digits)
        head.headers = self._said.with_length(head.headers, digits)
        return head


def without_empty_lines(data: bytes) -> bytes:
    """`data` from its first line on that is not empty; one pass, however many there are."""
    found = _EMPTY_LINES.match(data)
    return data[found.end() :] if found is not None else data


def check_partial(data: bytes | bytearray, checked: int) -> None:
    """Raises Refusal if `data` cannot be the beginning of a request head, as far as it shows.

    A client that speaks something else is told so at once instead of being waited for. The first
    `checked` bytes have been looked at before.
    """
    if BARE.search(data, checked):
        raise malformed(BARE_MESSAGE)
    end = data.find(b"\r\n")
    if end >= 0:
        if end >= checked - 1 and not HTTP2_PREFACE.startswith(bytes(data)):
            method, target, _ = request_line(bytes(data[:end]))
            check_method(method)
            if target != b"*":
                split_target(method, target)
    elif not (b"!" <= data[:1] <= b"~") and data != b"\r":
        raise malformed("not HTTP/1.1")


# RFC 9112 7.1, without the whitespace it tolerates before `;`, as llhttp and h11. Extensions are
# dropped unread, but may hold no control characters.
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t -~\x80-\xff]*)?\r\n")
_TRAILER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[\t -~\x80-\xff]*\r\n")

# RFC 9110 6.5.1: a trailer that could change how the message is read is never honest.
_FRAMING = frozenset({b"content-length", b"transfer-encoding", b"host"})

MAX_CHUNK_LINE = 4096
MAX_TRAILERS = 16384
MAX_EXCESS = 16384
"""Bytes of chunk framing beyond what an honest sender needs; the rule is that of Go's net/http."""

MAX_PIECES = 1000
"""Chunks looked at in one call: a read may hold thousands of one byte, a few microseconds each."""

_SIZE, _DATA, _DATA_END, _TRAILERS, _DONE = range(5)


class ChunkedBody:
    """The chunked coding of one request's body. Extensions and trailers are dropped."""

    __slots__ = ("_excess", "_left", "_line", "_state", "_trailers")

    def __init__(self) -> None:
        self._state = _SIZE
        self._line = b""
        self._left = 0
        self._excess = 0
        self._trailers = 0

    @property
    def complete(self) -> bool:
        return self._state == _DONE

    def feed(self, data: bytes) -> tuple[list[bytes], int]:
        """Pieces of the body in `data`, and how many bytes of `data` have been used.

        Raises Refusal. After `complete`, bytes beyond the count are the next request's; else they
        are to be fed again, after others have had their turn: MAX_PIECES have been found.
        """
        pieces: list[bytes] = []
        position = 0
        end = len(data)
        while position < end and self._state != _DONE:
            if self._state == _DATA:
                if len(pieces) == MAX_PIECES:
                    break
                piece = data[position : position + self._left]
                pieces.append(piece)
                position += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._state = _DATA_END
                continue
            newline = data.find(b"\n", position)
            stop = end if newline < 0 else newline + 1
            line = self._line + data[position:stop]
            position = stop
            if newline < 0:
                self._check_unfinished(line)
                self._line = line
            else:
                self._line = b""
                self._take_line(line)
        return pieces, position

    def _check_unfinished(self, line: bytes) -> None:
        limit = {_DATA_END: 1, _SIZE: MAX_CHUNK_LINE}.get(self._state, MAX_TRAILERS)
        if len(line) > limit or b"\r" in line[:-1] or (self._state == _DATA_END and line != b"\r"):
            raise malformed("malformed chunk")

    def _take_line(self, line: bytes) -> None:
        if self._state == _SIZE:
            match = _CHUNK_SIZE.fullmatch(line) if len(line) <= MAX_CHUNK_LINE else None
            if match is None:
                raise malformed("malformed chunk size")
            self._left = int(match[1], 16)
            self._excess = max(0, self._excess + len(line) - 16 - 2 * self._left)
            if self._excess > MAX_EXCESS:
                raise malformed("chunked body with too little in it")
            self._state = _DATA if self._left else _TRAILERS
        elif self._state == _DATA_END:
            if line != b"\r\n":
                raise malformed("chunk longer than its size")
            self._state = _SIZE
        elif line == b"\r\n":
            self._state = _DONE
        else:
            self._trailers += len(line)
            match = _TRAILER.fullmatch(line)
            if match is None or self._trailers > MAX_TRAILERS or match[1].lower() in _FRAMING:
                raise malformed("malformed trailer")
