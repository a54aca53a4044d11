"""Errors that vLLM 0.32 finds only when it prepares the engine's input.

A plain request gets a 400 as for any other error. A streamed request has got its 200 by then, and
the error is sent inside the stream. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_router.lab.mock.api_error import ApiError, bad_request

VOCABULARY = 2048  # of the captured model
_END_OF_TEXT = 2  # its token that ends a response
_CERTAIN = 100  # the largest logit_bias
_MAX_LOGPROBS = 20
_SCHEMA_TYPES = frozenset(("null", "boolean", "integer", "number", "string", "array", "object"))


def ends_at_once(body: Mapping[str, Any]) -> bool:
    """True if the model can only generate the end of text."""
    bias = body.get("logit_bias")
    certain = isinstance(bias, dict) and bias.get(str(_END_OF_TEXT), 0) >= _CERTAIN
    return certain or body.get("allowed_token_ids") == [_END_OF_TEXT]


def find(kind: str, body: Mapping[str, Any]) -> ApiError | None:
    """The first error, or None. The Messages API has none of vLLM's own parameters."""
    if kind != "messages":
        found = _token_ids(body)
        if found is None and kind != "responses":
            found = _allowed(body) or _logprobs(kind, body)
        if found is not None:
            return found
    return _schema(body)


def _token_ids(body: Mapping[str, Any]) -> ApiError | None:
    for field in ("stop_token_ids", "logit_bias"):
        value = body.get(field)
        ids = [int(each) for each in value] if isinstance(value, list | dict) else []
        beyond = [each for each in ids if not 0 <= each < VOCABULARY]
        if beyond:
            return bad_request(
                f"token_id(s) {beyond} in {field} contain out-of-vocab token ids. Vocabulary "
                f"size: {VOCABULARY} (parameter={field}, value={beyond})",
                field,
            )
    return None


def _allowed(body: Mapping[str, Any]) -> ApiError | None:
    ids = body.get("allowed_token_ids")
    if not isinstance(ids, list):
        return None
    where = f"(parameter=allowed_token_ids, value={ids})"
    if not ids:
        text = f"allowed_token_ids is not None and empty! {where}"
        return bad_request(text, "allowed_token_ids")
    if any(not 0 <= each < VOCABULARY for each in ids):
        text = f"allowed_token_ids contains out-of-vocab token id! {where}"
        return bad_request(text, "allowed_token_ids")
    return None


def _logprobs(kind: str, body: Mapping[str, Any]) -> ApiError | None:
    wanted = body.get("top_logprobs" if kind == "chat" else "logprobs")
    if not isinstance(wanted, int) or wanted <= _MAX_LOGPROBS:
        return None
    return bad_request(
        f"Requested sample logprobs of {wanted}, which is greater than max allowed: "
        f"{_MAX_LOGPROBS} (parameter=logprobs, value={wanted})",
        "logprobs",
    )


def _schema(body: Mapping[str, Any]) -> ApiError | None:
    """A JSON schema with an unknown type, wherever an API accepts a schema."""
    for path in (
        ("structured_outputs", "json"),
        ("response_format", "json_schema", "schema"),
        ("text", "format", "schema"),
        ("output_config", "format", "schema"),
    ):
        value: Any = body
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind not in _SCHEMA_TYPES:
            return ApiError(400, f"Grammar error: Invalid type: {kind}", "BadRequestError")
    return None
