"""The minimum context length that a request certainly needs.

Only used if servers of a model have different `max_model_len`. Nothing is guessed: only the
tokenizer knows the number of tokens of a text, and vLLM 0.32 cuts `max_tokens` to the rest of the
context. It certainly refuses `max_tokens` above the whole context, and a prompt with more token ids
than the context has.
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
"""Bytes. Larger bodies are not decoded (4 ms): the server refuses prompts that are too long."""


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
        asked[0] = _number(fields.max_completion_tokens)  # takes precedence in vLLM
    return max(*asked, _ids(fields.prompt), _ids(fields.input))


def _number(raw: msgspec.Raw) -> int:
    text = bytes(raw)
    return int(text) if len(text) <= _LONGEST_NUMBER and text.isdigit() else 0


def _ids(raw: msgspec.Raw) -> int:
    """The number of token ids of a prompt, 0 for text; of several prompts the rounded-up mean.

    Counted, not decoded: a million ids would take 15 ms.
    """
    text = bytes(raw)
    if text[:1] != b"[" or b'"' in text or not any(digit in text for digit in b"0123456789"):
        return 0
    lists = text.count(b"[")
    prompts = lists - 1 if lists > 1 else 1
    ids = text.count(b",") + 1 - (prompts - 1)
    return -(-ids // prompts)
