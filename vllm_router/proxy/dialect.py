"""Errors of the router inside an event stream, in the dialect of the client's API."""

from __future__ import annotations

import json

from vllm_router.http.error_format import is_anthropic


def error_event(path: bytes, code: str, message: str) -> bytes:
    """The event that reports a broken stream to the client.

    It may only follow a complete event. `[DONE]` never follows it: for the OpenAI SDK a stream
    with a clean end is a success.
    """
    if is_anthropic(path):
        body = {"type": "error", "error": {"type": "api_error", "message": message}}
        return b"event: error\ndata: " + json.dumps(body).encode() + b"\n\n"
    if path.startswith(b"/v1/responses"):
        body_ = {"type": "error", "code": code, "message": message, "param": None}
        return b"event: error\ndata: " + json.dumps(body_).encode() + b"\n\n"
    error = {"message": message, "type": "upstream_error", "param": None, "code": code}
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
