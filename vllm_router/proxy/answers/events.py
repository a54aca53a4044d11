"""Server-sent events: blocks of lines, decoded as the WHATWG specification says.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

_BOM = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BLOCK_END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")
_OUTSIDE = re.compile(rb"(?:[\r\n]|:[^\r\n]*[\r\n])+")
"""Whole comment lines and blank lines: one match for all that have come."""

DONE = "[DONE]"


class Event(NamedTuple):
    """One event. `payload` is its decoded data: `DONE`, JSON, or `NOT_JSON`.

    `data` is None if the block has no data line: such a block dispatches no event.
    """

    name: str
    data: bytes | None
    payload: Any


class _NotJson:
    """The payload of an event that is not JSON."""


NOT_JSON = _NotJson()


def decode_json(data: bytes) -> Any:
    """Decoded JSON, as Python's own decoder reads it (NaN, lone surrogates), or NOT_JSON.

    The fast decoder goes first. Nesting beyond the interpreter's limit is NOT_JSON.
    """
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        pass
    try:
        return json.loads(data.decode("utf-8-sig", "surrogatepass"))
    except (ValueError, RecursionError):
        return NOT_JSON


def decode_event(block: bytes) -> Event:
    """The event in a block of lines without its final blank line."""
    if block.startswith(b"data: ") and b"\n" not in block and b"\r" not in block:
        return _event("", block[6:])
    block = block.removeprefix(_BOM)
    name = ""
    data: list[bytes] = []
    for line in _LINE_END.split(block):
        field, _, value = line.partition(b":")
        if value.startswith(b" "):
            value = value[1:]
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode("utf-8", "replace")
    return _event(name, b"\n".join(data) if data else None)


def _event(name: str, data: bytes | None) -> Event:
    if not data or data.isspace():
        return Event(name, None if data is None else b"", None)
    stripped = data.strip()
    if stripped == b"[DONE]":
        return Event(name, data, DONE)
    return Event(name, data, decode_json(stripped))


def at_boundary(tail: bytes) -> bool:
    """Whether a stream that ends in `tail` stands between two events, or between two comments."""
    if not tail or tail.endswith((b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n")):
        return True
    if not tail.endswith((b"\n", b"\r")):
        return False
    # A comment line and its end are no part of an event; what stands before it may be.
    last = _LINE_END.split(tail.rstrip(b"\r\n"))
    return last[-1].startswith(b":") and (len(last) == 1 or not last[-2])


def block_start(data: bytes, before: int) -> int:
    """Where the last block begins that begins at `before` or earlier; 0 if there is no boundary."""
    found = (
        (data.rfind(b"\n\n", 0, before), 2),
        (data.rfind(b"\r\n\r\n", 0, before), 4),
        (data.rfind(b"\r\r", 0, before), 2),
    )
    return max(place + length if place >= 0 else 0 for place, length in found)


class BlockReader:
    """Cuts a stream into blocks, however it is cut into pieces. Linear in the bytes fed.

    `comments` collects whole comment lines and blank lines that stand outside of blocks: a client
    may have them at once. `pending` is what has come of a block or comment that has not ended.
    """

    def __init__(self) -> None:
        self.comments = bytearray()
        self._rest = bytearray()
        self._searched = 0
        self._in_block = False

    @property
    def pending(self) -> bytes:
        return bytes(self._rest)

    @property
    def empty(self) -> bool:
        return not self._rest

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The blocks that end in this piece, each with its final blank line."""
        rest = self._rest
        rest += piece
        while self._in_block or self._at_block():
            end = _BLOCK_END.search(rest, max(0, self._searched - 3))
            if end is None:
                self._searched = len(rest)
                return
            block = bytes(rest[: end.end()])
            self._drop(end.end())
            self._in_block = False
            yield block

    def _at_block(self) -> bool:
        """Move blank and comment lines at the front to `comments`; whether a block begins then."""
        rest = self._rest
        while rest:
            if rest[0] not in b":\r\n":
                self._in_block = True
                return True
            if rest[0] == ord(":") and _LINE_END.search(rest, self._searched) is None:
                self._searched = len(rest)
                return False
            lines = _OUTSIDE.match(rest)
            assert lines is not None  # it has a whole one
            self.comments += lines.group()
            self._drop(lines.end())
        return False

    def _drop(self, length: int) -> None:
        del self._rest[:length]
        self._searched = 0


def blocks_of(data: bytes) -> tuple[list[bytes], bytes]:
    """The whole blocks in `data`, and what stands behind the last of them."""
    reader = BlockReader()
    return list(reader.feed(data)), reader.pending
