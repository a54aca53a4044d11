"""Positions of the members of a JSON object, without building its values.

For bodies that are too long to be decoded at once, and bodies that Python's `json` accepts but
msgspec does not. In valid JSON it finds what a decoder finds, in slices and with little memory.
Invalid JSON is not detected; the server refuses it.
"""

from __future__ import annotations

import json
import re
from array import array
from itertools import accumulate

from vllm_router.errors import InvalidBody
from vllm_router.steps import Steps

DEEPEST = 500
"""Levels of nesting. Python up to 3.11 gives up before 1000, later ones at some thousands."""

MOST_MEMBERS = 4096
"""Members of the outermost object. vLLM's requests have about 100 different ones."""

LONG_STRING = 1 << 16
"""Bytes. Longer strings are recorded if they look like the data of an image or a sound."""

_MOST_TOKENS = 1 << 20
"""Strings, brackets, colons and commas that are scanned one by one: 0.2 µs each."""

_MOST_VALUES = 1 << 22
"""Strings, lists and objects on all levels: 0.3 µs each."""

_WINDOW = 1 << 12
"""Bytes of a window; each may be a token."""

_STRING_WINDOW = 1 << 18
"""Bytes of a string without escapes that are searched at once."""

_PER_YIELD = 4
"""Windows between two interruptions."""

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
# The outer repetition is not possessive: Python 3.11.0 to 3.11.4 would leave the end of the match
# within a string that the window cuts (https://github.com/python/cpython/issues/106052).
_COMPLETE = re.compile(rb'(?:[^"]*+' + _STRING + rb')*[^"]*+', re.DOTALL)
_STRINGS = re.compile(_STRING, re.DOTALL)
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_TOKENS = re.compile(_STRING + rb"|[{}\[\]:,]", re.DOTALL)
_DATA = re.compile(rb"[A-Za-z0-9+/=_:;,.\\-]*+")
"""Base64, perhaps with `data:image/png;base64,` before it; some encoders write `\\/`."""

_BLANK = b" \t\r\n"
_QUOTE, _COMMA, _ESCAPE = b'",\\'
_OPENING, _CLOSING = b"{[", b"}]"
_NOT_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))
_STEP = bytes(1 if byte in b"{[" else 255 for byte in range(256))
"""Brackets as signed bytes: +1 opens, -1 closes."""

_SAMPLE = 1024
_MOST_BLANKS = 1 << 16
_LONGEST_KEY = 160
"""Bytes of a key; no longer key is wanted."""


class Members:
    """The members of an object, as positions (start, end).

    spans: of the last value of each wanted key.
    models: of every value of `model`, as decoders differ in which of two counts.
    media: of the contents of long strings that look like base64.
    structure: number of bytes outside strings.
    """

    __slots__ = ("media", "models", "spans", "structure")

    def __init__(self) -> None:
        self.spans: dict[str, tuple[int, int]] = {}
        self.models: list[tuple[int, int]] = []
        self.media: list[tuple[int, int]] = []
        self.structure = 0


def scan(
    text: bytes, wanted: frozenset[str], start: int = 0, *, alone: bool = True
) -> Steps[Members | None]:
    """The members of the object that begins at `start` in UTF-8 `text`, with blanks around it.

    `alone` is False for an object with more text after it. None if it is not an object, or not
    complete. Raises InvalidBody beyond the limits above.
    """
    scanner = _Scanner(text, wanted)
    place = yield from _skip_blanks(text, start)
    if text[place : place + 1] != b"{":
        return None
    end = yield from scanner.run(place)
    if end < 0 or (alone and (yield from _skip_blanks(text, end)) < len(text)):
        return None
    return scanner.found


def _skip_blanks(text: bytes, place: int) -> Steps[int]:
    while place < len(text):
        window = text[place : place + _STRING_WINDOW]
        rest = window.lstrip(_BLANK)
        place += len(window) - len(rest)
        if rest:
            break
        yield
    return place


