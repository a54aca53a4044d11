"""Answers that the router makes itself, in OpenAI's error shape and marked as its own."""

from __future__ import annotations

import json
import math
from typing import Any

from vllm_router.errors import Refused

ERROR_HEADER = b"x-vllm-router-error"

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
}


def error_body(refused: Refused) -> bytes:
    """`{"error": {message, type, param, code}}`."""
    error = {
        "message": refused.message,
        "type": _TYPES.get(refused.status, "server_error"),
        "param": refused.param,
        "code": refused.code,
    }
    return json.dumps({"error": error}, ensure_ascii=False).encode()


def refusal_messages(
    refused: Refused, request_id: bytes, attempts: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two ASGI messages of a refusal; the second is the last of the answer."""
    body = error_body(refused)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (ERROR_HEADER, refused.code.encode()),
        (b"x-request-id", request_id),
    ]
    if attempts:
        headers.append((b"x-vllm-router-attempts", b"%d" % attempts))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.retry_after is not None:
        headers.append((b"retry-after", b"%d" % math.ceil(refused.retry_after)))
    return (
        {"type": "http.response.start", "status": refused.status, "headers": headers},
        {"type": "http.response.body", "body": body, "more_body": False},
    )
