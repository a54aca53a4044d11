"""What a real vLLM 0.32 refuses, in its own words. Pure: a body in, values or an ApiError out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from .options import MockOptions
from .text import bytes_of, chat_prompt, content_text, token_count


class ApiError(Exception):
    """An answer of the API server that is not 200."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param

    def body(self) -> bytes:
        return msgspec.json.encode(
            {
                "error": {
                    # A lone surrogate is valid in JSON, but no UTF-8.
                    "message": self.message.encode("utf-8", "replace").decode(),
                    "type": self.kind,
                    "param": self.param,
                    "code": self.status,
                }
            }
        )


def bad_request(message: str, param: str) -> ApiError:
    return ApiError(400, message, "BadRequestError", param)


def invalid(problems: Sequence[dict[str, Any]]) -> ApiError:
    """Pydantic's complaints as vLLM's handler for request validation errors prints them."""
    plural = "s" if len(problems) != 1 else ""
    lines = "".join(f"\n  {problem}" for problem in problems)
    message = f"{len(problems)} validation error{plural}:{lines}"
    return ApiError(400, message, "Bad Request", problems[0]["loc"])


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return f"<dict of {len(value)} items>"
    if isinstance(value, list):
        return f"<list of {len(value)} items>"
    return str(value)


def decode(body: bytes, content_type: str | None) -> dict[str, Any]:
    """The JSON object in a request's body."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if not (kind == "application/json" or kind.endswith("+json")):
        raise ApiError(
            400,
            "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed",
            "Bad Request",
        )
    if not body:
        raise invalid(
            [{"type": "missing", "loc": "body", "msg": "Field required", "input": "None"}]
        )
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = _decode_slowly(body)
    if not isinstance(value, dict):
        raise invalid(
            [
                {
                    "type": "model_attributes_type",
                    "loc": "body",
                    "msg": "Input should be a valid dictionary or object to extract fields from",
                    "input": _shown(value),
                }
            ]
        )
    return value


def _decode_slowly(body: bytes) -> object:
    """Python's own parser, for its wording and position of an error (and for NaN)."""
    try:
        return json.loads(body)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        where = error.pos if isinstance(error, json.JSONDecodeError) else 0
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise invalid(
            [
                {
                    "type": "json_invalid",
                    "loc": f"body.{where}",
                    "msg": "JSON decode error",
                    "input": "<dict of 0 items>",
                    "ctx": {"error": what},
                }
            ]
        ) from None


_KINDS: dict[str, tuple[tuple[type, ...], str, str]] = {
    "str": ((str,), "string_type", "Input should be a valid string"),
    "int": ((int,), "int_type", "Input should be a valid integer"),
    "float": ((int, float), "float_type", "Input should be a valid number"),
    "bool": ((bool,), "bool_type", "Input should be a valid boolean"),
    "list": ((list,), "list_type", "Input should be a valid list"),
    "dict": ((dict,), "model_type", "Input should be a valid dictionary"),
}
_PARSING = {
    "int": (
        "int_parsing",
        "Input should be a valid integer, unable to parse string as an integer",
    ),
    "float": (
        "float_parsing",
        "Input should be a valid number, unable to parse string as a number",
    ),
    "bool": ("bool_parsing", "Input should be a valid boolean, unable to interpret input"),
}

_COMMON = {
    "model": "str",
    "max_tokens": "int",
    "max_completion_tokens": "int",
    "max_output_tokens": "int",
    "temperature": "float",
    "top_p": "float",
    "seed": "int",
    "stream": "bool",
    "stream_options": "dict",
    "ignore_eos": "bool",
}
_REQUIRED = {
    "chat": {"messages": "list"},
    "messages": {"messages": "list", "max_tokens": "int"},
    "count": {"messages": "list"},
    "responses": {"input": ""},
    "embeddings": {"input": ""},
}


