"""Prompts from the JSON of a body: conversations, completions, and values that are not parsed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from vllm_router.routing.prompt.blocks import (
    HashState,
    Prompt,
    Text,
    extend_hashes,
)
from vllm_router.routing.prompt.content import (
    ABSENT,
    LARGE,
    MAX_PARSED,
    SHORT_TEXT,
    add_content,
    first_byte,
    text_of,
    unquoted,
    without_attributed,
    without_attribution,
)
from vllm_router.steps import WORK_PER_SLICE, Steps, Work

_CONVERSATION_BYTES = 1 << 16
"""Bytes at the start that identify a conversation."""


class Message(msgspec.Struct, gc=False):
    """The parts of a message that go into the prompt, as raw JSON (see `content.py`)."""

    role: msgspec.Raw = ABSENT
    content: msgspec.Raw = ABSENT
    tool_calls: msgspec.Raw = ABSENT
    arguments: msgspec.Raw = ABSENT
    output: msgspec.Raw = ABSENT
    input: msgspec.Raw = ABSENT
    tool_call_id: msgspec.Raw = ABSENT
    call_id: msgspec.Raw = ABSENT


_decode_messages = msgspec.json.Decoder(list[Message]).decode
_decode_only = msgspec.json.Decoder(tuple[msgspec.Raw]).decode
_SYSTEM = b'"system"'
_SYSTEM_ROLES = (_SYSTEM, b'"developer"')
_NO_CALLS = (ABSENT,) * 6

_PER_MESSAGE = 1 << 10
"""The work of a message, without the work of its parts, see `Work`."""


def messages_in(raw: msgspec.Raw | bytes) -> list[Message]:
    """The messages of a conversation; a string is one user message. Raises ValidationError."""
    if first_byte(raw) == b'"':
        return [Message(role=msgspec.Raw(b'"user"'), content=msgspec.Raw(raw))]
    return _decode_messages(raw)


def system_texts(system: msgspec.Raw) -> Steps[list[Text]]:
    """The texts of Anthropic's `system`: a string, or an array of blocks."""
    texts: list[Text] = []
    is_array = first_byte(system) == b"["
    edited = without_attributed if is_array else without_attribution
    yield from add_content(system, texts, Work(), edited)
    return texts


class Conversation(msgspec.Struct, frozen=True, gc=False):
    """A conversation as far as it is known: more messages may follow.

    hashing: of its texts.
    count: number of its messages.
    shared: bytes of the leading tools and system messages; None if it has no others yet.
    checksum, left: of everything up to the end of the first turn, at most `_CONVERSATION_BYTES`.
    in_first_turn: whether that end has not come yet.
    answer, answer_at: number of the last answer of the assistant, -1 for none, and the bytes
        before it.
    """

    hashing: HashState
    checksum: int
    count: int = 0
    shared: int | None = None
    left: int = _CONVERSATION_BYTES
    in_first_turn: bool = True
    answer: int = -1
    answer_at: int = 0

    @property
    def prompt(self) -> Prompt:
        """The prompt of a conversation that ends here."""
        hashing = self.hashing
        recent = self.answer >= max(0, self.count - MAX_PARSED)
        return Prompt(
            hashing.hashes,
            hashing.size,
            None,
            hashing.size if self.shared is None else self.shared,
            self.answer_at if recent else 0,
            self.checksum,
        )


def conversation_of(
    messages: Sequence[Message], head: Iterable[Text], seed: int = 0
) -> Steps[Conversation]:
    """A whole conversation. `head` precedes the messages: tools, system, instructions.

    It has roles, contents and calls in order; other keys, and the order of keys, do not matter.
    Short messages after the first MAX_PARSED have their raw contents in it.
    """
    return continued(Conversation(HashState(checksum=seed), seed), messages, head)


def continued(
    before: Conversation, messages: Sequence[Message], head: Iterable[Text] = ()
) -> Steps[Conversation]:
    """The conversation with more messages; `head` precedes the first message of all."""
    work = Work()
    texts: list[Text] = list(head)
    is_shared = before.shared is None
    shared: int | None = None
    first_turn = last_answer = 0
    answer, answer_number = _last_answer(messages), before.answer
    for number, message in enumerate(messages, before.count):
        if message is answer:
            last_answer, answer_number = len(texts), number
        content = message.content
        work.left -= _PER_MESSAGE
        if work.left < 0:
            work.left = WORK_PER_SLICE
            yield
        if number >= MAX_PARSED and len(content) < SHORT_TEXT:
            texts.append(content)
            calls = _calls(message)
            if calls != _NO_CALLS:
                texts += [call for call in calls if call is not ABSENT]
            continue
        role = bytes(message.role)
        if is_shared and role not in _SYSTEM_ROLES:
            is_shared, shared = False, len(texts)
        texts.append(b"\0" + role[1:-1] + b"\0")
        if role == _SYSTEM:
            yield from add_content(content, texts, work, without_attribution)
        elif len(content) < SHORT_TEXT and (text := bytes(content))[:1] != b"[":
            texts.append(unquoted(text))
        else:
            yield from add_content(content, texts, work)
        calls = _calls(message)
        if calls != _NO_CALLS:
            yield from _add_calls(message, calls, texts, work)
        if not is_shared and not first_turn:
            first_turn = len(texts)
    sizes = list(map(len, texts))
    if sum(sizes) > WORK_PER_SLICE:
        yield
    known = before.hashing.size
    hashing, checksum, left = before.hashing, before.checksum, before.left
    if before.in_first_turn and left:
        size = min(left, sum(sizes[: first_turn or len(texts)]))
        hashing, texts = _hash_beginning(hashing, texts, size)
        checksum = hashing.checksum
        left -= size
    return Conversation(
        _extend_hashes(hashing, texts),
        checksum,
        before.count + len(messages),
        before.shared if shared is None else known + sum(sizes[:shared]),
        left,
        before.in_first_turn and not first_turn,
        answer_number,
        before.answer_at if answer is None else known + sum(sizes[:last_answer]),
    )


