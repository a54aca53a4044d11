"""The router's own errors in the format of the client's API: OpenAI's or Anthropic's. Pure.

OpenAI: `{"error": {"message", "type", "param", "code"}}`, the request's id in `x-request-id`.
Anthropic, on `/v1/messages` and below: `{"type": "error", "error": {"type", "message"},
"request_id"}`, the id in `request-id` as well (https://docs.anthropic.com/en/api/errors). Both
carry `x-vllm-router-error` with the code, which marks an error as the router's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from vllm_router.errors import NO_VALUES

ERROR_HEADER = b"x-vllm-router-error"

MESSAGES = b"/v1/messages"
"""The path of Anthropic's API."""

_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
}

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def is_anthropic(raw_path: bytes) -> bool:
    """Whether the path belongs to Anthropic's API: `/v1/messages` and below."""
    return raw_path.startswith(MESSAGES) and raw_path[len(MESSAGES) :][:1] in (b"", b"/")


def openai_type(status: int) -> str:
    """The `type` of an error with this status, in OpenAI's API."""
    other = "invalid_request_error" if status < 500 else "server_error"
    return _OPENAI_TYPES.get(status, other)


def anthropic_type(status: int) -> str:
    """The `type` of an error with this status, in Anthropic's API."""
    other = "invalid_request_error" if status < 500 else "api_error"
    return _ANTHROPIC_TYPES.get(status, other)


def error_response(
    path: bytes,
    status: int,
    code: str,
    message: str,
    request_id: bytes,
    *,
    param: str | None = None,
    values: Mapping[str, str] = NO_VALUES,
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of an error response.

    `path` is the request's raw path as far as it is known; it decides the format. In
    OpenAI's, `values` has the values in the message by name, for displays that translate the code.
    """
    body: dict[str, object]
    headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id)]
    if is_anthropic(path):
        headers.append((b"request-id", request_id))
        body = {
            "type": "error",
            "error": {"type": anthropic_type(status), "message": message},
            "request_id": request_id.decode("latin-1"),
        }
    else:
        kind = openai_type(status)
        error: dict[str, object] = {"message": message, "type": kind, "param": param, "code": code}
        if values:
            error["values"] = dict(values)
        body = {"error": error}
    data = json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace")
    headers.append((ERROR_HEADER, code.encode()))
    headers.append((b"content-length", b"%d" % len(data)))
    return headers, data


def path_of(line: bytes) -> bytes:
    """The raw path in a request line, which may be incomplete; empty if it has none.

    An absolute target loses its scheme and authority (RFC 9112 3.2.2).
    """
    target = line.partition(b" ")[2].partition(b" ")[0].partition(b"?")[0]
    if not target.startswith(b"/"):
        rest = target.partition(b"://")[2]
        target = rest[rest.find(b"/") :] if b"/" in rest else b""
    return target
