"""Decode a request body as vLLM 0.32 does. Pure: bytes in, an object or an ApiError out."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from vllm_router.lab.mock.api_error import ApiError, UnreadableBody, invalid, shown


def decode(body: bytes, content_type: str | None) -> dict[str, Any]:
    """The JSON object in a request's body."""
    if (content_type or "").lower().partition(";")[0] != "application/json":
        raise ApiError(
            400,
            "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed",
            "Bad Request",
        )
    if not body:
        raise _missing()
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        value = _decode_slowly(body)
    if value is None:
        raise _missing()
    if not isinstance(value, dict):
        raise invalid(
            [
                {
                    "type": "model_attributes_type",
                    "loc": "body",
                    "msg": "Input should be a valid dictionary or object to extract fields from",
                    "input": shown(value),
                }
            ]
        )
    return value


def _missing() -> ApiError:
    return invalid([{"type": "missing", "loc": "body", "msg": "Field required", "input": "None"}])


def _decode_slowly(body: bytes) -> object:
    """Python's own parser, as a real server uses it: accepts NaN, lone surrogates, a byte order
    mark, UTF-16 and UTF-32, and has its own error messages.
    """
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        raise invalid(
            [
                {
                    "type": "json_invalid",
                    "loc": f"body.{error.pos}",
                    "msg": "JSON decode error",
                    "input": "<dict of 0 items>",
                    "ctx": {"error": error.msg},
                }
            ]
        ) from None
    except (
        ValueError,
        RecursionError,
    ):  # not text, a number with too many digits, or nested too deeply
        raise UnreadableBody from None
    if isinstance(value, dict) and not _is_unicode(
        [value.get(field) for field in ("messages", "prompt", "input", "system")]
    ):
        raise ApiError(
            400,
            "TextEncodeInput must be Union[TextInputSequence, Tuple[InputSequence, InputSequence]]",
            "BadRequestError",
        )
    return value


def _is_unicode(value: object) -> bool:
    """False if a string in the value contains a lone surrogate."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