def _hash_beginning(
    hashing: HashState, texts: list[Text], size: int
) -> tuple[HashState, list[Text]]:
    """Hash the first `size` bytes of the texts, and return the rest of them.

    The running checksum is then the one that identifies the conversation.
    """
    for number, text in enumerate(texts):
        length = len(text)
        if size < length:
            view = memoryview(text)
            hashing = _extend_hashes(hashing, [*texts[:number], view[:size]])
            return hashing, [view[size:], *texts[number + 1 :]]
        size -= length
    return _extend_hashes(hashing, texts), []


def _extend_hashes(hashing: HashState, texts: list[Text]) -> HashState:
    """Hash more texts; short ones are joined, which is faster than many calls."""
    if not texts:
        return hashing
    size = sum(map(len, texts))
    join = size < LARGE or size < SHORT_TEXT * len(texts)
    return extend_hashes(hashing, (b"".join(texts),) if join else texts)


def _calls(message: Message) -> tuple[msgspec.Raw, ...]:
    return (
        message.tool_calls,
        message.arguments,
        message.output,
        message.input,
        message.tool_call_id,
        message.call_id,
    )


def _add_calls(
    message: Message, calls: tuple[msgspec.Raw, ...], texts: list[Text], work: Work
) -> Steps[None]:
    """Append calls of tools and their results, which may be an array of parts."""
    for value in calls:
        if value is ABSENT:
            continue
        if value is message.output:
            yield from add_content(value, texts, work)
        elif len(value) != 2 or bytes(value) != b"[]":  # vLLM drops empty `tool_calls`
            texts.append(text_of(value))


def _last_answer(messages: Sequence[Message]) -> Message | None:
    """The last answer of the assistant among the last messages, where it usually is."""
    for message in messages[: -MAX_PARSED - 1 : -1]:
        if bytes(message.role) == b'"assistant"':
            return message
    return None


def raw_prompt(*texts: Text, seed: int = 0) -> Steps[Prompt]:
    """The prompt of a conversation that is not parsed."""
    size = min(_CONVERSATION_BYTES, sum(map(len, texts)))
    hashing, rest = _hash_beginning(HashState(checksum=seed), [*texts], size)
    conversation, work = hashing.checksum, Work()
    for text in rest:
        view = memoryview(text)
        for place in range(0, len(view), WORK_PER_SLICE):
            piece = view[place : place + WORK_PER_SLICE]
            hashing = extend_hashes(hashing, (piece,))
            work.left -= len(piece)
            if work.left < 0:
                work.left = WORK_PER_SLICE
                yield
    return Prompt(hashing.hashes, hashing.size, conversation=conversation)


def only_item(raw: msgspec.Raw) -> msgspec.Raw:
    """The item of an array with one text, or one list of token ids; else the value itself.

    vLLM computes the same prompt for both.
    """
    if bytes(memoryview(raw)[:64]).translate(None, b" \t\r\n")[:2] not in (b'["', b"[["):
        return raw
    try:
        (item,) = _decode_only(raw)
    except (msgspec.DecodeError, RecursionError):
        return raw  # several, of which vLLM makes a prompt each
    return item


def plain_prompt(raw: msgspec.Raw, seed: int = 0) -> Prompt:
    """The prompt of a completion, an embedding or the like, from its raw JSON.

    A string is taken as it stands, also as the only one of an array; an array of token ids, or of
    several texts, as JSON. The number of token ids is counted.
    """
    text = text_of(only_item(raw))
    tokens = None
    if text[:1] == b"[" and bytes(text[1:16]).strip(b" []")[:1].isdigit():
        tokens = bytes(text).count(b",") + 1
    hashing, conversation = _hash_all([text], seed)
    return Prompt(hashing.hashes, len(text), tokens, conversation=conversation)


def _hash_all(texts: list[Text], seed: int) -> tuple[HashState, int]:
    """The hashes of a whole prompt, and what identifies its conversation."""
    size = min(_CONVERSATION_BYTES, sum(map(len, texts)))
    hashing, texts = _hash_beginning(HashState(checksum=seed), texts, size)
    return _extend_hashes(hashing, texts), hashing.checksum
