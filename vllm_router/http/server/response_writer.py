"""Encoder of one response: ASGI messages in, framed HTTP/1.1 out. No sockets."""

from __future__ import annotations

from vllm_router.http.asgi_types import Message
from vllm_router.http.request_head import Head
from vllm_router.http.syntax import NO_BODY, STATUS_LINES, http_date

# How the end of the body is marked.
_CHUNKED, _LENGTH, _UNTIL_CLOSE, _NO_BODY = range(4)

# Hop-by-hop fields, which the server decides (RFC 9110 7.6.1).
_CONNECTION_FIELDS = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_HANDLED_FIELDS = _CONNECTION_FIELDS | {b"content-length", b"date"}


class ResponseWriter:
    """Encodes the messages of one response; the caller sends the bytes.

    `close`: whether the connection ends after this response; final once `started`.
    """

    __slots__ = ("_framing", "_head", "_remaining", "_start", "close", "finished", "started")

    def __init__(self, head: Head) -> None:
        self._head = head
        self._start: Message | None = None
        self._framing = _LENGTH
        self._remaining = 0
        self.close = not head.keep_alive
        self.started = False
        self.finished = False

    @property
    def looks_complete(self) -> bool:
        """Whether the client would take an orderly close now for the end of the response."""
        return self.finished or (self.started and self._framing == _UNTIL_CLOSE)

    def hold(self, start: Message) -> None:
        """Keep http.response.start until the first part of the body: one segment for both."""
        if self._start is not None or self.started:
            raise RuntimeError("http.response.start sent twice")
        self._start = start

    def encode(self, message: Message, *, close: bool) -> bytes:
        """Encode one http.response.body. With `close`, the head says `connection: close`.

        Raises RuntimeError for messages that do not form a response; then nothing may be sent.
        """
        body = message.get("body", b"")
        more = message.get("more_body", False)
        if self.started:
            if self.finished:
                raise RuntimeError("http.response.body sent after the end of the response")
            data = self._frame(body, more)
        elif self._start is not None:
            head = self._begin(self._start, None if more else len(body), self.close or close)
            data = b"%b\r\n%b" % (head, self._frame(body, more))
            self.started = True
        else:
            raise RuntimeError("http.response.body sent before http.response.start")
        if not more:
            self.finished = True
        return data

    def whole(self, start: Message, body: bytes, *, close: bool) -> bytes:
        """Encode a response whose body is one message: `hold` and `encode` in one step."""
        if self._start is not None or self.started:
            raise RuntimeError("http.response.start sent twice")
        head = self._begin(start, len(body), self.close or close)
        if self._framing != _LENGTH or self._remaining != len(body):
            body = self._frame(body, more=False)
        self.started = self.finished = True
        return b"%b\r\n%b" % (head, body)

    def part(self, piece: bytes) -> bytes:
        """Encode a piece of a body that has begun; more follows."""
        if self._framing == _CHUNKED and piece:
            return b"%x\r\n%b\r\n" % (len(piece), piece)
        return self._frame(piece, more=True)

    def _begin(self, start: Message, known: int | None, close: bool) -> bytes:
        """Status line and fields. `known`: length of the body if this message has all of it."""
        head = self._head
        status = start["status"]
        line = STATUS_LINES.get(status)
        if line is None:
            if not 200 <= status <= 999:
                raise RuntimeError(f"{status} is not a valid status of a response")
            line = b"HTTP/1.1 %d \r\n" % status
        lines = [line]
        length: int | None = None
        dated = False
        for name, value in start.get("headers", ()):
            field = name.lower()
            if field in _HANDLED_FIELDS:
                if field == b"content-length":
                    length = int(value)
                    if status == 204:  # RFC 9110 8.6: MUST NOT
                        continue
                elif field == b"date":
                    dated = True
                else:
                    if field == b"connection" and b"close" in value.lower():
                        close = True
                    continue
            lines.append(field + b": " + value + b"\r\n")
        if not dated:
            lines.append(b"date: %b\r\n" % http_date())
        if status in NO_BODY or head.method == "HEAD":
            self._framing = _NO_BODY
        elif length is not None:
            self._remaining = length
        elif known is not None:
            self._remaining = known
            lines.append(b"content-length: %d\r\n" % known)
        elif head.http_version == "1.1":
            self._framing = _CHUNKED
            lines.append(b"transfer-encoding: chunked\r\n")
        else:
            self._framing = _UNTIL_CLOSE
            close = True
        if close:
            lines.append(b"connection: close\r\n")
        elif head.http_version == "1.0":
            lines.append(b"connection: keep-alive\r\n")
        block = b"".join(lines)
        # Exactly one CR and one LF per line, and no NUL.
        if len(block.translate(None, b"\r\n\0")) != len(block) - 2 * len(lines):
            raise RuntimeError("control character in a header field of the response")
        self.close = close
        return block

    def _frame(self, body: bytes, more: bool) -> bytes:
        framing = self._framing
        if framing == _CHUNKED:
            if body:
                if more:
                    return b"%x\r\n%b\r\n" % (len(body), body)
                return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            return b"" if more else b"0\r\n\r\n"
        if framing == _NO_BODY:
            return b""
        if framing == _LENGTH:
            self._remaining -= len(body)
            if self._remaining < 0 or (self._remaining and not more):
                raise RuntimeError("the body does not match its Content-Length")
        return body
