"""Request heads parsed from bytes with llhttp, without sockets.

llhttp sees complete heads only, and every head gets a new parser (0.2 µs). So the exact bytes of a
head are known when the connection is handed to another server, a malformed body or an `Upgrade`
field cannot leave a parser in a wrong state, and one place decides where a body ends.
"""

from __future__ import annotations

import re
from typing import Any

import httptools

from vllm_router.http.http_error import HttpError, bad_request, head_too_large
from vllm_router.http.request_line import check_method, request_line, split_target
from vllm_router.http.syntax import MAX_LENGTH_DIGITS, Headers, too_many_fields, valid_host

_NOTED = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection", b"expect"})

# A line feed without its carriage return, or the reverse: never valid in a head (RFC 9112 2.2).
BARE = re.compile(rb"(?<!\r)\n|\r(?!\n)(?!\Z)|\0")

BARE_MESSAGE = "bare CR, bare LF or NUL in the head"

_EMPTY_LINES = re.compile(rb"(?:\r\n)*+")

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\n"
"""The part of the HTTP/2 client preface (RFC 9113 3.4) that looks like a request head."""


class Head:
    """Head of a valid request. Field names are lower-case.

    `memo` caches values that other layers derive from the head. It must not hold values that
    depend on the length of the body: see `CachedRequestParser`.
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

    def copy(self) -> Head:
        """The same head with the same `memo`, for another connection."""
        head = Head(self.method, self.path, self.query, self.http_version)
        head.headers, head.content_length = self.headers, self.content_length
        head.chunked, head.keep_alive = self.chunked, self.keep_alive
        head.expects_continue = self.expects_continue
        head.memo = self.memo
        return head

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
        """Determine framing and persistence from all fields. Raises HttpError."""
        if self._repeated is not None:
            raise bad_request(f"more than one {self._repeated} field")
        if self._host is None:
            if self.http_version == "1.1":
                raise bad_request("no Host field")
        elif not valid_host(self._host):
            raise bad_request("malformed Host field")
        if self._transfer is not None:
            # RFC 9112 6.1: with Content-Length, or from HTTP/1.0, the framing cannot be trusted.
            if self._length is not None:
                raise bad_request("both Content-Length and Transfer-Encoding")
            if self.http_version == "1.0":
                raise bad_request("Transfer-Encoding in HTTP/1.0")
            if self._transfer.lower() != b"chunked":
                raise bad_request("a Transfer-Encoding other than chunked")
            self.chunked = True
        elif self._length is not None:
            if not self._length.isdigit() or len(self._length) > MAX_LENGTH_DIGITS:
                raise bad_request("malformed Content-Length")
            self.content_length = int(self._length)
        if self.http_version == "1.0":
            self.keep_alive = self._connection_has(b"keep-alive")
        else:
            self.keep_alive = not self._connection_has(b"close")
        if self._expect is not None:
            if self._expect.lower() != b"100-continue":
                raise HttpError(417, "expectation_failed", "only 100-continue can be expected")
            self.expects_continue = self.http_version == "1.1"

    def _connection_has(self, option: bytes) -> bool:
        if self._connection is None:
            return False
        return option in [token.strip(b" \t") for token in self._connection.lower().split(b",")]


def read_head(data: bytes, line: tuple[str, bytes, str]) -> Head:
    """Parse `data`, a complete head up to and with the empty line. Raises HttpError.

    `line` is the result of `request_line` for the first line.
    """
    if too_many_fields(data):
        raise head_too_large()
    method, target, version = line
    path, query = split_target(method, target)
    head = Head(method, path, query, version)
    try:
        httptools.HttpRequestParser(head).feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # a server may ignore Upgrade (RFC 9110 7.8)
    except httptools.HttpParserInvalidMethodError:
        raise HttpError(501, "method_not_implemented", "unknown method") from None
    except httptools.HttpParserError as error:
        if BARE.search(data):
            raise bad_request(BARE_MESSAGE) from None
        raise bad_request(f"malformed head: {error}") from None
    head.check()
    return head


def without_empty_lines(data: bytes) -> bytes:
    """`data` without the empty lines at its start; one pass for any number of them."""
    found = _EMPTY_LINES.match(data)
    assert found is not None  # it may be empty
    return data[found.end() :]


def check_partial(data: bytes | bytearray, checked: int) -> None:
    """Raise HttpError if `data` cannot be the start of a request head.

    So a client of another protocol gets an error at once, not after the timeout. The first
    `checked` bytes were checked by an earlier call.
    """
    if BARE.search(data, checked):
        raise bad_request(BARE_MESSAGE)
    end = data.find(b"\r\n")
    if end >= 0:
        if end >= checked - 1 and not HTTP2_PREFACE.startswith(bytes(data)):
            method, target, _ = request_line(bytes(data[:end]))
            check_method(method)
            if target != b"*":
                split_target(method, target)
    elif not (b"!" <= data[:1] <= b"~") and data != b"\r":
        raise bad_request("not HTTP/1.1")
