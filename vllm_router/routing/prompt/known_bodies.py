"""The last bodies of conversations: a turn that repeats the last one's bytes is read from there on.

Agents send the whole conversation with each turn, hundreds of kilobytes of which only the end is
new. A body that begins with the bytes of an earlier one, up to the end of a message, is not decoded
and hashed again before that point. The result equals that of reading the whole body; whatever is
not certain is left to that.
"""

from __future__ import annotations

import re

import msgspec

from vllm_router.routing.prompt.blocks import Prompt
from vllm_router.routing.prompt.content import MAX_VALUES
from vllm_router.routing.prompt.conversation import Conversation, continued, conversation_of
from vllm_router.routing.prompt.fields import BLANK, AllFields, Fields
from vllm_router.routing.prompt.routing_info import Seeds, prompt_head, read_prompt, salted

MOST_BYTES = 16 << 20
"""Bytes of all bodies that are kept, in each process."""

MOST_BODIES = 64

_TAIL = 32
"""Bytes at the end of a kept body that are compared first."""

_KEY = b'"messages"'
_ARRAY = re.compile(rb'"messages"[ \t\r\n]*:[ \t\r\n]*\[')
_NO_JSON = msgspec.Raw(b"")


class _Messages(msgspec.Struct, gc=False):
    messages: msgspec.Raw = _NO_JSON


_decode = msgspec.json.Decoder(AllFields).decode
_decode_messages = msgspec.json.Decoder(_Messages).decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class _Known(msgspec.Struct, frozen=True, gc=False):
    """A kept body.

    beginning: its bytes up to the end of the last message.
    array: where the array of messages begins.
    objects: number of opening braces.
    head, seed: what precedes the messages in the prompt, and the seed of the hashes.
    """

    beginning: bytes
    array: int
    objects: int
    head: bytes
    seed: int
    conversation: Conversation


class KnownBodies:
    """The bodies of one process, the last used at the end."""

    def __init__(self, most_bytes: int = MOST_BYTES, most_bodies: int = MOST_BODIES) -> None:
        self.bytes = 0
        self._most_bytes = most_bytes
        self._most_bodies = most_bodies
        self._bodies: list[_Known] = []

    def __len__(self) -> int:
        return len(self._bodies)

    def read(self, body: bytes, seeds: Seeds) -> tuple[Fields, Prompt] | None:
        """The fields and the prompt of a body; None if it must be read in another way.

        Meant for bodies from LONG bytes on: shorter ones are read in 0.1 ms.
        """
        try:
            known = self._find(body)
            if known is not None:
                found = self._read_rest(known, body, seeds)
                if found is not None:
                    return found
            return self._read_whole(body, seeds)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            return None

    def _find(self, body: bytes) -> _Known | None:
        """The longest kept body that this one begins with."""
        best, length = None, 0
        for known in self._bodies:
            beginning = known.beginning
            end = len(beginning)
            if (
                length < end <= len(body)
                and body.startswith(beginning[-_TAIL:], end - _TAIL)
                and body.startswith(beginning)
            ):
                best, length = known, end
        return best

    def _read_rest(self, known: _Known, body: bytes, seeds: Seeds) -> tuple[Fields, Prompt] | None:
        beginning, array = known.beginning, known.array
        rest = body[len(beginning) :].lstrip(BLANK)
        more = rest.startswith(b",")
        if more:
            rest = rest[1:]
        elif not rest.startswith(b"]"):
            return None
        objects = known.objects + rest.count(b"{")
        if _may_have_key(rest) or objects > MAX_VALUES:
            return None
        short = beginning[: array + 1] + rest
        fields = _decode(short)
        messages = fields.messages
        if messages is None or bool(messages) is not more:
            return None
        seed = salted(fields.cache_salt, seeds(fields.model))
        head = b"".join(prompt_head(fields.tools, fields.system, fields.instructions))
        if seed != known.seed or head != known.head:
            return None
        if not more:
            self._keep(known, known)
            return fields, known.conversation.prompt
        conversation = continued(known.conversation, messages)
        end = array + len(_decode_messages(short).messages) - 1
        beginning = body[: len(body) - len(short) + end]
        longer = _Known(beginning, array, objects, head, seed, conversation)
        self._keep(longer, known)
        return fields, conversation.prompt

    def _read_whole(self, body: bytes, seeds: Seeds) -> tuple[Fields, Prompt] | None:
        objects = body.count(b"{")
        if objects > MAX_VALUES:
            return None
        fields = _decode(body)
        seed, messages = seeds(fields.model), fields.messages
        if messages is None or len(messages) < 2:
            return fields, read_prompt(fields, seed)
        seed = salted(fields.cache_salt, seed)
        head = prompt_head(fields.tools, fields.system, fields.instructions)
        conversation = conversation_of(messages, head, seed)
        array = _array_of(body)
        if array >= 0:
            end = array + len(_decode_messages(body).messages) - 1
            joined = b"".join(head)
            known = _Known(body[:end], array, objects, joined, seed, conversation)
            self._keep(known, None)
        return fields, conversation.prompt

    def _keep(self, known: _Known, instead: _Known | None) -> None:
        """Keep a body, as the last used one, instead of another."""
        bodies = self._bodies
        if instead is not None:
            bodies.remove(instead)
            self.bytes -= len(instead.beginning)
        bodies.append(known)
        self.bytes += len(known.beginning)
        while self.bytes > self._most_bytes or len(bodies) > self._most_bodies:
            self.bytes -= len(bodies.pop(0).beginning)


def _array_of(body: bytes) -> int:
    """Where the array of messages begins; -1 if it is not certain."""
    place = body.find(_KEY)
    if place < 0 or _may_have_key(body[:place]) or _may_have_key(body[place + len(_KEY) :]):
        return -1
    found = _ARRAY.match(body, place)
    if found is None:
        return -1
    try:
        # The key is on the first level if an object is complete with one more member there.
        _decode_object(body[:place] + b'"":0}')
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return -1
    return found.end() - 1


def _may_have_key(text: bytes) -> bool:
    """Whether the key `messages` may be in this text, perhaps with escaped letters."""
    return _KEY in text or b"\\u006" in text or b"\\u0073" in text
