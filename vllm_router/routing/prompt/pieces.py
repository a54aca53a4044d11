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
from zlib import crc32

import msgspec

PIECE = 256
"""Bytes of the first pieces: 64 tokens of English."""

PER_SIZE = 32
"""Pieces of a length, before it doubles."""

_SIZES = 15
_SIZE_SHIFT = 60
_DIGEST_MASK = (1 << _SIZE_SHIFT) - 1
"""The top four of a hash's 64 bits tell its piece's length, PIECE << size."""

_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio: odd, so no two numbers become one (Knuth, TAOCP 6.4)."""


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

SHORT_TEXT = 2048
"""Bytes. Shorter texts cost less in a copy than one by one."""

LOOKED_INTO = 512
"""So many messages, or parts of one, are looked into: one costs 0.5 µs, and a body may have ten
thousand of them. Of the others only long ones are, which may be pictures."""

CROWDED = 1 << 16
"""A value with more things in it than this is taken as it stands: nobody talks like that, and to
look at millions of things would hold up all other requests."""

_DEEPEST = 8
"""Levels of nesting in a part that are gone down."""

_MEDIA_FROM = 1024
"""A string in a content part that is longer than this is the data of a medium."""


_Text = bytes | memoryview | msgspec.Raw


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


def cut(*texts: _Text, seed: int = 0) -> tuple[int, ...]:
    """The chain of hashes of the texts, one behind the other. 0.4 µs per piece and 0.2 ms per MB.

    Chains with different seeds have nothing in common.

    The running checksums of all pieces so far, mixed, make a hash: enough to tell texts apart, and
    three times as fast as the fastest digest. Whoever forges one only misplaces his own request.
    """
    chain: list[int] = []
    index, place, end = 0, 0, PIECE
    checksum, digest = seed, 0
    for whole in texts:
        text = memoryview(whole)
        start, length = 0, len(text)
        while place + length - start >= end and index < len(ENDS):
            stop = start + end - place
            checksum = crc32(text[start:stop], checksum)
            digest = (digest ^ checksum) * _GOLDEN & _DIGEST_MASK
            chain.append(digest | index // PER_SIZE << _SIZE_SHIFT)
            start, place = stop, end
            index += 1
            end = place + (PIECE << index // PER_SIZE)
        if start < length:
            checksum = crc32(text[start:], checksum)
            place += length - start
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

_ABSENT = msgspec.Raw(b"")


class Message(msgspec.Struct, gc=False):
    """What counts of a message, as it stands in the body: to decode long texts would cost more
    than all else. So clients that escape characters differently share nothing on record.
    """

    role: msgspec.Raw = _ABSENT
    content: msgspec.Raw = _ABSENT
    tool_calls: msgspec.Raw = _ABSENT
    arguments: msgspec.Raw = _ABSENT
    output: msgspec.Raw = _ABSENT
    tool_call_id: msgspec.Raw = _ABSENT
    call_id: msgspec.Raw = _ABSENT


class _Part(msgspec.Struct, gc=False):
    text: msgspec.Raw = _ABSENT


class _Picture(msgspec.Struct, gc=False):
    """A part as nearly all clients write it. Read in one go: what is megabytes long is not to be
    gone through once for each level of its nesting.
    """

    text: msgspec.Raw = _ABSENT
    type: msgspec.Raw = _ABSENT
    image_url: dict[str, msgspec.Raw] | None = None
    input_audio: dict[str, msgspec.Raw] | None = None
    audio_url: dict[str, msgspec.Raw] | None = None
    video_url: dict[str, msgspec.Raw] | None = None

    def values(self) -> dict[str, msgspec.Raw]:
        """All there is but the text; nothing if that is all, or not of a kind known here."""
        media = (self.image_url, self.input_audio, self.audio_url, self.video_url)
        found = {key: value for medium in media if medium for key, value in medium.items()}
        return {"type": self.type, **found} if found else {}


_MESSAGES = msgspec.json.Decoder(list[Message])
_PARTS = msgspec.json.Decoder(list[msgspec.Raw])
_PART = msgspec.json.Decoder(_Part)
_PICTURES = msgspec.json.Decoder(list[_Picture])
_VALUES = msgspec.json.Decoder(dict[str, msgspec.Raw])
_PREFACE = (b'"system"', b'"developer"')
_NO_MORE = (_ABSENT,) * 5


def messages_in(raw: msgspec.Raw | bytes) -> list[Message]:
    """The messages of a conversation; one if it is but a text. Raises ValidationError."""
    if _begins(raw) == b'"':
        return [Message(role=msgspec.Raw(b'"user"'), content=msgspec.Raw(raw))]
    return _MESSAGES.decode(raw)


def chat_prompt(messages: Sequence[Message], head: Iterable[bytes], seed: int = 0) -> Prompt:
    """The prompt of a conversation. `head` is what stands before it: instructions, tools.

    Roles, contents and calls count, in order; other keys do not, nor the order of keys. Short
    messages after the first LOOKED_INTO count by their contents as they stand.
    """
    texts: list[_Text] = list(head)
    shared: int | None = None
    first_turn = 0
    last_answer = 0
    answer = _last_answer(messages)
    for place, message in enumerate(messages):
        if message is answer:
            last_answer = len(texts)
        content = message.content
        if place >= LOOKED_INTO and len(content) < SHORT_TEXT:
            texts.append(content)
            if not (message.tool_calls is message.arguments is message.output is _ABSENT):
                texts += _more_of(message)
            continue
        role = bytes(message.role)
        if shared is None and role not in _PREFACE:
            shared = len(texts)
        texts.append(b"\0" + role[1:-1] + b"\0")
        if len(content) < SHORT_TEXT and (text := bytes(content))[:1] != b"[":
            texts.append(_unquoted(text))
        else:
            _add_content(content, texts)
        more = _more_of(message)
        if more != _NO_MORE:
            texts += [_bare(value) for value in more if value is not _ABSENT]
        if shared is not None and not first_turn:
            first_turn = len(texts)
    if shared is None:
        shared = len(texts)
    return _prompt(texts, shared, last_answer, first_turn or len(texts), seed)


def _more_of(message: Message) -> tuple[msgspec.Raw, ...]:
    return (
        message.tool_calls,
        message.arguments,
        message.output,
        message.tool_call_id,
        message.call_id,
    )


def _last_answer(messages: Sequence[Message]) -> Message | None:
    """Looked for near the end, where it nearly always is."""
    for message in messages[: -LOOKED_INTO - 1 : -1]:
        if bytes(message.role) == b'"assistant"':
            return message
    return None


_JOINED_BELOW = 1 << 16
"""Bytes. Pages of memory for a copy of more than this cost as much as reading it."""


def raw_prompt(*texts: _Text, seed: int = 0) -> Prompt:
    """The prompt of a conversation that is not looked into."""
    return _prompt([*texts], 0, 0, len(texts), seed)


def _prompt(
    texts: list[_Text], shared: int, last_answer: int, first_turn: int, seed: int
) -> Prompt:
    """Marks are places in `texts`; they become places in the bytes."""
    sizes = list(map(len, texts))
    size = sum(sizes)
    join = size < _JOINED_BELOW or size < SHORT_TEXT * len(texts)
    chain = cut(b"".join(texts), seed=seed) if join else cut(*texts, seed=seed)
    conversation, left = seed, _TOLD_APART_BY
    for text in texts[:first_turn]:
        conversation = crc32(memoryview(text)[:left], conversation)
        left -= len(text)
        if left <= 0:
            break
    return Prompt(chain, size, None, sum(sizes[:shared]), sum(sizes[:last_answer]), conversation)


def _begins(raw: msgspec.Raw | bytes) -> bytes:
    """What kind of value it is, by its first byte; empty if there is none."""
    return (bytes(raw) if len(raw) < SHORT_TEXT else bytes(memoryview(raw)[:1]))[:1]


def _unquoted(text: bytes) -> bytes:
    """The text of a string, anything else as it is; nothing for null."""
    if text[:1] == b'"':
        return text[1:-1]
    return text if text != b"null" else b""


def _bare(raw: msgspec.Raw | bytes) -> _Text:
    """The same without a copy of what is long."""
    if len(raw) < SHORT_TEXT:
        return _unquoted(bytes(raw))
    view = memoryview(raw)
    if _begins(raw) == b'"':
        return view[1:-1]
    return view


def _add_content(raw: msgspec.Raw, texts: list[_Text]) -> None:
    if _begins(raw) != b"[":
        texts.append(_bare(raw))
        return
    if len(raw) >= _JOINED_BELOW and _add_pictures(raw, texts):
        return
    if _is_crowded(raw):
        texts.append(raw)
        return
    for place, part in enumerate(_PARTS.decode(raw)):
        if place >= LOOKED_INTO and len(part) < SHORT_TEXT:
            texts.append(part)
        elif _begins(part) == b"{":
            text = _PART.decode(part).text
            is_text = _begins(text) == b'"'
            texts.append(_bare(text) if is_text else _medium(_VALUES.decode(part)))
        elif _begins(part) == b'"':
            texts.append(_bare(part))
        else:
            texts.append(msgspec.json.encode(msgspec.json.decode(part)))


def _add_pictures(raw: msgspec.Raw, texts: list[_Text]) -> bool:
    """False, and nothing is added, if not all parts are as `_Picture` knows them."""
    found: list[_Text] = []
    try:
        for place, part in enumerate(_PICTURES.decode(raw)):
            text = part.text
            if place >= LOOKED_INTO and len(text) < SHORT_TEXT:
                found.append(text or part.type)
                continue
            if _begins(text) == b'"':
                found.append(_bare(text))
            elif values := part.values():
                found.append(_medium(values))
            else:
                return False
    except msgspec.ValidationError:
        return False
    texts += found
    return True


def _medium(values: dict[str, msgspec.Raw]) -> bytes:
    """Stands for an image or a sound: what it is, a checksum of its data, and its weight."""
    found: list[bytes] = []
    for value in values.values():
        _walk(value, found.append)
    whole = b"\0".join(found)
    if not whole:
        return whole
    return whole if bytes(values.get("type", b"")) in _NO_MEDIA else whole.ljust(MEDIA_BYTES)


_NO_MEDIA = (b'"text"', b'"refusal"', b'"tool_use"', b'"tool_result"', b'"thinking"')

MEDIA_ENDS = 1 << 16
"""Bytes at either end of a medium's data; with its length they tell it from others."""


