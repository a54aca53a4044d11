"""How long a context a request surely needs, by what is certain in its body.

Looked at only where servers of one model have different `max_model_len`. Nothing is guessed: how
many tokens a text has only its tokenizer knows, and vLLM 0.32 cuts `max_tokens` to what is left of
the context. What it refuses for certain is `max_tokens` above the whole context, and a prompt of
more token ids than fit.
"""

from __future__ import annotations

import msgspec

_NONE = msgspec.Raw(b"")


class _Fields(msgspec.Struct, gc=False):
    max_tokens: msgspec.Raw = _NONE
    max_completion_tokens: msgspec.Raw = _NONE
    max_output_tokens: msgspec.Raw = _NONE
    prompt: msgspec.Raw = _NONE
    input: msgspec.Raw = _NONE


_DECODE = msgspec.json.Decoder(_Fields).decode
_LONGEST_NUMBER = 20
_LARGE = 4 * 1024 * 1024
"""Bytes of a body that is not looked into: 4 ms. The server says what is too long."""


def sure_tokens(body: bytes) -> int:
    """The shortest context in tokens that can hold the request; 0 if nothing is certain."""
    if len(body) > _LARGE:
        return 0
    try:
        fields = _DECODE(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return 0
    asked = [_number(fields.max_tokens), _number(fields.max_output_tokens)]
    if len(fields.max_completion_tokens):
        asked[0] = _number(fields.max_completion_tokens)  # of both vLLM takes this one
    return max(*asked, _ids(fields.prompt), _ids(fields.input))


def _number(raw: msgspec.Raw) -> int:
    text = bytes(raw)
    return int(text) if len(text) <= _LONGEST_NUMBER and text.isdigit() else 0


def _ids(raw: msgspec.Raw) -> int:
    """How many token ids a prompt has, 0 if it is text; of several prompts what one of them has
    at least. Counted, not decoded: a million ids would take 15 ms."""
    text = bytes(raw)
    if text[:1] != b"[" or b'"' in text or not any(digit in text for digit in b"0123456789"):
        return 0
    lists = text.count(b"[")
    prompts = lists - 1 if lists > 1 else 1
    ids = text.count(b",") + 1 - (prompts - 1)
    return -(-ids // prompts)
