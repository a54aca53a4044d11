"""The last bodies of conversations: a turn that repeats the last one's bytes is read from there on.

Agents send the whole conversation with each turn, hundreds of kilobytes of which only the end is
new. A body that begins with the bytes of an earlier one, up to the end of a message, is not decoded
and hashed again before that point. The result is the same as for the whole body, and the whole body
is read where that is not certain. A single message is kept, too: it is the first turn, or a prompt
that is sent again.
"""

from __future__ import annotations

import re

import msgspec

from vllm_router.routing.prompt.blocks import Prompt
from vllm_router.routing.prompt.conversation import (
    Conversation,
    continued,
    conversation_of,
    messages_in,
)
from vllm_router.routing.prompt.crowding import (
    MOST_LISTS,
    MOST_OBJECTS,
    count_lists,
    count_objects,
    objects_in,
)
from vllm_router.routing.prompt.fields import BLANK, AllFields, Fields
from vllm_router.routing.prompt.routing_info import (
    WITH_PROMPT_AT_ONCE,
    Seeds,
    prompt_head,
    read_prompt,
    salted,
)
from vllm_router.steps import Steps, finish, in_one_slice

MOST_BYTES = 16 << 20
"""Bytes of all bodies that are kept, in each process."""

MOST_BODIES = 64

LONGEST = 2 << 20
"""Bytes of a body that is decoded as a whole, in 1 ms; longer ones are looked through. A body of
any length is read from where a known one ends."""

_TAIL = 32
"""Bytes at the end of a kept body that are compared first."""

_ARRAYS = {
    key: re.compile(rb'"%b"[ \t\r\n]*:[ \t\r\n]*\[' % key) for key in (b"messages", b"input")
}
"""The keys of the array of messages: of chats and the Messages API, and of the Responses API."""

_ESCAPED = (b"\\u006", b"\\u007")
"""Beginnings of small letters that are written as escapes."""

_NO_JSON = msgspec.Raw(b"")
_UNREADABLE = (msgspec.MsgspecError, RecursionError, UnicodeError)


class _Messages(msgspec.Struct, gc=False):
    messages: msgspec.Raw = _NO_JSON


class _Nothing(msgspec.Struct, gc=False):
    """Any object: its members are skipped."""


_decode = msgspec.json.Decoder(AllFields).decode
_decode_span = msgspec.json.Decoder(_Messages).decode
_check_object = msgspec.json.Decoder(_Nothing).decode


