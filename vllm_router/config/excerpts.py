"""A line of a configuration file with a mark below a position, for error messages. Pure."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import NamedTuple

SHOWN_COLUMNS = 100
"""Columns of a line in an excerpt; longer lines are cut around the position."""

COMMENT = "#"
"""The key of a comment among the values; comments are left out."""

# A password or a token in a URL, as `quoted` masks them.
_MAY_HOLD_SECRET = re.compile(r"@|://[^\"']*[?#]")


class Place(NamedTuple):
    """Offsets of a key and its value.

    A table has the offsets of its header, an element of an array the offset of its value as its
    key.
    """

    key: int
    start: int
    end: int


class Location(NamedTuple):
    """A position, both numbers from 1, and the line with a mark below; empty if it is not shown."""

    line: int
    column: int
    excerpt: str = ""


def located(
    text: str,
    values: Sequence[tuple[str, Place]],
    shown_keys: Collection[str],
    start: int,
    end: int,
) -> Location:
    """The position of `start`, and its line with a mark from there to `end`.

    `values` are the keys and places of the values and comments, at least of this line, in the
    order of the text. Values of other keys than `shown_keys` are masked.
    """
    first = text.rfind("\n", 0, start) + 1
    line = text.count("\n", 0, first) + 1
    last = text.find("\n", first)
    last = len(text) if last < 0 else last
    end = max(min(end, last), start + 1)
    # Secrets are replaced piece by piece; the mark moves with the text before it.
    pieces: list[tuple[str, bool]] = []
    at = first
    for key, place in values:
        if place.end <= at or place.start >= last:
            continue
        if key in shown_keys and not _MAY_HOLD_SECRET.search(text, place.start, place.end):
            continue
        pieces += _split(text, at, max(place.start, at), start, end)
        if key != COMMENT:
            pieces.append(("***", place.start < end and place.end > start))
        at = min(place.end, last)
    pieces += _split(text, at, last, start, end)
    shown = "".join(text for text, _ in pieces)
    marks = "".join(("^" if marked else " ") * _width(text) for text, marked in pieces)
    if "^" not in marks:  # the position is behind the last character of the line
        marks += "^"
    cut = max(0, marks.find("^") - SHOWN_COLUMNS // 2)
    if cut and len(shown) > SHOWN_COLUMNS:
        shown, marks = "…" + shown[cut + 1 :], marks[cut:]
    if len(shown) > SHOWN_COLUMNS:
        shown, marks = shown[: SHOWN_COLUMNS - 1] + "…", marks[:SHOWN_COLUMNS]
    margin = f"{line:>5} | "
    excerpt = f"{margin}{shown.rstrip()}\n{' ' * (len(margin) - 2)}| {marks.rstrip()}"
    return Location(line, start - first + 1, excerpt)


def _split(text: str, at: int, until: int, start: int, end: int) -> list[tuple[str, bool]]:
    """A stretch of a line in up to three pieces; the one from `start` to `end` is marked."""
    a, b = min(max(start, at), until), min(max(end, at), until)
    cuts = ((at, a, False), (a, b, True), (b, until, False))
    return [(_printable(text[i:j]), marked) for i, j, marked in cuts if i < j]


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " if char in "\t\r" else "?" for char in text)


def _width(text: str) -> int:
    """The columns that a terminal needs for it."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )
