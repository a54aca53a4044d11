"""What is wrong with a document that is no TOML, and where. Pure.

tomli says what it met, often behind the mistake. This module names the mistake and finds its place.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

import tomli

from vllm_router.config.excerpts import COMMENT, Location, Place, located
from vllm_router.config.positions import scan
from vllm_router.config.server_url import escaped

_EXPECTED = {
    "Unclosed array": "a comma, or ] at the end of the array",
    "Unclosed inline table": "a comma, or } at the end of the table",
    "Expected '=' after a key": "= after the key",
    "Expected newline or end of document": "the end of the line: each key has a line of its own",
    "Expected ']'": "] after the name of the table",
    "Expected ']]'": "]] after the name of the table",
    "Invalid initial character for a key part": "a key",
    "Invalid statement": "a key or the name of a table in brackets",
    "Invalid date": "a date that exists",
    "Unescaped '\\'": "\\\\ for a backslash, or the text in 'single quotes'",
    "Invalid hex value": "hexadecimal digits after the backslash",
    "Escaped character": "the number of a character after the backslash",
    "Cannot mutate immutable": "a table that is not complete already",
    "Cannot redefine namespace": "a table that is not complete already",
}
"""Beginnings of tomli's messages, the longest match counts, and what was expected."""
_TWICE = ("Cannot overwrite a value", "Cannot declare", "Duplicate inline table key")
_IN_TEXT = ("Illegal character", "Unterminated string", "Found invalid character", "Expected '\"'")
_TRIPLE = re.compile(r"\"{3}|'{3}")
_STRING = re.compile(r"\"(?:\\.|[^\"\\\n])*(\"?)|'[^'\n]*('?)")
_TOKEN = re.compile(
    r"(?P<space>[ \t\r]+)|(?P<comment>#[^\n]*)|(?P<mark>[\[\]{},=:])"
    r"|(?P<text>\"{3}(?:(?!\"{3})(?:\\.|[^\\\n]))*(?:\"{3})?|'{3}(?:(?!'{3})[^\n])*(?:'{3})?"
    r"|\"(?:\\.|[^\"\\\n])*\"?|'[^'\n]*'?)"
    r"|(?P<word>[^\s,:\[\]{}=#\"']+)|(?P<other>[^\n])"
)
_WORD = re.compile(r"[^\s,\]}#=:]+")
_BARE_KEY = re.compile(r"[A-Za-z0-9_.-]+")
# Base64 may end in =, so the value must look like one.
_ASSIGNED = re.compile(r"[ \t]*=[ \t]*(?:[\"'\[{+-]|\d|true|false)")


class Found(NamedTuple):
    """What is wrong, from `start` to `end` in the document."""

    text: str
    start: int
    end: int


def explain(
    error: tomli.TOMLDecodeError, known: Collection[str], shown_keys: Collection[str]
) -> tuple[str, Location]:
    """A problem in words, and its place.

    `known` are the keys and tables that a configuration may have; values are shown for
    `shown_keys` only.
    """
    document = error.doc
    found = _find(error.msg, document, error.pos)
    return found.text, excerpt_of(document, known, shown_keys, found.start, found.end)


def excerpt_of(
    document: str, known: Collection[str], shown_keys: Collection[str], start: int, end: int
) -> Location:
    """The place of a problem in a document that cannot be parsed."""
    values = _masked(document, document.rfind("\n", 0, start) + 1, known)
    return located(document, values, shown_keys, start, end)


def _find(message: str, document: str, at: int) -> Found:
    if message.startswith(_TWICE):
        return _twice(document, at)
    if message.startswith((*_IN_TEXT, "Expected \"'")):
        return _in_text(message, document, at)
    if message == "Invalid value":
        return _no_value(document, at)
    matching = [start for start in _EXPECTED if message.startswith(start)]
    if not matching:
        return Found("expected TOML, got a syntax error: " + "".join(map(escaped, message)), at, at)
    end = _word_end(document, at)
    return Found(f"expected {_EXPECTED[max(matching, key=len)]}{_got(document, at)}", at, end)


def _got(document: str, at: int) -> str:
    if at >= len(document):
        return ", got the end of the file"
    return ", got the end of the line" if document[at] == "\n" else ""


def _word_end(document: str, at: int) -> int:
    word = _WORD.match(document, at)
    return word.end() if word else at + 1


