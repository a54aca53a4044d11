"""One table per API: what each event of its streams says.

A chat or completion stream has one kind of event, the chunk; Responses and Messages name theirs.
An event that a table does not know is UNKNOWN: it is passed on and nothing is concluded from it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any

from vllm_router.proxy.answers.events import DONE, Event, decode_json
from vllm_router.proxy.answers.signs import (
    ABORTS,
    ENDS,
    FAILS,
    FINISHES,
    OPENS,
    PROVES,
    UNKNOWN,
    Signs,
)

Reader = Callable[[dict[str, Any]], Signs]


class Api(enum.Enum):
    """The dialects of answers. OTHER: embeddings, scores, tokens, audio, what is not known."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"
    OTHER = "other"


CHUNKED = (Api.CHAT, Api.COMPLETIONS)
"""The APIs whose streams have one kind of event."""

_PATHS = {
    b"/v1/chat/completions": Api.CHAT,
    b"/v1/completions": Api.COMPLETIONS,
    b"/v1/responses": Api.RESPONSES,
    b"/v1/messages": Api.MESSAGES,
}


def api_of(path: bytes) -> Api:
    """The API of an inference path, without its query."""
    return _PATHS.get(path) or _PATHS.get(path.rstrip(b"/"), Api.OTHER)


def read_event(api: Api, event: Event) -> Signs:
    """What an event says. An error is recognised in every API and in every form."""
    payload = event.payload
    if payload is DONE:
        return ENDS
    if payload is None and event.name != "error":
        return OPENS  # no data, or empty data: `id:`, `retry:`, `event: ping`
    if event.name == "error" or reports_error(payload):
        return FAILS
    if not isinstance(payload, dict):
        return UNKNOWN
    try:
        if api is Api.RESPONSES or api is Api.MESSAGES:
            table = RESPONSES if api is Api.RESPONSES else MESSAGES
            kind = payload.get("type")
            reader = table.get(kind if isinstance(kind, str) else event.name)
            if reader is not None:
                return reader(payload)
        return chunk(payload)
    except RecursionError:
        return UNKNOWN


def reports_error(payload: Any) -> bool:
    """Whether a decoded event or plain answer is an error. `"error": null` is none."""
    if not isinstance(payload, dict):
        return False
    return (
        bool(payload.get("error"))
        or payload.get("type") == "error"
        or payload.get("object") == "error"
    )


def error_in_plain_json(api: Api, body: bytes) -> bytes | None:
    """The error in a body that is one JSON object, as an event; None for any other body.

    Clients look for the key `error`.
    """
    text = body.strip()
    if not text.startswith(b"{") or not reports_error(said := decode_json(text)):
        return None
    if not said.get("error"):
        text = b'{"error": %b}' % text
    name = b"event: error\n" if api is Api.RESPONSES or api is Api.MESSAGES else b""
    # A line end cannot stand in a string of JSON.
    return b"%bdata: %b\n\n" % (name, b" ".join(text.splitlines()))


# -- what counts as output ---------------------------------------------------------------------

_NO_OUTPUT = frozenset({"role", "type", "index", "id", "object", "status", "item_id", "phase"})
"""Keys that stand beside output and are none."""


def has_output(value: Any) -> bool:
    """Whether there is anything in a delta, message, part or item that the engine has made."""
    if isinstance(value, str | int | float):
        return value is not False and value != ""
    if isinstance(value, list):
        return any(map(has_output, value))
    if isinstance(value, dict):
        return any(has_output(said) for key, said in value.items() if key not in _NO_OUTPUT)
    return False


def generated(usage: Any) -> bool:
    """Whether a `usage` counts generated tokens."""
    if not isinstance(usage, dict):
        return False
    return any(
        isinstance(count, int) and count > 0
        for count in (usage.get("completion_tokens"), usage.get("output_tokens"))
    )


# -- chat and completions ----------------------------------------------------------------------


def chunk(payload: dict[str, Any]) -> Signs:
    """A chunk of a chat, completion or transcription stream, or a plain answer of these."""
    choices = payload.get("choices")
    if not isinstance(choices, list):
        return UNKNOWN
    signs = PROVES if generated(payload.get("usage")) else OPENS
    for choice in choices:
        if not isinstance(choice, dict):
            return UNKNOWN
        reason = choice.get("finish_reason")
        if reason == "abort":
            signs |= ABORTS
        elif reason:
            signs |= FINISHES
        if (
            has_output(choice.get("delta"))
            or choice.get("text")
            or choice.get("token_ids")
            or has_output(choice.get("message"))
        ):
            signs |= PROVES
    return signs


# -- Responses ---------------------------------------------------------------------------------


def _opens(_: dict[str, Any]) -> Signs:
    return OPENS


def _proves(_: dict[str, Any]) -> Signs:
    return PROVES


def _fails(_: dict[str, Any]) -> Signs:
    return FAILS


def _ends(_: dict[str, Any]) -> Signs:
    return ENDS