class _Known(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A kept body.

    beginning: its bytes up to the end of the last message; a view, as a copy would cost more than
        all else.
    tail: its last bytes, which are compared first.
    size: bytes of the whole body, which the view keeps in memory.
    key, array: the key of the array of messages, and where the array begins.
    objects: number of objects, perhaps with some braces in texts, see `objects_in`.
    head, seed: what precedes the messages in the prompt, and the seed of the hashes.
    """

    beginning: memoryview
    tail: bytes
    size: int
    key: bytes
    array: int
    objects: int
    head: bytes
    seed: int
    conversation: Conversation


class _Unplaced(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A kept body in which the array of messages has not been looked for.

    That takes a quarter of the time of reading the body, and many bodies are never continued: it
    is done when a later body begins with `beginning`.

    body: the whole body.
    beginning, tail: as in `_Known`, of the first bytes up to some point before the array's end.
    given: the array, if it is `input`.
    """

    body: bytes
    beginning: memoryview
    tail: bytes
    given: msgspec.Raw
    objects: int
    head: bytes
    seed: int
    conversation: Conversation

    @property
    def size(self) -> int:
        return len(self.body)

    def placed(self) -> _Known | None:
        """None if it is not certain where the array is."""
        body = self.body
        key = b"input" if len(self.given) else b"messages"
        array = _array_place(body, key)
        if array < 0:
            return None
        raw = self.given if len(self.given) else _decode_span(body).messages
        if not _is_at(body, array, raw, key):
            return None
        end = array + len(raw) - 1
        return _known(body, end, key, array, self.objects, self.head, self.seed, self.conversation)


class KnownBodies:
    """The bodies of one process, the last used at the end."""

    def __init__(self, most_bytes: int = MOST_BYTES, most_bodies: int = MOST_BODIES) -> None:
        self.bytes = 0
        self._most_bytes = most_bytes
        self._most_bodies = most_bodies
        self._bodies: list[_Known | _Unplaced] = []

    def __len__(self) -> int:
        return len(self._bodies)

    def read(self, body: bytes, seeds: Seeds) -> tuple[Fields, Prompt] | None:
        """The fields and the prompt of a body; None if it must be read in another way.

        For bodies from LONG bytes on: shorter ones are read in 0.1 ms. None, too, for a body that
        takes more than one slice. Raises MsgspecError, RecursionError or UnicodeError.
        """
        found = self.read_rest(body, seeds)
        return found if found is not None else in_one_slice(self._read_whole(body, seeds))

    def read_rest(self, body: bytes, seeds: Seeds) -> tuple[Fields, Prompt] | None:
        """The same from what follows an earlier body; None if it is none that goes on."""
        known = self._find(body)
        while isinstance(known, _Unplaced):
            self._place(known)
            known = self._find(body)
        if known is None or len(body) - len(known.beginning) > WITH_PROMPT_AT_ONCE:
            return None
        try:
            return self._continue(known, body, seeds)
        except _UNREADABLE:
            return None

    def read_in_slices(self, body: bytes, seeds: Seeds) -> Steps[tuple[Fields, Prompt] | None]:
        """The same for a body that continues none, of up to LONGEST bytes."""
        if len(body) > LONGEST:
            return None
        try:
            return (yield from self._read_whole(body, seeds))
        except _UNREADABLE:
            return None

    def _find(self, body: bytes) -> _Known | _Unplaced | None:
        """The longest kept body that this one begins with."""
        best, length = None, 0
        for known in self._bodies:
            beginning, tail = known.beginning, known.tail
            end = len(beginning)
            if (
                length < end <= len(body)
                and body.startswith(tail, end - len(tail))
                and body.startswith(beginning)
            ):
                best, length = known, end
        return best

    def _place(self, unplaced: _Unplaced) -> None:
        """Look for the array of messages, and forget the body if that is not certain."""
        bodies, known = self._bodies, unplaced.placed()
        place = bodies.index(unplaced)
        if known is not None:
            bodies[place] = known
        else:
            del bodies[place]
            self.bytes -= unplaced.size

    def _continue(self, known: _Known, body: bytes, seeds: Seeds) -> tuple[Fields, Prompt] | None:
        beginning, key, array = known.beginning, known.key, known.array
        rest = body[len(beginning) :].lstrip(BLANK)
        more = rest.startswith(b",")
        if more:
            rest = rest[1:]
        elif not rest.startswith(b"]"):
            return None
        objects = known.objects + finish(objects_in(rest))
        if objects > MOST_OBJECTS:
            return None
        short = bytes(beginning[: array + 1]) + rest
        fields = _decode(short)
        raw = _array(fields, key, short)
        if not _is_at(short, array, raw, key):
            return None
        messages = messages_in(raw)
        seed = salted(fields.cache_salt, seeds(fields.model))
        texts = in_one_slice(prompt_head(fields.tools, fields.system, fields.instructions))
        if texts is None:
            return None
        head = b"".join(texts)
        if bool(messages) is not more or seed != known.seed or head != known.head:
            return None
        if not more:
            self._keep(known, known)
            return fields, known.conversation.prompt
        conversation = in_one_slice(continued(known.conversation, messages))
        if conversation is None:
            return None
        end = len(body) - len(short) + array + len(raw) - 1
        longer = _known(body, end, key, array, objects, head, seed, conversation)
        self._keep(longer, known)
        return fields, conversation.prompt

    def _read_whole(self, body: bytes, seeds: Seeds) -> Steps[tuple[Fields, Prompt] | None]:
        is_long = len(body) > WITH_PROMPT_AT_ONCE
        objects = count_objects(body)
        if objects > MOST_OBJECTS:
            yield
            objects = yield from objects_in(body)
            if objects > MOST_OBJECTS:
                return None
        if is_long:
            yield
            is_crowded = count_lists(body) > MOST_LISTS
            yield
            if is_crowded:
                return None
        fields = _decode(body)
        if is_long:
            yield
        seed, messages = seeds(fields.model), fields.messages
        given = _NO_JSON
        if messages is None and len(fields.input) and _is_conversation(fields.input):
            given = fields.input
            messages = messages_in(given)
        if not messages:
            return fields, (yield from read_prompt(fields, seed))
        seed = salted(fields.cache_salt, seed)
        head = yield from prompt_head(fields.tools, fields.system, fields.instructions)
        conversation = yield from conversation_of(messages, head, seed)
        # The array does not end before so many bytes.
        least = max(1, sum([len(message.content) + len(message.output) for message in messages]))
        beginning, tail = memoryview(body)[:least], body[max(0, least - _TAIL) : least]
        unplaced = _Unplaced(
            body, beginning, tail, given, objects, b"".join(head), seed, conversation
        )
        self._keep(unplaced, None)
        return fields, conversation.prompt

    def _keep(self, known: _Known | _Unplaced, instead: _Known | None) -> None:
        """Keep a body, as the last used one, instead of another."""
        bodies = self._bodies
        if instead is not None:
            bodies.remove(instead)
            self.bytes -= instead.size
        if known.size > self._most_bytes // 4:
            return  # it would drop too many others
        bodies.append(known)
        self.bytes += known.size
        while self.bytes > self._most_bytes or len(bodies) > self._most_bodies:
            self.bytes -= bodies.pop(0).size


def _known(
    body: bytes,
    end: int,
    key: bytes,
    array: int,
    objects: int,
    head: bytes,
    seed: int,
    conversation: Conversation,
) -> _Known:
    """The body to keep, whose last message ends at `end`."""
    beginning = memoryview(body)[:end]
    tail = body[max(0, end - _TAIL) : end]
    return _Known(beginning, tail, len(body), key, array, objects, head, seed, conversation)


def _array(fields: AllFields, key: bytes, body: bytes) -> msgspec.Raw:
    """The array of messages, if that is the value of this key; else nothing."""
    if key == b"input":
        return fields.input if fields.messages is None else _NO_JSON
    return _decode_span(body).messages if fields.messages is not None else _NO_JSON


def _is_conversation(given: msgspec.Raw) -> bool:
    """Whether the `input` of the Responses API is an array of messages."""
    start = bytes(memoryview(given)[:64])
    return start[:1] == b"[" and start.lstrip(b"[ \t\r\n")[:1] == b"{"


def _array_place(body: bytes, key: bytes) -> int:
    """Where the array behind the key begins; -1 if it is not certain."""
    found = _ARRAYS[key].search(body)
    if found is None or _may_have_key(body[: found.start()], key):
        return -1
    try:
        # The key is on the first level if an object is complete with one more member there.
        _check_object(body[: found.start()] + b'"":0}')
    except _UNREADABLE:
        return -1
    return found.end() - 1


def _is_at(body: bytes, array: int, raw: msgspec.Raw, key: bytes) -> bool:
    """Whether this value of the key begins at `array`, and the key does not follow once more.

    Decoders use the last of repeated keys.
    """
    end = array + len(raw)
    return (
        bool(len(raw))
        and body.startswith(memoryview(raw), array)
        and not _may_have_key(body[end:], key)
    )


def _may_have_key(text: bytes, key: bytes) -> bool:
    """Whether the key may be in this text, perhaps with escaped letters."""
    return b'"%b"' % key in text or any(escape in text for escape in _ESCAPED)
