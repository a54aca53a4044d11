"""The content of one message as bytes: texts as they are, media as checksums of their data.

Values stay as they stand in the body, as decoding long texts would cost more than all else. So
clients that escape characters differently share no blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from zlib import crc32

import msgspec
from msgspec.structs import asdict

from vllm_router.routing.prompt.blocks import Text
from vllm_router.steps import WORK_PER_SLICE, Steps, Work

MEDIA_BYTES = 2048
"""Weight of an image or a sound in bytes of text: 512 tokens, whatever the length of its URL."""

SHORT_TEXT = 2048
"""Bytes. Shorter texts are copied, longer ones are views."""

MAX_PARSED = 512
"""Messages, and parts of one message, that are parsed: one costs 0.5 µs, and a body may have ten
thousand. Of the others only long ones are, as they may be images."""

MAX_VALUES = 1 << 15
"""An array with more JSON values in it is taken as raw bytes: parsing it would block the loop."""

_PER_PART = 1 << 11
"""The work of parsing a part of a message, besides its bytes, see `Work`."""

_PER_SHORT_PART = 1 << 7
"""The same for a part that is not parsed."""

LARGE = 1 << 16
"""Bytes. Above this size, copying costs as much as reading."""

MEDIA_SAMPLE = 1 << 16
"""Bytes at both ends of a medium's data that, with its length, identify it."""

ABSENT = msgspec.Raw(b"")

_MAX_DEPTH = 8
"""Levels of nesting in a part that are parsed."""

_MEDIA_FROM = 1024
"""Characters from which on a string in a content part is the data of a medium."""

_NO_MEDIA = (b'"text"', b'"refusal"')

ATTRIBUTION = b"x-anthropic-billing-header"
"""Claude Code begins its system prompt with a text that begins so, and contains a hash that differs
from request to request. vLLM removes it before it applies the chat template (since 0.19)."""

_LINE_BREAK = re.compile(rb"(?:[^\\]|\\[^n])*+\\n", re.DOTALL)
"""Everything up to the first line break in the inside of a JSON string."""


class _Part(msgspec.Struct, gc=False):
    """A text, or in Anthropic's API a call, its result, or reasoning.

    Fields that vLLM does not read are left out; `cache_control` moves from turn to turn.
    """

    text: msgspec.Raw = ABSENT
    type: msgspec.Raw = ABSENT
    id: msgspec.Raw = ABSENT
    name: msgspec.Raw = ABSENT
    input: msgspec.Raw = ABSENT
    tool_use_id: msgspec.Raw = ABSENT
    content: msgspec.Raw = ABSENT
    thinking: msgspec.Raw = ABSENT


