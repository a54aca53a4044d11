"""Sans-I/O parser of one connection's responses, on llhttp."""

from __future__ import annotations

import httptools

from vllm_router.errors import ConnectionLost, ProtocolViolation
from vllm_router.http.head_cache import ResponseCache
from vllm_router.http.response_head import ResponseHead
from vllm_router.http.syntax import MAX_LENGTH_DIGITS, Headers

MAX_HEAD = 1024 * 1024
"""Bytes of a response head. vLLM sends binary embeddings with a field `metadata` that takes some
100 bytes for each of them (vllm#30249)."""

MAX_FIELDS = 1000
"""Fields of a head: each costs memory and time. vLLM allows a client 256."""

MAX_OVERHEAD = 65536
"""Consecutive bytes without a byte of the body: chunk extensions, trailers."""

RESERVED = b"x-vllm-router-"
"""Prefix of field names that only the router writes; such fields of a server are dropped."""

_HEAD_TOO_LARGE = f"a head of more than {MAX_HEAD} bytes or {MAX_FIELDS} fields"

_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")
"""The first bytes of a TLS alert and of a TLS handshake."""


class ResponseParser:
    """Turns received bytes into a head and pieces of a body, one response after the other.

    Framing that RFC 9112 section 6.3 calls faulty raises ProtocolViolation, so that no truncated
    or smuggled response passes as a complete one.

    `complete`: the whole response has been received, though perhaps not taken.
    """

    __slots__ = (
        "_cache",
        "_fault",
        "_head",
        "_head_bytes",
        "_headers",
        "_overhead",
        "_parser",
        "_parts",
        "_reusable",
        "complete",
    )

    def __init__(self, cache: ResponseCache | None = None) -> None:
        self._cache = cache or ResponseCache()
        self._parser = httptools.HttpResponseParser(self)
        self._headers: Headers = []
        self._parts: list[bytes] = []
        self._head: ResponseHead | None = None
        self.complete = False
        self._reusable = True
        self._fault: str | None = None
        self._head_bytes = self._overhead = 0

    def _next_response(self) -> None:
        """Expect the response to a new request."""
        self._headers = []
        self._parts = []
        self._head = None
        self.complete = False
        self._head_bytes = 0

    # -- llhttp's callbacks -------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.complete:
            self._reusable = False  # a second response to one request

    def on_header(self, name: bytes, value: bytes) -> None:
        # Fields after the head are trailers, or belong to a second response: both are dropped.
        if self._head is None:
            name = name.lower()
            if not name.startswith(RESERVED):
                self._headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        if self.complete:
            return
        status = self._parser.get_status_code()
        headers = self._headers
        if status < 200:
            self._headers = []
            if status < 100:
                self._fault = f"status {status}: expected 100 to 599"
            elif status == 101:
                self._fault = "status 101: the router did not ask for another protocol"
            return
        if len(headers) > MAX_FIELDS:
            self._fault = _HEAD_TOO_LARGE
            headers = []
        length: int | None = None
        chunked = False
        for name, value in headers:
            if name == b"content-length":
                if len(value) > MAX_LENGTH_DIGITS:
                    self._fault = f"a content-length of more than {MAX_LENGTH_DIGITS} digits"
                else:
                    length = int(value)
            elif name == b"transfer-encoding":
                # llhttp accepts any final coding and reads to the end of the stream.
                if (
                    chunked
                    or value.lower() != b"chunked"
                    or self._parser.get_http_version() != "1.1"
                ):
                    self._fault = "a transfer-encoding other than chunked over HTTP/1.1"
                chunked = True
        if length is None and not chunked and status not in (204, 304):
            self._reusable = False  # the body ends with the connection
        if status > 599:
            self._fault = f"status {status}: expected 100 to 599"
        self._head = head = ResponseHead(status, headers, length, chunked)
        if chunked or length is not None:
            self._cache.share_memo(head)

    def on_body(self, piece: bytes) -> None:
        if self._head is None:
            self._fault = "an interim response with a body"  # RFC 9110 15.2: it has none
        elif not self.complete:
            self._parts.append(piece)

    def on_message_complete(self) -> None:
        if self._head is None:
            return  # an interim response
        self.complete = True
        if not self._parser.should_keep_alive():
            self._reusable = False

    # -- feeding ------------------------------------------------------------------------------

    def _feed_head(self, data: bytes) -> ResponseHead | None:
        """The head once it is complete; `data` is what was received, b"" for the end."""
        if not data:
            self._reusable = False
            if self._head_bytes:
                raise ProtocolViolation("the connection ended inside the head")
            raise ConnectionLost("connection closed before the response")
        first = not self._head_bytes
        self._head_bytes += len(data)
        if first and (found := self._cache.match(data)) is not None:
            # llhttp has not seen this response: it stays between two responses.
            self._head, body = found
            self.complete = True
            if body:
                self._parts.append(body)
            return self._head
        self._feed(data)
        if self._head is not None:
            if first and self.complete and self._reusable:
                self._cache.remember(data, self._head)
            return self._head
        if self._head_bytes > MAX_HEAD or len(self._headers) > MAX_FIELDS:
            self._reusable = False
            raise ProtocolViolation(_HEAD_TOO_LARGE)
        return None

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._reusable = False
            # Junk after a complete response costs the connection, not the response.
            if not self.complete:
                raise ProtocolViolation(self._fault or _describe(data, error)) from error
        if self._fault is not None:
            # Even if a whole response came along: the result must not depend on packet sizes.
            self._reusable = False
            raise ProtocolViolation(self._fault)

    def _end_of_stream(self) -> None:
        self._reusable = False
        head = self._head
        if head is None or head.chunked or head.content_length is not None:
            raise ConnectionLost("connection closed in the middle of the response")
        self.complete = True  # a body without a length ends with the connection

    def _count_overhead(self, data: bytes) -> None:
        """`data` brought no body: bound such bytes. Raises ProtocolViolation."""
        self._overhead += len(data)
        if self._overhead > MAX_OVERHEAD and not self.complete:
            self._reusable = False
            raise ProtocolViolation(
                f"more than {MAX_OVERHEAD} bytes of chunk framing or trailers without body data"
            )

    # -- results ------------------------------------------------------------------------------

    def take(self) -> bytes:
        """The part of the body that was received and not yet taken; b"" if there is none."""
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def saw_bytes(self) -> bool:
        """Whether the server has sent anything for the current request."""
        return self._head_bytes > 0

    @property
    def exhausted(self) -> bool:
        """Whether the whole response has been received and taken."""
        return self.complete and not self._parts

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent: the response is complete and without fault."""
        return self._reusable and self.complete


def _describe(data: bytes, error: Exception) -> str:
    """The error for data that is no HTTP response, in words for operators where known."""
    if data.startswith(_TLS_RECORDS):
        return "it speaks TLS: its url must begin with https://"
    if str(error).startswith("Expected HTTP/"):
        return "the response is not HTTP/1.1: check the port in the server's url"
    return str(error)
