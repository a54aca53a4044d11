"""The common cases of `opening`, `ending` and `whole`, decoded into types: a quarter of the cost.

Each function returns None unless it is certain; then the tables decide.
tests/unit/proxy/test_answers.py compares both.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from vllm_router.proxy.answers.signs import OPENS, PROVES, Signs
from vllm_router.proxy.answers.usage import MOST_TOKENS, Usage

_Count = Annotated[int, msgspec.Meta(ge=0, lt=MOST_TOKENS)]
"""A body with any other number is not decoded: the tables read it."""

_NO_JSON = msgspec.Raw(b"")
_NO_END = ("", "abort")
_END = b"\n\ndata: [DONE]\n\n"

_LONG = 4096
"""Bytes from which a body is decoded without its first text."""

_TEXTS = (b'"content":"', b'"text":"')
_BEFORE_TEXT = 1024
"""Bytes from the beginning in which the text begins (vLLM 0.32: 150)."""

_SPARSE = 512
"""Bytes of text per quote, from which a search for its end costs less than decoding."""

_BACKSLASH = 0x5C


class _Details(msgspec.Struct, gc=False):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    cache_read_input_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


class _ChatUsage(msgspec.Struct, gc=False):
    prompt_tokens: _Count
    completion_tokens: _Count
    prompt_tokens_details: _Details | None = None


class _ChatChoice(msgspec.Struct, gc=False):
    finish_reason: str


class _ChatBody(msgspec.Struct, gc=False):
    """A plain answer of a chat or completion that has come to an end."""

    choices: list[_ChatChoice]
    usage: _ChatUsage
    error: msgspec.Raw = _NO_JSON


class _Choice(msgspec.Struct, gc=False):
    finish_reason: str | None = None


class _Body(msgspec.Struct, gc=False):
    """A plain answer of any of the four APIs."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = _NO_JSON
    object: str | None = None
    type: str | None = None
    status: str | None = None
    stop_reason: str | None = None


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None


class _ChunkChoice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _FirstDelta(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    role: str | None = None
    content: str | None = None


class _FirstChoice(msgspec.Struct, gc=False):
    delta: _FirstDelta | None = None
    text: None = None
    token_ids: None = None
    message: None = None
    finish_reason: None = None


class _FirstChunk(msgspec.Struct, gc=False):
    """The chunk without a token that begins a chat stream; any other cannot be decoded as one."""

    choices: list[_FirstChoice]
    usage: None = None
    error: None = None
    object: str | None = None
    type: str | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_ChunkChoice]
    usage: _Usage | None = None
    error: msgspec.Raw = _NO_JSON
    object: str | None = None
    type: str | None = None


_CHAT_BODY = msgspec.json.Decoder(_ChatBody)
_BODY = msgspec.json.Decoder(_Body)
_CHUNK = msgspec.json.Decoder(_Chunk)
_FIRST_CHUNK = msgspec.json.Decoder(_FirstChunk)


def without_text(body: bytes) -> bytes:
    """The body without its first text, if that is long and its end is found quickly.

    Decoding would read each byte of it. So a control character or a wrong escape in it goes
    unnoticed here; whether the body has come to its end does not.
    """
    if len(body) < _LONG:
        return body
    for key in _TEXTS:
        start = body.find(key, 0, _BEFORE_TEXT) + len(key)
        if start >= len(key):
            break
    else:
        return body
    end, quotes = body.find(b'"', start), 1
    while end > start and body[end - 1] == _BACKSLASH:
        # Two may be an escaped backslash before the end.
        if body[end - 2] == _BACKSLASH or quotes * _SPARSE > end - start + 4 * _SPARSE:
            return body
        end = body.find(b'"', end + 1)
        quotes += 1
    return body[:start] + body[end:] if end > start else body


def chat_usage(body: bytes) -> Usage | None:
    """The usage of a plain chat or completion that has tokens and an orderly end; None if unsure.

    The most frequent kind of answer.
    """
    try:
        said = _CHAT_BODY.decode(without_text(body))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    usage, choices = said.usage, said.choices
    if usage.completion_tokens <= 0 or said.error is not _NO_JSON or not choices:
        return None
    for choice in choices:
        if choice.finish_reason in _NO_END:
            return None
    details = usage.prompt_tokens_details
    cached = details.cached_tokens if details is not None else None
    return Usage(usage.prompt_tokens, cached, usage.completion_tokens)


def usage_of_finished(body: bytes) -> Usage | None:
    """The usage of a plain answer that has tokens and an orderly end; None if unsure."""
    try:
        said = _BODY.decode(without_text(body))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    usage = said.usage
    if usage is None or said.error is not _NO_JSON or "error" in (said.type, said.object):
        return None
    if not (usage.completion_tokens or usage.output_tokens or 0) > 0:
        return None
    return _usage(usage) if _is_finished(said) else None


def _is_finished(said: _Body) -> bool:
    """Whether the fields of exactly one API say that the answer has come to its end."""
    ends = (bool(said.choices), said.stop_reason is not None, said.status is not None)
    if ends.count(True) != 1:
        return False
    if said.choices:
        return all(choice.finish_reason not in ("", None, "abort") for choice in said.choices)
    return said.status in ("completed", "incomplete") or bool(said.stop_reason)


def opening_signs(piece: bytes) -> Signs | None:
    """What the first chunks of a chat or completion stream say: OPENS or PROVES; None if unsure.

    The piece must begin with a chunk. It is read up to the first chunk with text.
    """
    start = 0
    while start < len(piece):
        end = piece.find(b"\n\n", start)
        if end < 0 or not piece.startswith(b"data: {", start):
            return None
        data = piece[start + 6 : end]
        if b"\n" in data or b"\r" in data:
            return None
        try:
            said = _CHUNK.decode(data)
            if said.error is not _NO_JSON or "error" in (said.type, said.object):
                return None
            for choice in said.choices:
                if choice.text or (choice.delta is not None and choice.delta.content):
                    return PROVES
            _FIRST_CHUNK.decode(data)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return None
        start = end + 2
    return OPENS


def finished_usage(tail: bytes) -> tuple[Usage | None] | None:
    """The usage, or None, of a stream of chunks with an orderly end; None if unsure."""
    if not tail.endswith(_END):
        return None
    end = len(tail) - len(_END)
    usage: Usage | None = None
    for _ in range(2):
        start = tail.rfind(b"\n\n", 0, end) + 2
        if start < 2 or not tail.startswith(b"data: {", start):
            return None
        try:
            said = _CHUNK.decode(tail[start + 6 : end])
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return None
        if said.error is not _NO_JSON or "error" in (said.type, said.object):
            return None
        if said.usage is not None and usage is None:
            usage = _usage(said.usage)
        choices = said.choices
        if choices:
            reason = choices[0].finish_reason
            sure = len(choices) == 1 and reason and reason != "abort"
            return (usage,) if sure else None
        end = start - 2
    return None


def _usage(said: _Usage) -> Usage | None:
    prompt = said.prompt_tokens if said.prompt_tokens is not None else said.input_tokens
    if prompt is None:
        return None
    completion = said.completion_tokens
    if completion is None:
        completion = said.output_tokens
    cached = said.cache_read_input_tokens
    if cached is None:
        details = said.prompt_tokens_details or said.input_tokens_details
        cached = details.cached_tokens if details is not None else None
    return Usage(prompt, cached, completion)
