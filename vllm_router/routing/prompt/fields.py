"""The fields of a JSON body that routing reads, and the conversion of values of other types.

vLLM's requests are Pydantic models: values are converted here as Pydantic converts them.
"""

from __future__ import annotations

import json

import msgspec

from vllm_router.errors import InvalidBody
from vllm_router.routing.prompt.conversation import Message
from vllm_router.routing.prompt.forms import LONGEST_NAME, is_true

NO_JSON = msgspec.Raw(b"")
"""Placeholder for an absent value. Compared by identity."""

BLANK = b" \t\r\n"
"""White space in JSON (RFC 8259)."""

_LONGEST_VALUE = 4096
"""Bytes of a value that is decoded to find its type."""


class Fields(msgspec.Struct, gc=False):
    """The fields that are decoded; everything else is skipped."""

    model: str | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    prompt_cache_key: str | None = None
    session_id: str | int | None = None
    user: str | None = None
    metadata: msgspec.Raw = NO_JSON
    priority: int | None = None
    kv_transfer_params: msgspec.Raw = NO_JSON
    ec_transfer_params: msgspec.Raw = NO_JSON
    vllm_xargs: msgspec.Raw = NO_JSON
    sampling_params: msgspec.Raw = NO_JSON
    previous_response_id: str | None = None


class AllFields(Fields, gc=False):
    """The same with the fields of the prompt, and the salt of the engine's prefix cache."""

    messages: list[Message] | None = None
    instructions: msgspec.Raw = NO_JSON
    system: msgspec.Raw = NO_JSON
    tools: msgspec.Raw = NO_JSON
    prompt: msgspec.Raw = NO_JSON
    input: msgspec.Raw = NO_JSON
    cache_salt: msgspec.Raw = NO_JSON


class RawFields(msgspec.Struct, gc=False):
    """The same without decoding, for values of unexpected types and very large ones."""

    model: msgspec.Raw = NO_JSON
    stream: msgspec.Raw = NO_JSON
    store: msgspec.Raw = NO_JSON
    background: msgspec.Raw = NO_JSON
    prompt_cache_key: msgspec.Raw = NO_JSON
    session_id: msgspec.Raw = NO_JSON
    user: msgspec.Raw = NO_JSON
    metadata: msgspec.Raw = NO_JSON
    priority: msgspec.Raw = NO_JSON
    kv_transfer_params: msgspec.Raw = NO_JSON
    ec_transfer_params: msgspec.Raw = NO_JSON
    vllm_xargs: msgspec.Raw = NO_JSON
    sampling_params: msgspec.Raw = NO_JSON
    previous_response_id: msgspec.Raw = NO_JSON
    messages: msgspec.Raw = NO_JSON
    instructions: msgspec.Raw = NO_JSON
    system: msgspec.Raw = NO_JSON
    tools: msgspec.Raw = NO_JSON
    prompt: msgspec.Raw = NO_JSON
    input: msgspec.Raw = NO_JSON
    cache_salt: msgspec.Raw = NO_JSON


def odd_fields(raw: RawFields) -> Fields:
    """The fields of a body with values of unexpected types, converted as by Pydantic.

    Values that cannot be converted count as absent; any value of `store` and `background` counts
    as true. Raises InvalidBody for a `model` that no server can have.
    """
    return Fields(
        _model(raw.model),
        is_true(_value(raw.stream)),
        _is_said(raw.store) if len(raw.store) else None,
        _is_said(raw.background),
        _text(raw.prompt_cache_key),
        _text(raw.session_id) or _integer(raw.session_id),
        _text(raw.user),
        raw.metadata,
        _integer(raw.priority),
        raw.kv_transfer_params,
        raw.ec_transfer_params,
        raw.vllm_xargs,
        raw.sampling_params,
        _text(raw.previous_response_id),
    )


def _value(raw: msgspec.Raw) -> object:
    if not 0 < len(raw) <= _LONGEST_VALUE:
        return None
    try:
        value: object = json.loads(bytes(raw))
    except (ValueError, RecursionError):
        return None
    return value


def _model(raw: msgspec.Raw) -> str | None:
    if len(raw) > LONGEST_NAME:
        if bytes(memoryview(raw)[:64]).lstrip(BLANK)[:1] != b'"':
            return None
        raise InvalidBody(f"`model` is longer than {LONGEST_NAME} bytes.")
    name = _value(raw)
    if not isinstance(name, str):
        return None
    if not _is_unicode(name):
        raise InvalidBody("`model` has half of a surrogate pair: it is not valid Unicode.")
    return name


def _text(raw: msgspec.Raw) -> str | None:
    text = _value(raw)
    return text if isinstance(text, str) and _is_unicode(text) else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _integer(raw: msgspec.Raw) -> int | None:
    """Pydantic converts `5.0` and `"5"` to 5."""
    value = _value(raw)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        try:
            return int(value) if "_" not in value else None
        except ValueError:
            return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _is_said(raw: msgspec.Raw) -> bool:
    return len(raw) > _LONGEST_VALUE or bool(_value(raw))
