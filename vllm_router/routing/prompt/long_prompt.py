"""The prompt of a JSON body whose members are known by their positions.

It equals the prompt of a body that is read at once, so that a conversation keeps its block hashes
when it grows. Beyond a limit, the raw bytes are hashed.
"""

from __future__ import annotations

import msgspec

from vllm_router.routing.prompt.blocks import Prompt
from vllm_router.routing.prompt.content import LARGE, media_checksum
from vllm_router.routing.prompt.conversation import plain_prompt, raw_prompt
from vllm_router.routing.prompt.crowding import MOST_OBJECTS, objects_in
from vllm_router.routing.prompt.fields import NO_JSON
from vllm_router.routing.prompt.forms import LONGEST_NAME
from vllm_router.routing.prompt.json_scan import Members
from vllm_router.routing.prompt.routing_info import (
    AT_ONCE,
    prompt_fields,
    prompt_head,
    read_prompt,
    salted,
)
from vllm_router.steps import Steps

_MAX_PARSED_BYTES = 1 << 22
"""Bytes of a prompt without media that is parsed: 1 million tokens."""

_MAX_PARSED_STRUCTURE = 1 << 18
"""Bytes outside strings of a body that is parsed: bodies of mostly text are parsed fast, 1 MB of
brackets in 5 ms."""

_HASHED = 1 << 23
"""Bytes of a longer prompt that are hashed: 2 ms, more than two million tokens."""

_COUNTED_AT_ONCE = 1 << 20


class Values:
    """The values of the members, with the data of media replaced by checksums.

    The checksums are as in `content.py`, so a conversation keeps its hashes when it grows long.
    """

    def __init__(self, text: bytes, members: Members) -> None:
        self._text = text
        self._members = members

    def span(self, name: str) -> tuple[int, int]:
        """Start and end of the value; (0, 0) if it is absent."""
        return self._members.spans.get(name, (0, 0))

    def short(self, name: str) -> msgspec.Raw:
        """The raw value; of a long one only the beginning."""
        start, end = self.span(name)
        value = self._text[start : min(end, start + 2 * LONGEST_NAME)]
        return msgspec.Raw(value.strip() or value)

    def pieces(self, name: str) -> list[memoryview | bytes]:
        """The whole value without copying long parts."""
        at, end = self.span(name)
        view = memoryview(self._text)
        found: list[memoryview | bytes] = []
        for start, stop in self._members.media:
            if at <= start < end:
                found += (view[at:start], media_checksum(view[start:stop]))
                at = stop
        found.append(view[at:end])
        return found

    def whole(self, name: str) -> msgspec.Raw:
        """The whole value; NO_JSON if it is absent."""
        if name not in self._members.spans:
            return NO_JSON
        return msgspec.Raw(b"".join(self.pieces(name)).strip())

    def count_objects(self, name: str) -> Steps[int]:
        """See `objects_in`."""
        return (yield from objects_in(self._text, *self.span(name)))

    @property
    def can_be_parsed(self) -> bool:
        size = len(self._text) - sum(end - start for start, end in self._members.media)
        return size <= _MAX_PARSED_BYTES and self.is_mostly_text

    @property
    def is_mostly_text(self) -> bool:
        return self._members.structure <= _MAX_PARSED_STRUCTURE


_ABOUT_PROMPT = ("tools", "system", "instructions")


def long_prompt(values: Values, seed: int) -> Steps[Prompt]:
    """The prompt of a body that is not read at once; parsed if it is not too long.

    `seed` is the model's.
    """
    yield
    if values.can_be_parsed:
        prompt = yield from _short_prompt(values, seed)
        if prompt is not None:
            return prompt
    seed = salted(values.whole("cache_salt"), seed)
    for name in ("messages", "input"):
        if values.span(name) != (0, 0):
            return (yield from _hashed([*(yield from _head(values)), *values.pieces(name)], seed))
    return (yield from _long_plain_prompt(values, seed))


def _head(values: Values) -> Steps[list[memoryview | bytes]]:
    """What precedes the messages; parsed unless it is long."""
    spans = [values.span(about) for about in _ABOUT_PROMPT]
    most = AT_ONCE if values.is_mostly_text else LARGE
    if sum(end - start for start, end in spans) <= most:
        try:
            head = yield from prompt_head(*(values.whole(about) for about in _ABOUT_PROMPT))
            return [text if isinstance(text, memoryview) else bytes(text) for text in head]
        except (msgspec.MsgspecError, RecursionError):
            pass  # a value of an unexpected type counts as it stands
    return [piece for about in _ABOUT_PROMPT for piece in values.pieces(about)]


def _short_prompt(values: Values, seed: int) -> Steps[Prompt | None]:
    """The parsed prompt; None if a value has an unexpected type, or too many objects."""
    for name in ("messages", "input"):
        if (yield from values.count_objects(name)) > MOST_OBJECTS:
            return None
    given = values.whole("messages")
    yield
    try:
        fields = prompt_fields(given, values.whole)
        yield
        return (yield from read_prompt(fields, seed))
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None


def _hashed(pieces: list[memoryview | bytes], seed: int) -> Steps[Prompt]:
    """The prompt of these bytes; only the first _HASHED are hashed."""
    size, first = 0, []
    for piece in pieces:
        if size < _HASHED:
            first.append(piece[: _HASHED - size])
        size += len(piece)
    prompt = yield from raw_prompt(*first, seed=seed)
    return msgspec.structs.replace(prompt, size=size)


def _long_plain_prompt(values: Values, seed: int) -> Steps[Prompt]:
    """The prompt of a completion that is too long to be parsed."""
    pieces = values.pieces("prompt")
    commas = 0
    for piece in pieces:
        for place in range(0, len(piece), _COUNTED_AT_ONCE):
            commas += bytes(piece[place : place + _COUNTED_AT_ONCE]).count(b",")
            yield
    start = plain_prompt(values.short("prompt"))
    prompt = yield from _hashed(pieces, seed)
    return msgspec.structs.replace(prompt, tokens=start.tokens and commas + 1)