def _output_of(*keys: str) -> Reader:
    """Proves if there is output under one of these keys."""

    def read(payload: dict[str, Any]) -> Signs:
        return PROVES if any(has_output(payload.get(key)) for key in keys) else OPENS

    return read


def _item(payload: dict[str, Any]) -> Signs:
    """A message or a reasoning item proves by its content, a call of any kind by being there."""
    item = payload.get("item")
    if not isinstance(item, dict):
        return UNKNOWN
    if item.get("type") in ("message", "reasoning"):
        found = has_output(item.get("content")) or has_output(item.get("summary"))
        return PROVES if found or item.get("encrypted_content") else OPENS
    return PROVES


def response(payload: dict[str, Any]) -> Signs:
    """A whole response object, of a plain answer or of the last event."""
    if not isinstance(payload.get("status"), str) and "output" not in payload:
        return UNKNOWN
    output = payload.get("output")
    signs = OPENS
    if generated(payload.get("usage")):
        signs = PROVES
    elif isinstance(output, list):
        for item in output:
            signs |= _item({"item": item})
    status = payload.get("status")
    if status == "failed":
        return FAILS
    if status == "cancelled":
        return signs | ABORTS
    if status in ("queued", "in_progress") and payload.get("background"):
        return PROVES | FINISHES  # accepted: the client asks for it later
    return signs | FINISHES if status in ("completed", "incomplete") else signs


def _last_response(payload: dict[str, Any]) -> Signs:
    inner = payload.get("response")
    signs = response(inner) if isinstance(inner, dict) else OPENS
    if signs & FAILS:
        return FAILS
    return (signs if signs & ABORTS else signs | FINISHES) & ~UNKNOWN | ENDS


def _first_response(payload: dict[str, Any]) -> Signs:
    """`response.created` proves something only where the client is not to wait (`background`)."""
    inner = payload.get("response")
    background = isinstance(inner, dict) and inner.get("background") is True
    return PROVES if background else OPENS


_CALLS = (
    "code_interpreter_call",
    "web_search_call",
    "file_search_call",
    "image_generation_call",
    "mcp_call",
    "mcp_list_tools",
)
_STEPS = ("in_progress", "searching", "interpreting", "generating", "completed", "failed")
_DELTAS = (
    "output_text",
    "refusal",
    "reasoning_text",
    "reasoning",
    "reasoning_summary_text",
    "reasoning_summary",
    "function_call_arguments",
    "custom_tool_call_input",
    "mcp_call_arguments",
    "code_interpreter_call_code",
    "audio",
    "audio.transcript",
)
_said = _output_of("delta", "text", "arguments", "input", "code", "refusal", "part")

RESPONSES: Mapping[str, Reader] = {
    "response.created": _first_response,
    "response.queued": _first_response,
    "response.in_progress": _first_response,
    "response.output_item.added": _item,
    "response.output_item.done": _item,
    "response.content_part.added": _said,
    "response.content_part.done": _said,
    "response.reasoning_part.added": _said,
    "response.reasoning_part.done": _said,
    "response.reasoning_summary_part.added": _said,
    "response.reasoning_summary_part.done": _said,
    "response.output_text.annotation.added": _proves,
    **{f"response.{name}.{end}": _said for name in _DELTAS for end in ("delta", "done")},
    **{f"response.{call}.{step}": _proves for call in _CALLS for step in _STEPS},
    "response.image_generation_call.partial_image": _proves,
    "response.completed": _last_response,
    "response.incomplete": _last_response,
    "response.cancelled": lambda _: ABORTS | ENDS,
    "response.failed": _fails,
    "error": _fails,
    "ping": _opens,
    "keepalive": _opens,
}


# -- Messages ----------------------------------------------------------------------------------


def _content_block(payload: dict[str, Any]) -> Signs:
    block = payload.get("content_block")
    if not isinstance(block, dict):
        return UNKNOWN
    if block.get("type") in ("text", "thinking"):
        return PROVES if has_output(block) else OPENS
    return PROVES


def _message_delta(payload: dict[str, Any]) -> Signs:
    """vLLM 0.32 writes `stop_reason: null` when the engine has aborted the request."""
    signs = PROVES if generated(payload.get("usage")) else OPENS
    delta = payload.get("delta")
    if isinstance(delta, dict) and "stop_reason" in delta:
        signs |= FINISHES if delta["stop_reason"] else ABORTS
    return signs


def message(payload: dict[str, Any]) -> Signs:
    """A plain answer of the Messages API."""
    content = payload.get("content")
    if not isinstance(content, list) and "stop_reason" not in payload:
        return UNKNOWN
    signs = OPENS
    if generated(payload.get("usage")):
        signs = PROVES
    elif isinstance(content, list):
        for block in content:
            signs |= _content_block({"content_block": block})
    return signs | (FINISHES if payload.get("stop_reason") else ABORTS)


MESSAGES: Mapping[str, Reader] = {
    "message_start": _opens,
    "ping": _opens,
    "content_block_start": _content_block,
    "content_block_delta": _output_of("delta"),
    "content_block_stop": _opens,
    "message_delta": _message_delta,
    "message_stop": _ends,
    "error": _fails,
}