def _no_value(document: str, at: int) -> Found:
    if at >= len(document) or document[at] in "\n#,]}":
        return Found("expected a value after the =, got none", at, at + 1)
    kinds = "a text in quotes, a number, true, false, [ or {"
    return Found(f"expected a value: {kinds}", at, _word_end(document, at))


def _in_text(message: str, document: str, at: int) -> Found:
    """A text that is not closed, or holds a character that it may not hold."""
    ended = at >= len(document) or document[at] == "\n"
    if not ended:
        # Only control characters are refused.
        code = f"U+{ord(document[at]):04X}"
        return Found(f"expected no control character in a text, got {code}", at, at + 1)
    if message == 'Expected "\'"':
        start = document.rindex("'")
        line_end = document.find("\n", start)
        end = at if line_end < 0 else line_end
        return Found("expected a quote at the end of the text, got none", start, end)
    first = document.rfind("\n", 0, at) + 1
    for text in _STRING.finditer(document, first, at):
        if not (text[1] or text[2]):
            return Found("expected a quote at the end of the text, got none", text.start(), at)
    # In the line is no open text, so it began with three quotes, further up.
    start = at
    for quotes in _TRIPLE.finditer(document, 0, at):
        start = quotes.start()
    return Found("expected three quotes at the end of the text, got none", start, start + 3)


class _Places(dict[str, Place]):
    """Places of a document; `again` is the last value that has a path as an earlier one has.

    It has the path, the place of the first and the place of the last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.again: tuple[str, Place, Place] | None = None
        self._valued: dict[str, Place] = {}

    def __setitem__(self, path: str, place: Place) -> None:
        first = self._valued.setdefault(path, place)
        if first is not place:
            self.again = path, first, place
        super().__setitem__(path, place)


def _twice(document: str, at: int) -> Found:
    places = _Places()
    line_end = document.find("\n", at)
    line_start = document.rfind("\n", 0, at) + 1
    header = document[line_start:at].lstrip()
    if header.startswith("[") and "]" not in header:
        name = header.strip("[ \t")
        scan(document[:line_start], places, [])
        start = at - len(header)
        first = places.get(name)
        end = len(document) if line_end < 0 else line_end
        where = f": the first is in line {_line(document, first.key)}" if first else ""
        return Found(f"expected each table once, got [{name}] again{where}", start, end)
    scan(document[:at], places, [])
    if places.again is None:
        text = "expected each key once, got one that has a value already"
        return Found(text, at - len(header), at)
    path, first, last = places.again
    text = f"expected each key once, got {path} again: the first is in line"
    return Found(f"{text} {_line(document, first.key)}", last.key, last.start)


def _line(document: str, at: int) -> int:
    return document.count("\n", 0, at) + 1


def _masked(document: str, first: int, known: Collection[str]) -> list[tuple[str, Place]]:
    """The values and comments of the line at `first`, whatever it may be.

    Only a value that follows its key as TOML wants it has this key. From the first token that is
    out of place, everything is a value without a key.
    """
    values: list[tuple[str, Place]] = []
    key = ""
    expected = "key"
    open_brackets: list[tuple[str, str]] = []  # with the key that they are the value of
    at = first
    while token := _TOKEN.match(document, at):
        start, at = token.span()
        match token.lastgroup, token[0]:
            case "space", _:
                pass
            case "comment", _:
                values.append((COMMENT, Place(start, start, at)))
            case "mark", mark:
                if mark == "=" and expected == "=":
                    expected = "value"
                elif mark in "[{" and (expected == "value" or not (key or open_brackets)):
                    open_brackets.append((mark, key))
                    expected = "value" if mark == "[" and key else "key"
                elif mark in "]}" and expected != "nothing":
                    _, key = open_brackets.pop() if open_brackets else ("", "")
                    expected = "comma"
                elif mark == "," and expected == "comma":
                    bracket, key = open_brackets[-1] if open_brackets else ("", "")
                    expected = "value" if bracket == "[" and key else "key"
                else:
                    expected = "nothing"
            case "word", word if expected == "key" and _is_key(word, document, at, known):
                key, expected = word.rpartition(".")[2], "="
            case _:
                if expected != "value":
                    key, expected = "", "nothing"
                else:
                    expected = "comma"
                values.append((key, Place(start, start, at)))
    return values


def _is_key(word: str, document: str, end: int, known: Collection[str]) -> bool:
    if set(word.split(".")) & set(known):
        return True
    return _BARE_KEY.fullmatch(word) is not None and _ASSIGNED.match(document, end) is not None
