"""The prompt in a JSON body whose members are known by their places.

It is the one that `facts` finds in a body that is read at once, so a conversation keeps its hashes
when it grows; beyond a bound it is hashed as it stands.
"""

from __future__ import annotations

from zlib import crc32

import msgspec

from vllm_router.routing.prompt.blocks import Prompt
from vllm_router.routing.prompt.content import MAX_VALUES, MEDIA_SAMPLE
from vllm_router.routing.prompt.conversation import messages_in, plain_prompt, raw_prompt
from vllm_router.routing.prompt.fields import NO_JSON, AllFields
from vllm_router.routing.prompt.forms import LONGEST_NAME
from vllm_router.routing.prompt.json_scan import Members
from vllm_router.routing.prompt.routing_info import AT_ONCE, read_prompt, seed_of
from vllm_router.routing.prompt.steps import Steps

_LOOKED_INTO = 1 << 22
"""Bytes of a prompt, without its pictures and sounds, that are looked into: 1 million tokens."""

_STRUCTURE_LOOKED_INTO = 1 << 18
"""Bytes outside strings of a long body that is looked into. What is mostly text is read fast."""

_HASHED = 1 << 23
"""Bytes of a longer prompt that are hashed: 2 ms, and more than two million tokens."""

_COUNTED_AT_ONCE = 1 << 20


class Values:
    """The values of the members, the data of pictures and sounds replaced by checksums.

    The checksums are those of `pieces`, so a conversation has the same hashes when it grows long.
    """

    def __init__(self, text: bytes, members: Members) -> None:
        self._text = text
        self._members = members

    def span(self, name: str) -> tuple[int, int]:
        """Where the value begins and ends; an empty place if it is absent."""
        return self._members.spans.get(name, (0, 0))

    def short(self, name: str) -> msgspec.Raw:
        """The value as it stands there; of a long one only that it is one."""
        start, end = self.span(name)
        value = self._text[start : min(end, start + 2 * LONGEST_NAME)]
        return msgspec.Raw(value.strip() or value)

    def pieces(self, name: str) -> list[memoryview | bytes]:
        """The whole value, without a copy of what is long."""
        at, end = self.span(name)
        view = memoryview(self._text)
        found: list[memoryview | bytes] = []
        for start, stop in self._members.media:
            if at <= start < end:
                found += (view[at:start], _checksum(view[start:stop]))
                at = stop
        found.append(view[at:end])
        return found

    def whole(self, name: str) -> msgspec.Raw:
        """The whole value; NO_JSON if it is absent."""
        if name not in self._members.spans:
            return NO_JSON
        return msgspec.Raw(b"".join(self.pieces(name)).strip())

    @property
    def is_looked_into(self) -> bool:
        size = len(self._text) - sum(end - start for start, end in self._members.media)
        if size <= AT_ONCE:
            return True
        return size <= _LOOKED_INTO and self._members.structure <= _STRUCTURE_LOOKED_INTO


def _checksum(data: memoryview) -> bytes:
    return b"%d:%d" % (len(data), crc32(data[-MEDIA_SAMPLE:], crc32(data[:MEDIA_SAMPLE])))


_ABOUT_PROMPT = ("tools", "system", "instructions")


def long_prompt(values: Values) -> Steps[Prompt]:
    """The prompt of a body that is not read at once: as `facts` reads it, if it is not too long."""
    yield
    if values.is_looked_into:
        prompt = _short_prompt(values)
        if prompt is not None:
            return prompt
    seed = seed_of(values.whole("cache_salt"))
    for name in ("messages", "input"):
        if values.span(name) != (0, 0):
            head = [piece for about in _ABOUT_PROMPT for piece in values.pieces(about)]
            return _hashed([*head, *values.pieces(name)], seed)
    return (yield from _long_plain_prompt(values, seed))


def _short_prompt(values: Values) -> Prompt | None:
    """As `facts` makes it; None if something in it is not what it should be."""
    given = values.whole("messages")
    if bytes(given).count(b"{") > MAX_VALUES:
        return None
    try:
        fields = AllFields(
            messages=messages_in(given) if bytes(given) not in (b"", b"null") else None,
            tools=values.whole("tools"),
            system=values.whole("system"),
            instructions=values.whole("instructions"),
            prompt=values.whole("prompt"),
            input=values.whole("input"),
            cache_salt=values.whole("cache_salt"),
        )
        return read_prompt(fields)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None


def _hashed(pieces: list[memoryview | bytes], seed: int) -> Prompt:
    """The prompt that these bytes make up, hashed as far as that is fast."""
    size, first = 0, []
    for piece in pieces:
        if size < _HASHED:
            first.append(piece[: _HASHED - size])
        size += len(piece)
    return msgspec.structs.replace(raw_prompt(*first, seed=seed), size=size)


def _long_plain_prompt(values: Values, seed: int) -> Steps[Prompt]:
    """The prompt of a completion that is too long to be looked into."""
    pieces = values.pieces("prompt")
    commas = 0
    for piece in pieces:
        for place in range(0, len(piece), _COUNTED_AT_ONCE):
            commas += bytes(piece[place : place + _COUNTED_AT_ONCE]).count(b",")
            yield
    start = plain_prompt(bytes(pieces[0][:LONGEST_NAME]).lstrip())
    prompt = _hashed(pieces, seed)
    return msgspec.structs.replace(prompt, tokens=start.tokens and commas + 1)
