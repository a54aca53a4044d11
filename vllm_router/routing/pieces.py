"""A prompt as routing sees it: its bytes in order, cut into pieces, each known by a hash.

No tokenizer: an engine's prefix cache works on tokens, but equal bytes are equal tokens, and what
a byte weighs is learnt from `usage`. The hash of a piece covers everything before it, so two
prompts have the first n pieces in common if the n-th hashes are equal. Hashes are the same in every
process: several routers, and a replay of the access log, agree on them.

Pieces are PIECE bytes long at first and double in length after every PER_SIZE: the cut is always
within 3 % of a long prompt's length, and a prompt of 1 MB has 225 pieces instead of 4096.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any
from zlib import adler32, crc32

import msgspec

PIECE = 256
"""Bytes of the first pieces: 64 tokens of English."""

PER_SIZE = 32
"""Pieces of a length, before it doubles."""

_SIZES = 15
_SIZE_SHIFT = 60
_DIGEST_MASK = (1 << _SIZE_SHIFT) - 1
"""The top four of a hash's 64 bits tell its piece's length, PIECE << size."""


def _ends() -> tuple[int, ...]:
    ends, end = [], 0
    for size in range(_SIZES):
        for _ in range(PER_SIZE):
            end += PIECE << size
            ends.append(end)
    return tuple(ends)


ENDS = _ends()
"""ENDS[i]: where the i-th piece ends, in bytes. The last is at 268 MB; nothing is cut beyond."""

MEDIA_BYTES = 2048
"""What an image or a sound counts, in bytes of text: 512 tokens, whatever the length of its URL."""

_TOLD_APART_BY = 1 << 16
"""Conversations that have so many bytes in common count as the same."""

_MEDIA_FROM = 1024
"""A string in a content part that is longer than this is the data of a medium."""


class Prompt(msgspec.Struct, frozen=True, gc=False):
    """What a policy may know of a prompt.

    chain: the hash of each full piece.
    size: bytes in all; `tokens`: their number, where the prompt came as token ids.
    shared: bytes of the tools and system messages at the start, the part that different
        conversations have in common.
    earlier: bytes that the conversation's previous request had, too; 0 in its first one.
    conversation: a hash of everything up to the end of the first turn; 32 bits.
    """

    chain: tuple[int, ...] = ()
    size: int = 0
    tokens: int | None = None
    shared: int = 0
    earlier: int = 0
    conversation: int = 0


NO_PROMPT = Prompt()


def pieces_in(size: int) -> int:
    """How many full pieces a prompt of `size` bytes has."""
    return bisect_right(ENDS, size)


def piece_bytes(link: int) -> int:
    """The length of the piece with this hash."""
    return PIECE << (link >> _SIZE_SHIFT)


def link_of(digest: int, index: int) -> int:
    """The hash of the piece `index`, whose content and predecessors have this digest."""
    return digest & _DIGEST_MASK | index // PER_SIZE << _SIZE_SHIFT


def cut(text: bytes) -> tuple[int, ...]:
    """The chain of hashes of `text`. 0.5 µs per piece and 0.5 ms per megabyte.

    Two running checksums of different kind make a hash: enough to tell texts apart, and three
    times as fast as the fastest digest. Whoever forges one only misplaces his own request.
    """
    chain = []
    start, low, high = 0, 0, 1
    for index in range(pieces_in(len(text))):
        end = ENDS[index]
        piece = text[start:end]
        low = crc32(piece, low)
        high = adler32(piece, high)
        digest = high << 32 & _DIGEST_MASK | low
        chain.append(digest | index // PER_SIZE << _SIZE_SHIFT)
        start = end
    return tuple(chain)


def pack_chain(chain: Sequence[int]) -> str:
    """A chain as text for a log line: 8 characters per piece, from which no text can be had."""
    low = (1 << 48) - 1
    return b64encode(b"".join((link & low).to_bytes(6, "big") for link in chain)).decode()


def unpack_chain(text: str) -> tuple[int, ...]:
    """The chain that was packed, shortened to 48 bits per hash. Raises ValueError."""
    packed = b64decode(text, validate=True)
    if len(packed) % 6 or len(packed) > 6 * len(ENDS):
        raise ValueError("not a chain of hashes")
    return tuple(
        link_of(int.from_bytes(packed[place : place + 6], "big"), index)
        for index, place in enumerate(range(0, len(packed), 6))
    )


# -- the bytes of a prompt ---------------------------------------------------------------------


def chat_prompt(messages: Any, head: Iterable[str]) -> Prompt:
    """The prompt of a conversation. `head` is what stands before it: instructions, tools.

    `messages` is whatever the body had: a list of messages, one text, or something else. Roles,
    contents and calls count, in order; other keys do not, nor how the client wrote its JSON.
    """
    texts = list(head)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    elif not isinstance(messages, list):
        messages = []
    shared: int | None = None
    first_turn = 0
    last_answer = 0
    for message in messages:
        if not isinstance(message, dict):
            texts.append(str(message))
            continue
        role = message.get("role")
        if shared is None and role not in ("system", "developer"):
            shared = len(texts)
        if role == "assistant":
            last_answer = len(texts)
        texts.append(f"\0{role}\0")
        _add_content(message.get("content"), texts)
        for key in ("tool_calls", "arguments", "output", "tool_call_id", "call_id"):
            value = message.get(key)
            if value is not None:
                texts.append(value if isinstance(value, str) else _json(value))
        if shared is not None and not first_turn:
            first_turn = len(texts)
    if shared is None:
        shared = len(texts)
    return _prompt(texts, shared, last_answer, first_turn or len(texts))


def _prompt(texts: Sequence[str], shared: int, last_answer: int, first_turn: int) -> Prompt:
    """Marks are places in `texts`; they become places in the bytes."""
    marks = sorted({0, shared, last_answer, first_turn, len(texts)})
    parts, place, size = [], {0: 0}, 0
    for start, end in pairwise(marks):
        part = "".join(texts[start:end]).encode("utf-8", "surrogatepass")
        parts.append(part)
        size += len(part)
        place[end] = size
    text = parts[0] if len(parts) == 1 else b"".join(parts)
    return Prompt(
        cut(text),
        size,
        None,
        place[shared],
        place[last_answer],
        crc32(text[: min(place[first_turn], _TOLD_APART_BY)]),
    )


def _add_content(content: Any, texts: list[str]) -> None:
    if isinstance(content, str):
        texts.append(content)
    elif isinstance(content, list):
        for part in content:
            text = part.get("text") if isinstance(part, dict) else part
            texts.append(text if isinstance(text, str) else _medium(part))
    elif content is not None:
        texts.append(_json(content))


def _medium(part: Any) -> str:
    """Stands for an image or a sound: what it is, a checksum of its data, and its weight."""
    if not isinstance(part, dict):
        return _json(part)
    found: list[str] = []
    _walk(part, found.append)
    text = "\0".join(found)
    return text.ljust(MEDIA_BYTES) if part.get("type") not in _NO_MEDIA else text


_NO_MEDIA = ("text", "refusal", "tool_use", "tool_result", "thinking")


def _walk(value: Any, found: Callable[[str], None]) -> None:
    if isinstance(value, str):
        if len(value) > _MEDIA_FROM:
            value = f"{len(value)}:{crc32(value.encode('utf-8', 'surrogatepass'))}"
        found(value)
    elif isinstance(value, dict):
        for inner in value.values():
            _walk(inner, found)
    elif isinstance(value, list):
        for inner in value:
            _walk(inner, found)
    else:
        found(str(value))


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def plain_prompt(raw: bytes) -> Prompt:
    """The prompt of a completion, an embedding or the like, from its JSON as it stands in the body.

    A text is taken as it is. Lists are taken as JSON: of token ids (their number is known then),
    or of several texts.
    """
    if raw[:1] == b'"':
        text = msgspec.json.decode(raw, type=str).encode("utf-8", "surrogatepass")
        return Prompt(cut(text), len(text), conversation=crc32(text[:_TOLD_APART_BY]))
    tokens = None
    if raw[:1] == b"[" and raw[1:16].strip(b" []")[:1].isdigit():
        tokens = raw.count(b",") + 1
    return Prompt(cut(raw), len(raw), tokens, conversation=crc32(raw[:_TOLD_APART_BY]))
