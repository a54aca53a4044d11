"""Heads that are said again and again, but for the digits of Content-Length.

A client that keeps its connection repeats itself in every request, and a server in every answer of
the same second. What is the same need not be parsed again.
"""

from __future__ import annotations

import re

Headers = list[tuple[bytes, bytes]]

MAX_LENGTH_DIGITS = 18
"""Of a Content-Length: just below 2**63, so that no program behind can overflow."""

_LENGTH_LINE = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)[ \t]*\r\n", re.IGNORECASE)


class Repeated:
    """The bytes of a head, and where its length stands: `place` among its fields."""

    __slots__ = ("_after", "_before", "place")

    def __init__(self) -> None:
        self._before = self._after = b""
        self.place = -1

    def note(self, head: bytes, headers: Headers) -> bool:
        """Remember a head that was parsed into these fields; False if it has not one length."""
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

    def length_of(self, data: bytes, end: int) -> bytes | None:
        """The digits in the head that `data` begins with, `end` bytes long; None if it is another
        than the one remembered."""
        before, after = self._before, self._after
        if self.place < 0 or not data.startswith(before):
            return None
        start, stop = len(before), end - len(after)
        digits = data[start:stop]
        if not digits.isdigit() or len(digits) > MAX_LENGTH_DIGITS or data[stop:end] != after:
            return None
        return digits

    def with_length(self, headers: Headers, digits: bytes) -> Headers:
        """The fields with this length; a list of their own."""
        fields = headers.copy()
        fields[self.place] = (b"content-length", digits)
        return fields