def check_types(kind: str, body: Mapping[str, Any]) -> None:
    """Raise for what pydantic would not accept; numbers in strings pass, as they do there."""
    required = _REQUIRED.get(kind, {})
    problems = []
    for field, expected in {**required, **_COMMON}.items():
        value = body.get(field)
        if value is None:
            if field in required and field not in body:
                problems.append(_problem("missing", field, "Field required", body))
            continue
        if not expected:
            continue
        types, name, text = _KINDS[expected]
        if isinstance(value, types) and (expected == "bool" or not isinstance(value, bool)):
            continue
        if isinstance(value, str) and expected in _PARSING:
            if expected != "bool" and _is_number(value, expected):
                continue
            name, text = _PARSING[expected]
        problems.append(_problem(name, field, text, value))
    if problems:
        raise invalid(problems)


def _problem(kind: str, field: str, text: str, value: object) -> dict[str, Any]:
    return {"type": kind, "loc": f"body.{field}", "msg": text, "input": _shown(value)}


def _is_number(text: str, kind: str) -> bool:
    try:
        int(text) if kind == "int" else float(text)
    except ValueError:
        return False
    return True


def unknown_model(name: object, known: Sequence[str]) -> ApiError:
    message = f"The model `{name}` does not exist. Valid aliases: {', '.join(known)}."
    return ApiError(404, message, "NotFoundError", "model")


def prompt_of(kind: str, body: Mapping[str, Any]) -> bytes:
    """The prompt as the engine sees it."""
    if kind in ("chat", "messages", "count"):
        messages = list(body["messages"])
        if body.get("system"):
            messages.insert(0, {"role": "system", "content": body["system"]})
        return chat_prompt(messages, body.get("tools"))
    if kind == "responses":
        given = body["input"]
        messages = given if isinstance(given, list) else [{"role": "user", "content": given}]
        if body.get("instructions"):
            messages = [{"role": "system", "content": body["instructions"]}, *messages]
        return chat_prompt(messages)
    prompt = body.get("prompt")
    if not prompt:
        raise bad_request(
            "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)",
            "prompt",
        )
    if isinstance(prompt, list):
        if all(isinstance(item, int) for item in prompt):
            return bytes_of(prompt)
        # Several prompts in one request; one answer for all of them is enough here.
        return "".join(content_text(item) for item in prompt).encode()
    return str(prompt).encode("utf-8", "surrogatepass")


def output_limit(kind: str, body: Mapping[str, Any], prompt: bytes, options: MockOptions) -> int:
    """How many tokens the request may get; 0 if it did not say. Raises what vLLM raises."""
    temperature = body.get("temperature")
    if temperature is not None and float(temperature) < 0:
        raise bad_request(
            f"temperature must be non-negative, got {float(temperature)}. "
            f"(parameter=temperature, value={float(temperature)})",
            "temperature",
        )
    longest = options.max_model_len
    used = token_count(prompt)
    if used > longest:
        raise bad_request(
            f"This model's maximum context length is {longest} tokens. However, your prompt "
            f"contains at least {longest + 1} input tokens, which exceeds this limit even without "
            "any output tokens. Please reduce the length of the input prompt. "
            f"(parameter=input_tokens, value={longest + 1})",
            "input_tokens",
        )
    wanted = next(
        (
            int(body[field])
            for field in ("max_completion_tokens", "max_output_tokens", "max_tokens")
            if body.get(field) is not None
        ),
        16 if kind == "completions" else 0,  # OpenAI's default for completions
    )
    if wanted < 0 or (wanted == 0 and body.get("max_tokens") == 0):
        raise bad_request(
            f"max_tokens must be at least 1, got {wanted}. (parameter=max_tokens, value={wanted})",
            "max_tokens",
        )
    if wanted > longest:
        raise bad_request(
            f"max_tokens={wanted} cannot be greater than max_model_len={longest}. Please request "
            f"fewer output tokens. (parameter=max_tokens, value={wanted})",
            "max_tokens",
        )
    return min(wanted, max(1, longest - used)) if wanted else 0
