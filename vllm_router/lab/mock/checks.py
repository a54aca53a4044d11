"""Request validation of vLLM 0.32, in its own words. Pure: a body in, values or an ApiError out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_router.lab.mock.api_error import ApiError, bad_request, invalid, shown
from vllm_router.lab.mock.options import MockOptions
from vllm_router.lab.mock.text import (
    bytes_of,
    chat_prompt,
    content_text,
    token_count,
    without_billing_header,
)

_TRUE = frozenset(("true", "t", "yes", "y", "on", "1"))
_FALSE = frozenset(("false", "f", "no", "n", "off", "0"))


def truth(value: object) -> bool:
    """A boolean as pydantic parses it, after `check_types` has accepted it."""
    return value.lower() in _TRUE if isinstance(value, str) else bool(value)


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
    """Raise for values that pydantic rejects; numbers in strings are accepted, as in vLLM."""
    required = _REQUIRED.get(kind, {})
    problems = []
    for field, expected in {**required, **_COMMON}.items():
        value = body.get(field)
        if value is None:
            if field in required and field not in body:
                problems.append(_problem("missing", field, "Field required", body))
            elif required.get(field):
                if kind == "chat":  # checked after pydantic
                    raise ApiError(400, "'NoneType' object is not iterable", "BadRequestError")
                problems.append(_problem("list_type", field, "Input should be a valid list", None))
            continue
        if not expected:
            continue
        types, name, text = _KINDS[expected]
        if isinstance(value, types) and (expected == "bool" or not isinstance(value, bool)):
            continue
        if expected == "bool" and value in (0, 1):
            continue
        if isinstance(value, str) and expected in _PARSING:
            if _is_written(value, expected):
                continue
            name, text = _PARSING[expected]
        elif expected == "bool" and isinstance(value, int):
            name, text = _PARSING[expected]
        problems.append(_problem(name, field, text, value))
    if problems:
        raise invalid(problems)


def _problem(kind: str, field: str, text: str, value: object) -> dict[str, Any]:
    return {"type": kind, "loc": f"body.{field}", "msg": text, "input": shown(value)}


def _is_written(text: str, kind: str) -> bool:
    """True if a string can be parsed as a value of this kind."""
    if kind == "bool":
        return text.lower() in _TRUE | _FALSE
    try:
        int(text) if kind == "int" else float(text)
    except ValueError:
        return False
    return True


def unknown_model(name: object, known: Sequence[str]) -> ApiError:
    message = f"The model `{name}` does not exist. Valid aliases: {', '.join(known)}."
    try:
        f'{{"error":{{"message":"{message}'.encode()  # as a real server finds it out, and where
    except UnicodeEncodeError as error:
        return ApiError(400, str(error), "BadRequestError")
    return ApiError(404, message, "NotFoundError", "model")


def prompt_of(kind: str, body: Mapping[str, Any]) -> bytes:
    """The prompt as the engine gets it."""
    if kind in ("chat", "messages", "count"):
        messages = list(body["messages"])
        if body.get("system"):
            system = without_billing_header(body["system"])
            messages.insert(0, {"role": "system", "content": system})
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
        # Several prompts in one request get one response here.
        return "".join(content_text(item) for item in prompt).encode()
    return str(prompt).encode("utf-8", "surrogatepass")


def output_limit(kind: str, body: Mapping[str, Any], prompt: bytes, options: MockOptions) -> int:
    """The limit of output tokens; 0 if the request has none. Raises vLLM's errors."""
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
    field, wanted = next(
        (
            (field, int(body[field]))
            for field in ("max_completion_tokens", "max_output_tokens", "max_tokens")
            if body.get(field) is not None
        ),
        ("max_tokens", 16 if kind == "completions" else 0),  # OpenAI's default for completions
    )
    if wanted < 0 or (wanted == 0 and body.get(field) == 0):
        if kind == "messages":
            raise invalid([_not_positive(wanted)])
        raise bad_request(
            f"max_tokens must be at least 1, got {wanted}. (parameter=max_tokens, value={wanted})",
            "max_tokens",
        )
    if wanted > longest:
        if kind == "messages":
            field = "max_completion_tokens"  # the Messages API is built on chats
        raise bad_request(
            f"{field}={wanted} cannot be greater than max_model_len={longest}. Please request "
            f"fewer output tokens. (parameter={field}, value={wanted})",
            field,
        )
    return min(wanted, max(1, longest - used)) if wanted else 0


def _not_positive(wanted: int) -> dict[str, Any]:
    return {
        "type": "value_error",
        "loc": "body.max_tokens",
        "msg": "Value error, max_tokens must be positive",
        "input": str(wanted),
        "ctx": {"error": ValueError("max_tokens must be positive")},
    }
