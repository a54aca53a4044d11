"""Prompts from the JSON of a body: conversations, completions, and values that are not parsed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from zlib import crc32

import msgspec

from vllm_router.routing.prompt.blocks import Prompt, Text, hash_blocks
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
_SYSTEM = b'"system"'
_SYSTEM_ROLES = (_SYSTEM, b'"developer"')
_NO_CALLS = (ABSENT,) * 6


def messages_in(raw: msgspec.Raw | bytes) -> list[Message]:
    """The messages of a conversation; a string is one user message. Raises ValidationError."""
    if first_byte(raw) == b'"':
        return [Message(role=msgspec.Raw(b'"user"'), content=msgspec.Raw(raw))]
    return _decode_messages(raw)


def system_texts(system: msgspec.Raw) -> list[Text]:
    """The texts of Anthropic's `system`: a string, or an array of blocks."""
    texts: list[Text] = []
    if len(system):
        is_array = first_byte(system) == b"["
        add_content(system, texts, without_attributed if is_array else without_attribution)
    return texts


def chat_prompt(messages: Sequence[Message], head: Iterable[Text], seed: int = 0) -> Prompt:
    """The prompt of a conversation. `head` precedes the messages: tools, system, instructions.

    It has roles, contents and calls in order; other keys, and the order of keys, do not matter.
    Short messages after the first MAX_PARSED have their raw contents in it.
    """
    texts: list[Text] = list(head)
    shared: int | None = None
    first_turn = 0
    last_answer = 0
    answer = _last_answer(messages)
    for number, message in enumerate(messages):
        if message is answer:
            last_answer = len(texts)
        content = message.content
        if number >= MAX_PARSED and len(content) < SHORT_TEXT:
            texts.append(content)
            calls = _calls(message)
            if calls != _NO_CALLS:
                texts += calls
            continue
        role = bytes(message.role)
        if shared is None and role not in _SYSTEM_ROLES:
            shared = len(texts)
        texts.append(b"\0" + role[1:-1] + b"\0")
        if role == _SYSTEM:
            add_content(content, texts, without_attribution)
        elif len(content) < SHORT_TEXT and (text := bytes(content))[:1] != b"[":
            texts.append(unquoted(text))
        else:
            add_content(content, texts)
        calls = _calls(message)
        if calls != _NO_CALLS:
            _add_calls(message, calls, texts)
        if shared is not None and not first_turn:
            first_turn = len(texts)
    if shared is None:
        shared = len(texts)
    return _prompt(texts, shared, last_answer, first_turn or len(texts), seed)


def _calls(message: Message) -> tuple[msgspec.Raw, ...]:
    return (
        message.tool_calls,
        message.arguments,
        message.output,
        message.input,
        message.tool_call_id,
        message.call_id,
    )


def _add_calls(message: Message, calls: tuple[msgspec.Raw, ...], texts: list[Text]) -> None:
    """Append calls of tools and their results, which may be an array of parts."""
    for value in calls:
        if value is ABSENT:
            continue
        if value is message.output:
            add_content(value, texts)
        else:
            texts.append(text_of(value))


def _last_answer(messages: Sequence[Message]) -> Message | None:
    """The last answer of the assistant among the last messages, where it usually is."""
    for message in messages[: -MAX_PARSED - 1 : -1]:
        if bytes(message.role) == b'"assistant"':
            return message
    return None


def raw_prompt(*texts: Text, seed: int = 0) -> Prompt:
    """The prompt of a conversation that is not parsed."""
    return _prompt([*texts], 0, 0, len(texts), seed)


def _prompt(texts: list[Text], shared: int, last_answer: int, first_turn: int, seed: int) -> Prompt:
    """A prompt of `texts`; the other arguments are indexes into them, converted to bytes."""
    sizes = list(map(len, texts))
    size = sum(sizes)
    join = size < LARGE or size < SHORT_TEXT * len(texts)
    hashes = hash_blocks(b"".join(texts), seed=seed) if join else hash_blocks(*texts, seed=seed)
    conversation, left = seed, _CONVERSATION_BYTES
    for text in texts[:first_turn]:
        conversation = crc32(memoryview(text)[:left], conversation)
        left -= len(text)
        if left <= 0:
            break
    return Prompt(hashes, size, None, sum(sizes[:shared]), sum(sizes[:last_answer]), conversation)


def plain_prompt(raw: msgspec.Raw | bytes, seed: int = 0) -> Prompt:
    """The prompt of a completion, an embedding or the like, from its raw JSON.

    A string is taken as it stands; an array (token ids, or several texts) as JSON. The number of
    token ids is counted.
    """
    text = text_of(raw)
    tokens = None
    if text[:1] == b"[" and bytes(text[1:16]).strip(b" []")[:1].isdigit():
        tokens = bytes(text).count(b",") + 1
    conversation = crc32(text[:_CONVERSATION_BYTES], seed)
    return Prompt(hash_blocks(text, seed=seed), len(text), tokens, conversation=conversation)