class _Scanner:
    def __init__(self, text: bytes, wanted: frozenset[str]) -> None:
        self._text = text
        self._wanted = wanted
        self.found = Members()
        self._depth = 0
        self._last = (0, 0)
        """The last string on the first level: possibly a key."""
        self._value_at = -1
        self._key: str | None = None
        self._members = self._tokens = self._values = 0

    def run(self, place: int) -> Steps[int]:
        """The end of the object that begins at `place`; -1 if it has none."""
        text, size = self._text, len(self._text)
        windows = 0
        while place < size:
            windows += 1
            if windows % _PER_YIELD == 0:
                yield
            whole = _COMPLETE.match(text, place, place + _WINDOW)
            end = place if whole is None else whole.end()
            if end == place:
                end = yield from self._long_string(place)
                if end < 0:
                    return -1
            elif not self._skip(place, end):
                ended = self._look_at(place, end)
                if ended >= 0:
                    return ended
                yield
            place = end
        return -1

    def _skip(self, place: int, end: int) -> bool:
        """Skip a window of complete strings if no member begins or ends in it; else False."""
        window = self._text[place:end]
        rest = _STRINGS.sub(b"", window)
        self.found.structure += len(rest)
        brackets = rest.translate(None, _NOT_BRACKETS)
        closing = brackets.count(b"}") + brackets.count(b"]")
        opening = len(brackets) - closing
        deepest, lowest = self._depth + opening, self._depth - closing
        if deepest > DEEPEST or lowest < 2 <= self._depth:
            depths = list(accumulate(array("b", brackets.translate(_STEP)), initial=self._depth))
            deepest, lowest = max(depths), min(depths)
        self._values += window.count(b'"') // 2 + opening
        if self._values > _MOST_VALUES:
            raise InvalidBody("The request body has too many values to be read.")
        if deepest > DEEPEST:
            raise InvalidBody(f"The request body is nested deeper than {DEEPEST} levels.")
        if lowest < 2:
            return False
        self._depth += opening - closing
        return True

    def _look_at(self, place: int, end: int) -> int:
        """Scan the tokens of a window. The end of the object if it is in the window; else -1."""
        text, depth = self._text, self._depth
        for token in _TOKENS.finditer(text, place, end):
            self._tokens += 1
            at = token.start()
            byte = text[at]
            if byte in _CLOSING:
                depth -= 1
                if depth == 0:
                    self._end_member(at)
                    return at + 1
            elif byte in _OPENING:
                depth += 1
            elif depth == 1:
                if byte == _QUOTE:
                    self._last = token.span()
                elif byte == _COMMA:
                    self._end_member(at)
                elif self._value_at < 0:
                    self._begin_member(at + 1)
        if self._tokens > _MOST_TOKENS:
            raise InvalidBody("The request body has too many values to be read.")
        self._depth = depth
        return -1

    def _begin_member(self, place: int) -> None:
        start, end = self._last
        self._value_at = place
        raw = self._text[start:end] if end - start <= _LONGEST_KEY else b""
        self._key = _key(raw)

    def _end_member(self, end: int) -> None:
        start, self._value_at = self._value_at, -1
        if start < 0:
            return
        self._members += 1
        if self._members > MOST_MEMBERS:
            raise InvalidBody(f"The request body has more than {MOST_MEMBERS} members.")
        if self._key is not None and self._key in self._wanted:
            start = self._first_of(start, end)
            self.found.spans[self._key] = (start, end)
            if self._key == "model":
                self.found.models.append((start, end))

    def _first_of(self, start: int, end: int) -> int:
        """The start of the value, after blanks."""
        window = self._text[start : min(end, start + _MOST_BLANKS)]
        rest = window.lstrip(_BLANK)
        if not rest:
            raise InvalidBody("The request body has no value, or too many blanks, after a colon.")
        return start + len(window) - len(rest)

    def _long_string(self, place: int) -> Steps[int]:
        """Skip a string that is longer than a window. Its end; -1 if it has none."""
        end = yield from _string_end(self._text, place)
        if end < 0:
            return -1
        if self._depth == 1:
            self._last = (place, end)
        if end - place > LONG_STRING and _is_data(self._text, place + 1, end - 1):
            self.found.media.append((place + 1, end - 1))
        return end


def _string_end(text: bytes, place: int) -> Steps[int]:
    """The end of the string whose first quote is at `place`; -1 if it has none.

    Searches for quotes, as most long strings contain none, and scans tokens only after an escaped
    quote.
    """
    at, size = place + 1, len(text)
    while at < size:
        stop = min(at + _STRING_WINDOW, size)
        quote = text.find(b'"', at, stop)
        end = stop if quote < 0 else quote
        if text[end - 1] != _ESCAPE or not _ends_escaped(text, at, end):
            if quote >= 0:
                return quote + 1
            at = stop
        elif quote < 0:
            if stop == size:
                return -1
            at = stop + 1
        else:
            inside = _IN_STRING.match(text, quote + 1, quote + 1 + 4 * _WINDOW)
            at = quote + 1 if inside is None else inside.end()
            if at < size and text[at] == _QUOTE:
                return at + 1
        yield
    return -1


def _ends_escaped(text: bytes, start: int, end: int) -> bool:
    """Whether the byte at `end` is escaped: it follows an odd number of backslashes."""
    window = text[start:end]
    return (len(window) - len(window.rstrip(b"\\"))) % 2 == 1


def _is_data(text: bytes, start: int, end: int) -> bool:
    samples = (text[start : start + _SAMPLE], text[end - _SAMPLE : end])
    return all(_DATA.fullmatch(sample) for sample in samples)


def _key(raw: bytes) -> str | None:
    """The decoded key; None if it is invalid."""
    if b"\\" not in raw:
        return raw[1:-1].decode("utf-8", "surrogateescape")
    try:
        key: str = json.loads(raw)
    except ValueError:
        return None
    return key
