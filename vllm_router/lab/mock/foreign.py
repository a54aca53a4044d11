"""Error events of other engines and proxies in streams, for the switch `error`.

Each entry has the bytes after which the stream ends, and the party at fault: "client" (the request
is wrong for every server), "server", or "unclear".
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Blame = Literal["client", "server", "unclear"]

_LONG = "This model's maximum context length is 2048 tokens"
_BROKEN = "The model runner has stopped"


class ForeignError(NamedTuple):
    event: bytes
    blame: Blame


def _data(text: str) -> bytes:
    return f"data: {text}\n\n".encode()


def _event(name: str, text: str) -> bytes:
    return f"event: {name}\ndata: {text}\n\n".encode()


def _error(kind: str, code: str, message: str = _LONG) -> str:
    more = f',"code":{code}' if code else ""
    return f'{{"error":{{"message":"{message}","type":"{kind}","param":null{more}}}}}'


_RESPONSE = '"response":{{"id":"resp_1","object":"response","status":"failed","error":{error}}}'


def _failed(code: str, message: str = _LONG) -> bytes:
    error = f'{{"code":"{code}","message":"{message}"}}'
    response = _RESPONSE.format(error=error)
    return _event("response.failed", f'{{"type":"response.failed",{response},"sequence_number":2}}')


def _responses_error(code: str, message: str = _LONG) -> bytes:
    return _event(
        "error",
        f'{{"type":"error","code":"{code}","message":"{message}","param":null,'
        '"sequence_number":2}',
    )


def _anthropic(kind: str, message: str = _LONG) -> bytes:
    return _event("error", f'{{"type":"error","error":{{"type":"{kind}","message":"{message}"}}}}')


ERRORS: dict[str, ForeignError] = {
    # The client is at fault.
    "code_400": ForeignError(_data(_error("BadRequestError", "400")), "client"),
    "code_400_text": ForeignError(_data(_error("invalid_request_error", '"400"')), "client"),
    "code_422": ForeignError(_data(_error("UnprocessableEntityError", "422")), "client"),
    "code_name": ForeignError(
        _data(_error("invalid_request_error", '"context_length_exceeded"')), "client"
    ),
    "no_code": ForeignError(_data(_error("invalid_request_error", "")), "client"),
    "null_code": ForeignError(_data(_error("invalid_request_error", "null")), "client"),
    "bad_request_type": ForeignError(_data(_error("BadRequestError", "")), "client"),
    "flat_400": ForeignError(
        _data(f'{{"object":"error","message":"{_LONG}","type":"BadRequestError","code":400}}'),
        "client",
    ),
    "tgi_validation": ForeignError(
        _data('{"error":"Input validation error: too long","error_type":"validation"}'), "client"
    ),
    "anthropic_invalid": ForeignError(_anthropic("invalid_request_error"), "client"),
    "anthropic_too_large": ForeignError(_anthropic("request_too_large"), "client"),
    "responses_error": ForeignError(_responses_error("invalid_prompt"), "client"),
    "responses_failed": ForeignError(_failed("invalid_prompt"), "client"),
    # The server is at fault.
    "code_500": ForeignError(_data(_error("InternalServerError", "500", _BROKEN)), "server"),
    "code_503_text": ForeignError(
        _data(_error("ServiceUnavailableError", '"503"', _BROKEN)), "server"
    ),
    "tgi_overloaded": ForeignError(
        _data('{"error":"Model is overloaded","error_type":"overloaded"}'), "server"
    ),
    "anthropic_overloaded": ForeignError(_anthropic("overloaded_error", _BROKEN), "server"),
    "anthropic_api": ForeignError(_anthropic("api_error", _BROKEN), "server"),
    "responses_error_server": ForeignError(_responses_error("server_error", _BROKEN), "server"),
    "responses_failed_server": ForeignError(_failed("server_error", _BROKEN), "server"),
    # The same error in several spellings of the SSE standard.
    "byte_order_mark": ForeignError(
        b"\xef\xbb\xbf" + _data(_error("InternalServerError", "500", _BROKEN)), "server"
    ),
    "two_spaces": ForeignError(
        _data(" " + _error("InternalServerError", "500", _BROKEN)), "server"
    ),
    "spaced": ForeignError(_data('{ "error" : { "message" : "dead" , "code" : 500 } }'), "server"),
    "two_lines": ForeignError(
        b'data: {"error": {"message": "dead",\ndata: "code": 500}}\n\n', "server"
    ),
    "carriage_returns": ForeignError(
        b'data: {"error":{"message":"dead","code":500}}\r\n\r\n', "server"
    ),
    "error_field": ForeignError(b'error: {"code":500,"message":"dead"}\n\n', "unclear"),
    # The party at fault is missing or ambiguous.
    "contradictory": ForeignError(_anthropic("api_error"), "unclear"),
    "no_type": ForeignError(_data(f'{{"error":{{"message":"{_LONG}"}}}}'), "unclear"),
    "text": ForeignError(_data('{"error":"something went wrong"}'), "unclear"),
}


def json_of(event: bytes) -> bytes:
    """The JSON of an event, for a response that is not a stream."""
    lines = [line.lstrip(b"\xef\xbb\xbf") for line in event.splitlines()]
    return b"\n".join(
        line.partition(b":")[2].strip() for line in lines if line.startswith((b"data", b"error"))
    )
