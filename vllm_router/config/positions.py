"""Where the keys and values of a TOML document are, for error messages. Pure.

tomli reports no positions, so a document in which a problem was found is scanned again. The scanner
expects a document that tomli accepts (TOML 1.0, and the line breaks in inline tables of 1.1).
"""

from __future__ import annotations

import re
from collections.abc import Collection

import tomli

from vllm_router.config.excerpts import COMMENT, Location, Place, located
from vllm_router.config.server_url import joined

_COMMENTS = re.compile(r"#[^\n]*")
_SPACE = re.compile(r"[ \t]*")
_BETWEEN = re.compile(r"(?:[ \t\r\n,]|#[^\n]*)*")
_KEY = re.compile(r"[A-Za-z0-9_-]+|\"(?:\\.|[^\"\\\n])*\"|'[^'\n]*'")
_DOT = re.compile(r"[ \t]*\.[ \t]*")
_VALUE = re.compile(
    r"\"{3}(?:\\.|[^\\])*?\"{3,5}(?!\")"
    r"|'{3}.*?'{3,5}(?!')"
    r"|\"(?:\\.|[^\"\\\n])*\""
    r"|'[^'\n]*'"
    r"|\d{4}-\d{2}-\d{2} \d{2}[^\s,\]}#]*"
    r"|[^\s,\]}#]+",
    re.DOTALL,
)
_LAST_PART = re.compile(r"(?:\.[^.\[\"]+|\.\"(?:\\.|[^\"\\])*\"|\[\d+\])\Z")


class Positions:
    """The places of all keys of a document, by path as in error messages."""

    def __init__(self, data: bytes, shown_keys: Collection[str] = ()) -> None:
        """`shown_keys` have values that are no secrets.

        Excerpts mask all other values, and have no comments.
        """
        self._text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
        self._shown_keys = shown_keys
        self._places: dict[str, Place] = {}
        self._values: list[tuple[str, Place]] = []
        if not scan(self._text, self._places, self._values):
            self._places.clear()

    def __contains__(self, path: str) -> bool:
        return path in self._places

    def find(self, path: str, *, at_key: bool = False) -> Location | None:
        """The position of a key's value, or with `at_key` of the key.

        For a missing key, the position of the nearest table that would hold it; None without one.
        """
        missing = False
        while path not in self._places:
            shorter = _LAST_PART.sub("", path)
            if shorter == path or not shorter:
                return None
            path, missing = shorter, True
        place = self._places[path]
        start, end = place.start, place.end
        if at_key and not missing:
            start = place.key
            end = start + len(path.rpartition(".")[2])
        return located(self._text, self._values, self._shown_keys, start, end)


def scan(text: str, places: dict[str, Place], values: list[tuple[str, Place]]) -> bool:
    """Fill `places` by path and `values` by key with what a document holds.

    False if the scanner does not understand the document; they are filled up to there.
    """
    try:
        _Scanner(text, places, values).document()
    except (_Lost, RecursionError):
        return False
    return True


class _Lost(Exception):
    """The scanner does not understand the document."""


class _Scanner:
    """One pass over a document.

    Fills `places`, and `values` with the key and the place of every value that is no table or array
    and of every comment, in the order of the text.
    """

    def __init__(
        self, text: str, places: dict[str, Place], values: list[tuple[str, Place]]
    ) -> None:
        self._text = text
        self._at = 0
        self._places = places
        self._values = values
        self._arrays: dict[str, int] = {}

    def document(self) -> None:
        table = ""
        while True:
            self._skip_between()
            if self._at >= len(self._text):
                return
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)

    def _skip_between(self) -> None:
        start = self._at
        self._skip(_BETWEEN)
        for found in _COMMENTS.finditer(self._text, start, self._at):
            self._values.append((COMMENT, Place(found.start(), *found.span())))

    def _skip(self, pattern: re.Pattern[str]) -> None:
        found = pattern.match(self._text, self._at)
        if found is not None:
            self._at = found.end()

    def _expect(self, mark: str) -> None:
        if not self._text.startswith(mark, self._at):
            raise _Lost
        self._at += len(mark)

    def _header(self) -> str:
        """Read `[a.b]` or `[[a.b]]`; returns the table's path."""
        start = self._at
        array = self._text.startswith("[[", start)
        self._at += 2 if array else 1
        self._skip(_SPACE)
        parts = self._key()
        self._skip(_SPACE)
        self._expect("]]" if array else "]")
        path = ""
        for number, part in enumerate(parts, 1):
            path = joined(path, part)
            if array and number == len(parts):
                self._arrays[path] = self._arrays.get(path, -1) + 1
                self._places.setdefault(path, Place(start, start, self._at))
            if path in self._arrays:
                path = f"{path}[{self._arrays[path]}]"
            self._places.setdefault(path, Place(start, start, self._at))
        return path

    def _key(self) -> list[str]:
        parts = []
        while True:
            found = _KEY.match(self._text, self._at)
            if found is None:
                raise _Lost
            self._at = found.end()
            part = found[0]
            parts.append(tomli.loads(f"k = {part}")["k"] if part[0] in "\"'" else part)
            dot = _DOT.match(self._text, self._at)
            if dot is None:
                return parts
            self._at = dot.end()

    def _pair(self, table: str) -> None:
        start = self._at
        path = table
        parts = self._key()
        self._skip(_SPACE)
        self._expect("=")
        self._skip(_SPACE)
        for part in parts:
            path = joined(path, part)
            self._places.setdefault(path, Place(start, self._at, self._at + 1))
        self._value(path, parts[-1], start)

    def _value(self, path: str, key: str, key_start: int) -> None:
        start = self._at
        opening = self._text[start : start + 1]
        if opening == "{":
            self._at += 1
            while self._more("}"):
                self._pair(path)
        elif opening == "[":
            self._at += 1
            number = 0
            while self._more("]"):
                self._value(f"{path}[{number}]", key, self._at)
                number += 1
        else:
            found = _VALUE.match(self._text, start)
            if found is None:
                raise _Lost
            self._at = found.end()
            self._values.append((key, Place(key_start, start, self._at)))
        self._places[path] = Place(key_start, start, self._at)

    def _more(self, closing: str) -> bool:
        """Skip to the next element; False, and behind the bracket, at the end."""
        self._skip_between()
        if self._text.startswith(closing, self._at):
            self._at += 1
            return False
        if self._at >= len(self._text):
            raise _Lost
        return True
