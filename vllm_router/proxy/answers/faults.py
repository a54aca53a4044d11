"""The party at fault for an error that an answer reports in its body or inside its stream.

A client's mistake must never eject a server, and a broken engine must not pass its error off as a
client's. An error that shows neither is unclear: the caller tries another server.
"""

from __future__ import annotations

import enum
import re
from typing import Any


class Fault(enum.Enum):
    CLIENT = "client"  # the request is wrong: any server would say the same
    SERVER = "server"  # the engine is broken or stopping
    BUSY = "busy"  # the engine is alive and full
    UNCLEAR = "unclear"


# Types and codes as vLLM, OpenAI, Anthropic, TGI, SGLang and TensorRT-LLM write them, compared
# without case, `_`, `-`, spaces and a final `error` or `exception`.
_CLIENT_WORDS = frozenset(
    {
        "invalidrequest",
        "badrequest",
        "validation",
        "requestvalidation",
        "invalidrequesttype",
        "value",
        "invalidprompt",
        "invalidargument",
        "invalidparameter",
        "invalidtype",
        "unprocessableentity",
        "contextlengthexceeded",
        "stringabovemaxlength",
        "contextwindowexceeded",
        "requesttoolarge",
        "prompttoolong",
        "prompttoolarge",
        "inputtoolong",
        "maxtokensexceeded",
        "authentication",
        "permission",
        "permissiondenied",
        "forbidden",
        "unauthorized",
        "invalidapikey",
        "notfound",
        "modelnotfound",
        "contentfilter",
        "contentpolicyviolation",
        "unsupportedparameter",
        "unsupportedvalue",
        "missingrequiredparameter",
        "toolparsing",
        "template",
        "incompletegeneration",
    }
)
_SERVER_WORDS = frozenset(
    {
        "internalserver",
        "internal",
        "server",
        "api",
        "enginedead",
        "engine",
        "enginegenerate",
        "runtime",
        "generation",
        "serviceunavailable",
        "unavailable",
        "badgateway",
        "gatewaytimeout",
        "upstream",
        "timeout",
        "cuda",
        "outofmemory",
        "processing",
        "model",
        "vllm",
        "notimplemented",
    }
)
_BUSY_WORDS = frozenset(
    {
        "overloaded",
        "ratelimit",
        "ratelimitexceeded",
        "toomanyrequests",
        "serveroverloaded",
        "busy",
        "queuefull",
    }
)
_PLAIN = re.compile(r"[^a-z0-9]+")

# vLLM writes these for every prompt that is too long; others have messages of the same kind.
_CLIENT_MESSAGE = re.compile(
    r"maximum (?:context|model|sequence) length|max_model_len|context (?:length|window)"
    r"|maximum input length|(?:prompt|input|request)s? (?:is|are|was) too (?:long|large)"
    r"|too many (?:input )?tokens|input validation|validation error"
    r"|(?:tokens|length) (?:must be|exceeds?)|longer than the maximum"
    r"|exceeds? the (?:maximum|limit)|please reduce the length"
    r"|(?:must|should) be (?:in|between|at (?:least|most)|less|greater|<|>)"
    r"|(?:is|are) not (?:supported|allowed|a valid)|invalid (?:value|parameter|request|prompt|json)"
    r"|unsupported (?:value|parameter)|content (?:policy|filter)|chat template",
    re.IGNORECASE,
)
_SERVER_MESSAGE = re.compile(
    r"cuda|out of memory|\boom\b|engine ?(?:core|dead)|engine (?:is|has|loop|process|failed)"
    r"|internal (?:server )?error|server error|nccl|\bhip\b|device-side|illegal memory"
    r"|shutting? ?down|shutdown|shut down|is stopping|worker (?:died|failed|process)"
    r"|broken pipe|connection (?:reset|refused|closed)|segmentation|traceback",
    re.IGNORECASE,
)
# vLLM 0.32 wraps the error of a Messages stream in the text of another one.
_QUOTED_CODE = re.compile(r"""['"]code['"]: ?['"]?([45]\d\d)\b""")
_BUSY_MESSAGE = re.compile(r"overloaded|rate limit|too many requests|queue is full", re.IGNORECASE)

