"""Decoder of the chunked transfer coding (RFC 9112 7.1), without sockets."""

from __future__ import annotations

import re

from vllm_router.http.http_error import bad_request

# RFC 9112 7.1, without the whitespace that it tolerates before `;` (as llhttp and h11 do).
# Extensions are dropped unread, but must not contain control characters.
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t -~\x80-\xff]*)?\r\n")
_TRAILER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[\t -~\x80-\xff]*\r\n")

# RFC 9110 6.5.1: trailers must not change how the message is framed.
_FRAMING = frozenset({b"content-length", b"transfer-encoding", b"host"})

MAX_CHUNK_LINE = 4096
"""Bytes of a chunk's size line."""

MAX_TRAILERS = 16384
"""Bytes of all trailers together."""

MAX_EXCESS = 16384
"""Bytes of framing beyond 16 per chunk plus twice its data; the rule of Go's net/http."""

MAX_PIECES = 1000
"""Chunks decoded in one call: one read may hold thousands of them, some microseconds each."""

_SIZE, _DATA, _DATA_END, _TRAILERS, _DONE = range(5)


class ChunkedBody:
    """Decodes the body of one request. Extensions and trailers are dropped."""

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
        """Decode `data`; the pieces of the body, and the number of bytes used. Raises HttpError.

        Once `complete`, the unused bytes belong to the next request. Before that they must be fed
        again after a checkpoint: MAX_PIECES have been decoded.
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
        limit = MAX_CHUNK_LINE if self._state == _SIZE else MAX_TRAILERS
        if len(line) > limit or b"\r" in line[:-1] or (self._state == _DATA_END and line != b"\r"):
            raise bad_request("malformed chunk")

    def _take_line(self, line: bytes) -> None:
        if self._state == _SIZE:
            match = _CHUNK_SIZE.fullmatch(line) if len(line) <= MAX_CHUNK_LINE else None
            if match is None:
                raise bad_request("malformed chunk size")
            self._left = int(match[1], 16)
            self._excess = max(0, self._excess + len(line) - 16 - 2 * self._left)
            if self._excess > MAX_EXCESS:
                raise bad_request("chunked body with too much framing for its data")
            self._state = _DATA if self._left else _TRAILERS
        elif self._state == _DATA_END:
            if line != b"\r\n":
                raise bad_request("chunk longer than its size")
            self._state = _SIZE
        elif line == b"\r\n":
            self._state = _DONE
        else:
            self._trailers += len(line)
            match = _TRAILER.fullmatch(line)
            if match is None or self._trailers > MAX_TRAILERS or match[1].lower() in _FRAMING:
                raise bad_request("malformed trailer")