def _walk(raw: msgspec.Raw, found: Callable[[bytes], None], depth: int = 0) -> None:
    """Long strings are megabytes of pictures: nothing here makes a copy of one."""
    begins = _begins(raw)
    if begins in (b"{", b"[") and depth < _DEEPEST and not _is_crowded(raw):
        inside = _VALUES.decode(raw).values() if begins == b"{" else _PARTS.decode(raw)
        for inner in inside:
            _walk(inner, found, depth + 1)
        return
    data = memoryview(raw)[1:-1] if begins == b'"' else memoryview(raw)
    if len(data) > _MEDIA_FROM:
        ends = crc32(data[-MEDIA_ENDS:], crc32(data[:MEDIA_ENDS]))
        found(b"%d:%d" % (len(data), ends))
    else:
        found(bytes(data))


def _is_crowded(raw: msgspec.Raw) -> bool:
    """Whether more than CROWDED things may be in it. 0.4 ms per MB, and no copy of the whole."""
    size = len(raw)
    if size <= 2 * CROWDED:
        return False
    view, commas = memoryview(raw), 0
    for start in range(0, size, MEDIA_ENDS):
        commas += bytes(view[start : start + MEDIA_ENDS]).count(b",")
        if commas > CROWDED:
            return True
    return False


def plain_prompt(raw: msgspec.Raw | bytes, seed: int = 0) -> Prompt:
    """The prompt of a completion, an embedding or the like, from its JSON as it stands in the body.

    A text is taken as it stands there. Lists are taken as JSON: of token ids (their number is
    known then), or of several texts.
    """
    text = _bare(raw)
    tokens = None
    if text[:1] == b"[" and bytes(text[1:16]).strip(b" []")[:1].isdigit():
        tokens = bytes(text).count(b",") + 1
    conversation = crc32(text[:_TOLD_APART_BY], seed)
    return Prompt(cut(text, seed=seed), len(text), tokens, conversation=conversation)