_LONGEST_MESSAGE = 4096
"""Characters of a message that are searched; the rest does not matter."""

_LONGEST_WORD = 100
"""Characters of a type or code that are compared."""


def fault_of(payload: Any) -> Fault:
    """The party at fault for the error in a decoded event or body.

    Numbers go before words, words before the message. Forms: OpenAI's and vLLM's
    `{"error": {"message", "type", "code"}}`, Anthropic's `{"type": "error", "error": {"type"}}`,
    OpenAI's Responses events (`error`, `response.failed`), vLLM's old
    `{"object": "error", "message", "type", "code"}`, TGI's `{"error": "text", "error_type"}`,
    FastAPI's `{"detail"}`.
    """
    fields = list(_fields(payload))
    for name, value in fields:
        if name in ("code", "status", "status_code", "http_status", "http_status_code"):
            fault = _fault_of_number(value)
            if fault is not None:
                return fault
    words = [value for name, value in fields if name in ("type", "code", "error_type", "status")]
    for known, fault in (
        (_BUSY_WORDS, Fault.BUSY),
        (_CLIENT_WORDS, Fault.CLIENT),
        (_SERVER_WORDS, Fault.SERVER),
    ):
        if any(_plain(word) in known for word in words if isinstance(word, str)):
            return _unless_contradicted(fault, fields)
    return _fault_of_message(fields)


def message_of(payload: Any) -> str | None:
    """The text of the error in a decoded event or body; None if it has none."""
    for name, value in _fields(payload):
        if name in ("message", "error", "detail") and isinstance(value, str) and value:
            return value[:_LONGEST_MESSAGE]
    return None


def _fields(payload: Any) -> list[tuple[str, Any]]:
    """Names and values that may show the party at fault, the innermost first."""
    if isinstance(payload, str):
        return [("message", payload)]
    if not isinstance(payload, dict):
        return []
    found: list[tuple[str, Any]] = []
    for name in ("error", "response"):
        inner = payload.get(name)
        if isinstance(inner, dict):
            if name == "response":
                inner = inner.get("error")
            if isinstance(inner, dict):
                found.extend(inner.items())
                deeper = inner.get("error")
                if isinstance(deeper, dict):
                    found.extend(deeper.items())
        elif isinstance(inner, str):
            found.append(("message", inner))
    if payload.get("type") == "error" or payload.get("object") == "error" or not found:
        found.extend(payload.items())
    else:
        found.extend((name, payload[name]) for name in ("error_type", "code") if name in payload)
    return [(name, value) for name, value in found if value not in ("error", None)]


def _fault_of_number(value: Any) -> Fault | None:
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 8:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if value in (429, 503, 529):
        return Fault.BUSY
    if value == 408:
        return Fault.UNCLEAR
    if 400 <= value < 500:
        return Fault.CLIENT
    if 500 <= value < 600:
        return Fault.SERVER
    return None


def _plain(word: str) -> str:
    plain = _PLAIN.sub("", word[:_LONGEST_WORD].lower())
    for end in ("error", "exception"):
        if plain.endswith(end) and plain != end:
            return plain[: -len(end)]
    return plain


def _unless_contradicted(fault: Fault, fields: list[tuple[str, Any]]) -> Fault:
    """`api_error` and `internal_error` are also written where the request is too long."""
    if fault is Fault.SERVER:
        said = _fault_of_message(fields)
        if said is Fault.CLIENT:
            return Fault.UNCLEAR
    return fault


def _fault_of_message(fields: list[tuple[str, Any]]) -> Fault:
    for name, value in fields:
        if name not in ("message", "error", "detail") or not isinstance(value, str):
            continue
        text = value[:_LONGEST_MESSAGE]
        code = _QUOTED_CODE.search(text)
        if code:
            return _fault_of_number(code.group(1)) or Fault.UNCLEAR
        of_server = _SERVER_MESSAGE.search(text)
        of_client = _CLIENT_MESSAGE.search(text)
        if of_client and of_server:
            return Fault.UNCLEAR
        if of_client:
            return Fault.CLIENT
        if of_server:
            return Fault.SERVER
        if _BUSY_MESSAGE.search(text):
            return Fault.BUSY
    return Fault.UNCLEAR