class _Url(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    url: msgspec.Raw = ABSENT
    detail: msgspec.Raw = ABSENT


class _Sound(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    data: msgspec.Raw = ABSENT
    format: msgspec.Raw = ABSENT


class _MediaPart(msgspec.Struct, gc=False):
    """A part as nearly all clients write it, decoded in one go.

    Megabytes of data should not be scanned once per level of nesting.
    """

    text: msgspec.Raw = ABSENT
    type: msgspec.Raw = ABSENT
    image_url: _Url | None = None
    input_audio: _Sound | None = None
    audio_url: _Url | None = None
    video_url: _Url | None = None

    def values(self) -> dict[str, msgspec.Raw]:
        """All values but the text; empty for parts without a known medium."""
        found: dict[str, msgspec.Raw] = {}
        for medium in (self.image_url, self.input_audio, self.audio_url, self.video_url):
            if medium is not None:
                found |= {key: value for key, value in asdict(medium).items() if len(value)}
        return {"type": self.type, **found} if found else {}


_decode_parts = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_part = msgspec.json.Decoder(_Part).decode
_decode_media_parts = msgspec.json.Decoder(list[_MediaPart]).decode
_decode_values = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def first_byte(raw: msgspec.Raw | bytes) -> bytes:
    """The first byte of a JSON value, which gives its type; empty if it is absent."""
    return (bytes(raw) if len(raw) < SHORT_TEXT else bytes(memoryview(raw)[:1]))[:1]


def unquoted(text: bytes) -> bytes:
    """The inside of a string, nothing for null, any other value as it is."""
    if text[:1] == b'"':
        return text[1:-1]
    return text if text != b"null" else b""


def text_of(raw: msgspec.Raw | bytes) -> bytes | memoryview:
    """As `unquoted`, without copying long values."""
    if len(raw) < SHORT_TEXT:
        return unquoted(bytes(raw))
    view = memoryview(raw)
    if first_byte(raw) == b'"':
        return view[1:-1]
    return view


def without_attribution(text: bytes | memoryview) -> bytes | memoryview:
    """A system message's text without Claude Code's attribution line, as vLLM reads it.

    `text` is the inside of a JSON string.
    """
    if bytes(text[: len(ATTRIBUTION)]) != ATTRIBUTION:
        return text
    line = _LINE_BREAK.match(text)
    return b"" if line is None else memoryview(text)[line.end() :]


def without_attributed(text: bytes | memoryview) -> bytes | memoryview:
    """The same for a block of Anthropic's `system`, of which vLLM removes the whole block."""
    return b"" if bytes(text[: len(ATTRIBUTION)]) == ATTRIBUTION else text


def add_content(
    raw: msgspec.Raw,
    texts: list[Text],
    work: Work,
    edited: Callable[[bytes | memoryview], bytes | memoryview] | None = None,
    depth: int = 0,
) -> Steps[None]:
    """Append the texts of a message's `content`: a string, or an array of parts.

    `edited` returns the part of each text that counts. `depth` is the number of values around it.
    """
    if first_byte(raw) != b"[":
        texts.append(text_of(raw) if edited is None else edited(text_of(raw)))
        return
    size = len(raw)
    if size >= LARGE:
        work.left -= 2 * size
        if work.left < 0:
            work.left = WORK_PER_SLICE
            yield
        if edited is None:
            if (yield from _add_media_parts(raw, texts, work)):
                return
            # The next pass over the same bytes.
            work.left -= size
            if work.left < 0:
                work.left = WORK_PER_SLICE
                yield
    if _has_many_values(raw):
        texts.append(raw)
        return
    for number, part in enumerate(_decode_parts(raw)):
        is_short = number >= MAX_PARSED and len(part) < SHORT_TEXT
        work.left -= _PER_SHORT_PART if is_short else len(part) + _PER_PART
        if work.left < 0:
            work.left = WORK_PER_SLICE
            yield
        if is_short:
            texts.append(part)
            continue
        begins = first_byte(part)
        if begins == b"{":
            block = _decode_part(part)
            if first_byte(block.text) != b'"':
                yield from _add_block(block, part, texts, work, depth)
                continue
            text = text_of(block.text)
        else:
            text = text_of(part)
        texts.append(text if edited is None else edited(text))


def _add_block(
    block: _Part, part: msgspec.Raw, texts: list[Text], work: Work, depth: int
) -> Steps[None]:
    """Append the texts of a part without a text of its own, or what represents a medium.

    Only the values that vLLM passes to the chat template count (its Anthropic conversion): results
    of tools are texts, redacted reasoning and signatures are nothing.
    """
    kind = bytes(block.type)
    if kind == b'"tool_result"':
        texts.append(text_of(block.tool_use_id))
        if depth < _MAX_DEPTH:
            yield from add_content(block.content, texts, work, depth=depth + 1)
        else:
            texts.append(block.content)
    elif kind == b'"tool_use"':
        texts += (text_of(block.id), text_of(block.name), text_of(block.input))
    elif kind == b'"thinking"':
        texts.append(text_of(block.thinking))
    elif kind != b'"redacted_thinking"':
        if _has_many_values(part):
            texts.append(part)
            return
        values = _decode_values(part)
        values.pop("cache_control", None)
        texts.append((yield from _medium(values, work)))


def _add_media_parts(raw: msgspec.Raw, texts: list[Text], work: Work) -> Steps[bool]:
    """As `add_content`, for parts that are all known to `_MediaPart`; else False."""
    found: list[Text] = []
    try:
        parts = _decode_media_parts(raw)
    except msgspec.ValidationError:
        return False
    for number, part in enumerate(parts):
        text = part.text
        is_short = number >= MAX_PARSED and len(text) < SHORT_TEXT
        work.left -= _PER_SHORT_PART if is_short else _PER_PART
        if work.left < 0:
            work.left = WORK_PER_SLICE
            yield
        if is_short:
            found.append(text or part.type)
            continue
        if first_byte(text) == b'"':
            found.append(text_of(text))
        elif values := part.values():
            found.append((yield from _medium(values, work)))
        else:
            return False
    texts += found
    return True


def _medium(values: dict[str, msgspec.Raw], work: Work) -> Steps[bytes]:
    """Represents an image or a sound: its short values, a checksum of its data, its weight."""
    found: list[bytes] = []
    for value in values.values():
        yield from _walk(value, found.append, work)
    whole = b"\0".join(found)
    if not whole:
        return whole
    return whole if bytes(values.get("type", b"")) in _NO_MEDIA else whole.ljust(MEDIA_BYTES)


def _walk(
    raw: msgspec.Raw, found: Callable[[bytes], None], work: Work, depth: int = 0
) -> Steps[None]:
    """Collect strings and numbers; long strings (data) as checksums, without copying them."""
    work.left -= _PER_PART
    if work.left < 0:
        work.left = WORK_PER_SLICE
        yield
    begins = first_byte(raw)
    if begins in (b"{", b"[") and depth < _MAX_DEPTH and not _has_many_values(raw):
        inside = _decode_values(raw).values() if begins == b"{" else _decode_parts(raw)
        for inner in inside:
            yield from _walk(inner, found, work, depth + 1)
        return
    data = memoryview(raw)[1:-1] if begins == b'"' else memoryview(raw)
    found(media_checksum(data) if len(data) > _MEDIA_FROM else bytes(data))


def media_checksum(data: memoryview) -> bytes:
    """Length and checksum of both ends of a medium's data."""
    return b"%d:%d" % (len(data), crc32(data[-MEDIA_SAMPLE:], crc32(data[:MEDIA_SAMPLE])))


def _has_many_values(raw: msgspec.Raw) -> bool:
    """Whether a value may contain more than MAX_VALUES values. 0.4 ms per MB, without a copy."""
    size = len(raw)
    if size <= 2 * MAX_VALUES:
        return False
    view, commas = memoryview(raw), 0
    for start in range(0, size, MEDIA_SAMPLE):
        commas += bytes(view[start : start + MEDIA_SAMPLE]).count(b",")
        if commas > MAX_VALUES:
            return True
    return False
