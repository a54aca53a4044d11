"""A safe parser of a server's `/v1/models`: no name can harm a page, a log line or a metric.

A list is rejected only if it is not JSON or too large. Unusable entries are left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vllm_router.config.server_url import quoted
from vllm_router.errors import UnusablePage

MAX_LIST_BYTES = 1024 * 1024
"""Bytes of a list. vLLM 0.32 writes about 450 per model or adapter."""

MAX_MODELS = 2048
"""Models of one server; pages that show a server list all of them."""

MAX_NAME = 512
"""Characters of a model's name."""

MAX_VALUES = 60_000
"""JSON values of a list; 2048 entries of vLLM 0.32 have 45 000. Decoding them takes 5 ms."""

MAX_BRACKETS = 200
"""Brackets (and so the depth) of an entry that is passed on unchanged. vLLM 0.32 has four."""

PASSED_ON = 16_384
"""Bytes of an entry that is passed on unchanged; of a longer one only `id` and length are."""

MAX_ENTRY = 65_536
"""Bytes of an entry; longer ones are left out."""

STEP = 65_536
"""Bytes of entries parsed per step: 1 ms."""

LOOSE = 131_072
"""Bytes of a list that is parsed by Python's lenient decoder, which is ten times as slow."""

_REPLACEMENT = "\ufffd"

_NO_LIST = "it is not a JSON object with an array `data`"

Card = dict[str, Any]


class _Page(msgspec.Struct):
    data: list[msgspec.Raw]


class _LongCard(msgspec.Struct):
    id: str
    max_model_len: int | None = None


_decode_page = msgspec.json.Decoder(_Page).decode
_decode_long_card = msgspec.json.Decoder(_LongCard).decode


@dataclass(slots=True)
class ModelList:
    """The usable entries by id, as the server gave them; `left_out` counts the others."""

    cards: dict[str, Card] = field(default_factory=dict)
    left_out: int = 0
    problem: str = ""
    """The reason of the first entry that was left out."""

    def leave_out(self, problem: str) -> None:
        self.left_out += 1
        self.problem = self.problem or problem


def read_model_list(page: bytes) -> Iterator[ModelList]:
    """Parse the list in steps; the last yielded value is complete.

    The caller may let other tasks run between two steps. Raises UnusablePage.
    """
    found = ModelList()
    done = 0
    for entry in _entries(page):
        _take(found, entry)
        done += len(entry) if isinstance(entry, bytes) else STEP // 64
        if done >= STEP:
            done = 0
            yield found
    yield found


def _entries(page: bytes) -> Sequence[bytes | object]:
    """The entries of the list as bytes; decoded if the list is not strict JSON."""
    if len(page) > MAX_LIST_BYTES:
        raise UnusablePage(f"it is longer than {MAX_LIST_BYTES} bytes")
    if page.count(b",") + page.count(b"[") + page.count(b"{") > MAX_VALUES:
        raise UnusablePage(f"it has more than {MAX_VALUES} values")
    entries: Sequence[bytes | object]
    try:
        entries = [bytes(entry) for entry in _decode_page(page).data]
    except (msgspec.DecodeError, RecursionError):
        entries = _entries_read_loosely(page)
    if len(entries) > MAX_MODELS:
        raise UnusablePage(f"it has more than {MAX_MODELS} entries")
    return entries


def _entries_read_loosely(page: bytes) -> list[object]:
    """Parse what Python accepts beyond strict JSON: NaN, lone surrogates (`"\\ud800"`)."""
    if len(page) > LOOSE:
        raise UnusablePage(_NO_LIST)
    try:
        read = json.loads(page.decode("utf-8", "replace"), parse_constant=lambda _: None)
    except RecursionError:
        raise UnusablePage("it is nested too deeply") from None
    except ValueError:
        raise UnusablePage("it is not JSON") from None
    entries = read.get("data") if isinstance(read, dict) else None
    if not isinstance(entries, list):
        raise UnusablePage(_NO_LIST)
    return entries


def _take(found: ModelList, entry: bytes | object) -> None:
    """Add one entry to the list, or leave it out."""
    card = entry
    if isinstance(entry, bytes):
        if len(entry) > MAX_ENTRY:
            found.leave_out(f"an entry is longer than {MAX_ENTRY} bytes")
            return
        try:
            if len(entry) > PASSED_ON:
                card = msgspec.structs.asdict(_decode_long_card(entry))
            else:
                card = msgspec.json.decode(entry)
        except (msgspec.DecodeError, RecursionError):
            found.leave_out("an entry cannot be read")
            return
    name = card.get("id") if isinstance(card, dict) else None
    problem = _name_problem(name)
    if problem:
        found.leave_out(problem)
        return
    assert isinstance(card, dict)
    assert isinstance(name, str)
    long = isinstance(entry, bytes) and len(entry) > PASSED_ON
    found.cards[name] = card if not long and _can_be_passed_on(card) else _plain_card(card)


def _name_problem(name: object) -> str:
    """The reason why a name is unusable; empty if it is usable."""
    if not isinstance(name, str) or not name:
        return "an id is not a string"
    if len(name) > MAX_NAME:
        return f"a name has more than {MAX_NAME} characters: {quoted(name)}"
    if not name.isprintable() or _REPLACEMENT in name:
        return f"a name has characters that cannot be printed: {quoted(name)}"
    return ""


def _can_be_passed_on(card: Card) -> bool:
    """Whether the entry can be encoded again without deep recursion."""
    try:
        written = msgspec.json.encode(card)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return False
    return written.count(b"[") + written.count(b"{") <= MAX_BRACKETS


def _plain_card(card: Card) -> Card:
    """A minimal entry with the name and the context length."""
    plain: Card = {"id": card["id"], "object": "model"}
    length = card.get("max_model_len")
    if isinstance(length, int) and not isinstance(length, bool) and 0 < length < 2**53:
        plain["max_model_len"] = length
    return plain
