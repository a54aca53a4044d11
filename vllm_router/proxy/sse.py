"""The little that must be known of a server-sent event stream to end it honestly."""

from __future__ import annotations

import json

ABORTED = (b'"finish_reason":"abort"', b'"finish_reason": "abort"')
_ERROR_EVENTS = (b'data: {"error"', b'data:{"error"', b"event: error", b'"object":"error"')


def has_data(held: bytes) -> bool:
    """Whether anything but comments and blank lines has arrived."""
    return any(line.strip(b"\r") and not line.startswith(b":") for line in held.split(b"\n"))


def ends_aborted(tail: bytes) -> bool:
    """Whether the last events of a complete stream say that the engine gave up."""
    return any(mark in tail for mark in ABORTED) or any(mark in tail for mark in _ERROR_EVENTS)


def at_boundary(tail: bytes) -> bool:
    """Whether a stream that ends in `tail` stands between two events."""
    return not tail or tail.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))


def error_event(path: bytes, code: str, message: str, tail: bytes) -> bytes:
    """The event that tells the client of a broken stream, in the dialect of its API.

    If the stream was cut inside an event, that one is ended first. `[DONE]` never follows: to the
    OpenAI SDK a stream that ends cleanly is a success.
    """
    start = b"" if at_boundary(tail) else b"\n\n"
    if path.startswith(b"/v1/messages"):
        body = {"type": "error", "error": {"type": "api_error", "message": message}}
        return start + b"event: error\ndata: " + json.dumps(body).encode() + b"\n\n"
    if path.startswith(b"/v1/responses"):
        body_ = {"type": "error", "code": code, "message": message, "param": None}
        return start + b"event: error\ndata: " + json.dumps(body_).encode() + b"\n\n"
    error = {"message": message, "type": "upstream_error", "param": None, "code": code}
    return start + b"data: " + json.dumps({"error": error}).encode() + b"\n\n"


def begins_dead(held: bytes) -> bool:
    """Whether a stream's first event says that the engine failed before the first token.

    vLLM 0.32 sends such an event, with a code of 500, when it is stopped during prefill; errors
    of the request itself come as a plain 4xx answer or with a code below 500.
    """
    if any(mark in held for mark in ABORTED):
        return True
    start = held.find(b'data: {"error"')
    if start < 0:
        return False
    line = held[start + 6 :].split(b"\n", 1)[0]
    try:
        code = json.loads(line)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(code, int) and code >= 500
