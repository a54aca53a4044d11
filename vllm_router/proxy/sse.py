"""The little that must be known of a server-sent event stream to end it honestly."""

from __future__ import annotations

import json
import re

ABORTED = (b'"finish_reason":"abort"', b'"finish_reason": "abort"')
# Quotes and line breaks inside JSON strings are escaped, so no text of a model can contain these.
_ERROR_DATA = (b'\ndata: {"error"', b'\ndata:{"error"')
_OPENING = re.compile(rb'"delta": ?{"role": ?"assistant", ?"content": ?""(?:, ?"\w+": ?null)*}')
_FINISHED = re.compile(rb'"finish_reason": ?"')
_NO_CHOICE = re.compile(rb'"choices": ?\[\]')
_ERROR_MARKS = (b"\nevent: error", b"\nevent:error", b'"object":"error"')


def is_aborted(data: bytes) -> bool:
    """Whether an answer, plain or streamed, says that the engine gave up on it."""
    return ABORTED[0] in data or ABORTED[1] in data


def has_event(held: bytes) -> bool:
    """Whether a whole event has arrived that says something: no comment, nor what comes before
    the first token or behind the last, up to the blank line after it.
    """
    simple = held.startswith(b"data:") and held.endswith(b"\n\n")
    if simple and b'"role"' not in held and b"[]" not in held:
        return True
    return any(not _says_nothing(event) for event in _events(held))


def _events(data: bytes) -> list[bytes]:
    """The whole events in it, without those that are but comments."""
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return [
        event
        for event in lines.split(b"\n\n")[:-1]
        if any(line and line[:1] != b":" for line in event.split(b"\n"))
    ]


def _says_nothing(event: bytes) -> bool:
    """Whether it only opens a chat answer, or only counts its tokens."""
    if _NO_CHOICE.search(event):
        return True
    return _OPENING.search(event) is not None and _FINISHED.search(event) is None


def _is_empty(events: list[bytes], *, whole: bool) -> bool:
    """Whether a stream has come to its end without a token, and without a reason for that.

    vLLM 0.32 ends those so that wait in its queue when it is stopped with a grace period.
    """
    said = [event for event in events if event.strip() != b"data: [DONE]"]
    ended = len(said) < len(events) or (whole and bool(said))
    return ended and all(map(_says_nothing, said))


def ends_aborted(tail: bytes) -> bool:
    """Whether the last events of a complete stream say that the engine gave up.

    An error with a code below 500 is the request's, as it would be in a status.
    """
    if _is_plain(tail):
        return False
    if is_aborted(tail):
        return True
    tail = b"\n" + tail
    if any(mark in tail for mark in _ERROR_MARKS):
        return True
    starts = [tail.rfind(mark) for mark in _ERROR_DATA]
    if max(starts) < 0:
        return False
    code = _error_code(tail[max(starts) :])
    return code is None or code >= 500


def begins_dead(held: bytes, *, whole: bool = False) -> bool:
    """Whether the engine failed before the first token, as a stream's first events tell.

    vLLM 0.32 sends such an event, with a code of 500, when it is stopped during prefill; errors
    of the request itself come as a plain 4xx answer or with a code below 500. `whole` if nothing
    comes after what is held.
    """
    if (whole or b"[DONE]" in held) and _is_empty(_events(held), whole=whole):
        return True
    if _is_plain(held):
        return False
    if is_aborted(held):
        return True
    held = b"\n" + held
    starts = [start for start in map(held.find, _ERROR_DATA) if start >= 0]
    if not starts:
        return False
    code = _error_code(held[min(starts) :])
    return code is not None and code >= 500


def _is_plain(events: bytes) -> bool:
    """Whether no look for errors is needed: two searches instead of seven."""
    return b"error" not in events and b'"abort"' not in events


def _error_code(event: bytes) -> int | None:
    """The code in an error event that `event` begins with; None if it has none."""
    line = event[1:].split(b"\n", 1)[0]
    try:
        code = json.loads(line[len(b"data:") :])["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, int) else None


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
