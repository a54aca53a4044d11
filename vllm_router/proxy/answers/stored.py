"""The id of a response in the beginning of an answer of the Responses API. Pure."""

from __future__ import annotations

import re

import msgspec

MOST_EVENTS = 4
"""Events of a stream that are looked at: the first one has the id."""

_FIRST_KEY = re.compile(rb'\s*\{\s*"id"\s*:\s*"([^"\\]+)"')

_FIRST_EVENT = re.compile(
    rb'\s*\{(?:\s*"\w+"\s*:\s*(?:"[^"\\]*"|\d+)\s*,){0,4}'
    rb'\s*"response"\s*:\s*\{\s*"id"\s*:\s*"([^"\\]+)"'
)
"""Only short fields come before `response`, and none before its `id`."""


class _Response(msgspec.Struct, gc=False):
    id: str = ""


class _Event(msgspec.Struct, gc=False):
    response: _Response | None = None


_RESPONSE = msgspec.json.Decoder(_Response)
_EVENT = msgspec.json.Decoder(_Event)


def response_id(held: bytes, *, is_stream: bool) -> str | None:
    """The id in a plain body, or in the first events of a stream; None if it is not there.

    Both may be cut: then the id is found as the first key only, where vLLM 0.32 writes it. The
    first event repeats the instructions and tools of the request.
    """
    try:
        if is_stream:
            return _id_in_events(held)
        return _RESPONSE.decode(held).id or None
    except msgspec.ValidationError:
        return None
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        found = _FIRST_KEY.match(held)
        return found[1].decode("utf-8", "replace") if found is not None else None


def _id_in_events(held: bytes) -> str | None:
    place = 0
    for _ in range(MOST_EVENTS):
        start = held.find(b"data:", place)
        if start < 0:
            return None
        ends = [end for end in (held.find(b"\n", start), held.find(b"\r", start)) if end >= 0]
        place = min(ends, default=len(held))
        try:
            response = _EVENT.decode(held[start + 5 : place]).response
        except msgspec.MsgspecError:
            if ends:
                continue
            found = _FIRST_EVENT.match(held, start + 5)
            return found[1].decode("utf-8", "replace") if found is not None else None
        if response is not None and response.id:
            return response.id
    return None
