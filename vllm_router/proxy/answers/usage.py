"""Token counts in answers, wherever they stand."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

_WINDOW = 1024
"""Bytes behind the key `usage` in which its counts stand (vLLM 0.32: 80 to 400)."""

MOST_TOKENS = 10**9
"""A count from here on is no count of tokens: one would distort the totals of a whole day."""

_KEY = b'"usage"'
_OBJECT = re.compile(rb'"usage"\s*:\s*(?=\{)')


class Usage(NamedTuple):
    """Tokens of the prompt, of its cached part, and of the answer; None if not reported."""

    prompt: int
    cached: int | None
    completion: int | None


def usage_of(usage: Any) -> Usage | None:
    """A decoded `usage` object, with OpenAI's names or Anthropic's; None if it counts nothing."""
    if not isinstance(usage, dict):
        return None
    prompt = _count(usage, "prompt_tokens", "input_tokens")
    if prompt is None:
        return None
    cached = _count(usage, "cache_read_input_tokens")
    if cached is None:
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
        cached = _count(details, "cached_tokens") if isinstance(details, dict) else None
    return Usage(prompt, cached, _count(usage, "completion_tokens", "output_tokens"))


def _count(fields: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_TOKENS:
            return value
    return None


class UsageScanner:
    """Finds the last `usage` in a JSON answer that is passed on in pieces, too long to be held.

    The key cannot stand in a text of the model: there its quotes are escaped.
    """

    def __init__(self) -> None:
        self._before = b""
        self._found = b""

    def feed(self, piece: bytes) -> None:
        data = self._before + piece
        place = data.rfind(_KEY)
        if place >= 0 and _OBJECT.match(data, place):
            self._found = data[place : place + _WINDOW]
        self._before = data[-_WINDOW:]

    @property
    def usage(self) -> Usage | None:
        start = self._found.find(b"{")
        if start < 0:
            return None
        try:
            # The object ends before the window does; what follows is not decoded.
            end = _end_of_object(self._found, start)
            return usage_of(msgspec.json.decode(self._found[start:end]))
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return None


def _end_of_object(data: bytes, start: int) -> int:
    """Where the object that begins at `start` ends: its values are numbers, null and objects."""
    depth = 0
    for place in range(start, len(data)):
        if data[place] == 0x7B:
            depth += 1
        elif data[place] == 0x7D:
            depth -= 1
            if not depth:
                return place + 1
    return len(data)
