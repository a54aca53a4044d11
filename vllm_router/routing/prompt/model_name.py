"""Where the model's name is in a JSON body, and the body with another name in it. Pure."""

from __future__ import annotations

import re

import msgspec

from vllm_router.routing.prompt.json_scan import scan
from vllm_router.routing.prompt.steps import Steps, finish

_TEXT = re.compile(rb'[ \t\r\n]*:[ \t\r\n]*("[^"\\]*+(?:\\.[^"\\]*+)*+")', re.DOTALL)
_KEY = b'"model"'
_ESCAPED_LETTER = b"\\u006"
"""Every letter of `model` is written so if it is written as an escape."""

EDITED_AT_ONCE = 1 << 16
"""Bytes of a body in which the model is looked for without a break: 7 ms in the worst case."""

_MODEL = frozenset({"model"})


def json_name(model: str) -> bytes:
    """The name of a model as it stands in JSON."""
    return msgspec.json.encode(model)


def has_one_model(body: bytes) -> bool:
    """Whether the body has the key `model` but once, on whatever level. 1 ms per MB."""
    return body.count(_KEY) == 1 and _ESCAPED_LETTER not in body


def model_places(body: bytes) -> Steps[tuple[tuple[int, int], ...]]:
    """Where the texts of the outermost `model` are in UTF-8 JSON. Raises InvalidBody.

    Parsers take the last, so all are to be replaced.
    """
    if has_one_model(body):
        text = _TEXT.match(body, body.index(_KEY) + len(_KEY))
        return () if text is None else (text.span(1),)
    members = yield from scan(body, _MODEL)
    if members is None:
        return ()
    return tuple(filter(None, (name_place(body, *span) for span in members.models)))


def name_place(body: bytes, start: int, end: int) -> tuple[int, int] | None:
    """Where the string is in the value at this place, with blanks around it; None if it is none.

    A value that is longer than any name and its blanks is none.
    """
    value = body[start : min(end, start + _LONGEST_VALUE)]
    text = value.lstrip(_BLANK)
    if text[:1] != b'"':
        return None
    begin = start + len(value) - len(text)
    return begin, begin + len(text.rstrip(_BLANK))


_BLANK = b" \t\r\n"
_LONGEST_VALUE = 1 << 16


def with_model(body: bytes, model: str) -> bytes:
    """The body with another model in it: the one edit that is allowed.

    `body` is a JSON object that has a string as its `model`; only that string is replaced, all
    other bytes stay. O(1) in Python where the word stands there but once, as it nearly always
    does. Raises InvalidBody for a body with very many members.
    """
    name = json_name(model)
    parts: list[bytes] = []
    place = 0
    for start, end in finish(model_places(body)):
        parts += (body[place:start], name)
        place = end
    parts.append(body[place:])
    return b"".join(parts)
