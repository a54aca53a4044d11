"""The JSON of generation answers, field by field in the order of a real vLLM 0.32.

A shape turns a request's words into the body of a plain answer (`whole`) or into SSE events, each
framed as an HTTP chunk of its own, as uvicorn sends them. The order of the events, observed:
`accepted` at once, `opening` with the engine's first output, `delta` with each further one,
`closing` at the end; `failed` replaces the rest if the request fails.
"""

from __future__ import annotations

import json
import zlib
from typing import Any, Protocol

import msgspec

from vllm_router.lab.mock.api_error import ApiError
from vllm_router.lab.mock.request import Request

VERSION = "0.32.0"
DONE = b"e\r\ndata: [DONE]\n\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."

encode = msgspec.json.encode


def chunk(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


def named(value: dict[str, Any]) -> bytes:
    """An event with the name of its `type`, as in the Messages and Responses APIs."""
    return chunk(b"event: %b\ndata: %b\n\n" % (value["type"].encode(), encode(value)))


def engine_dead() -> ApiError:
    """The error of all requests when the engine has died."""
    return ApiError(500, ENGINE_DEAD, "InternalServerError")


def error_event(error: ApiError) -> bytes:
    # vLLM writes this event with Python's json, hence the spaces.
    fields = {
        "message": error.message,
        "type": error.kind,
        "param": error.param,
        "code": error.status,
    }
    return chunk(f"data: {json.dumps({'error': fields})}\n\n".encode())


def fingerprint(model: str) -> str:
    """Constant here; a real vLLM changes it with each start."""
    return f"vllm-{VERSION}-{zlib.crc32(model.encode()):08x}"


class Shape(Protocol):
    """`done`: the stream ends with `data: [DONE]`. `comments`: silence is broken by
    `--sse-keep-alive-interval`, which vLLM 0.32 does for chats and completions only.
    """

    identity: str
    done: bool
    comments: bool

    def accepted(self) -> list[bytes]:
        """Events sent before the engine's first output."""

    def opening(self) -> list[bytes]:
        """Events before the engine's first output, even if that has no token."""

    def delta(self, words: list[bytes], *, last: bool) -> list[bytes]:
        """Events of words; `last`: these are the last words, perhaps none."""

    def closing(self) -> list[bytes]: ...

    def failed(self, error: ApiError) -> list[bytes] | None:
        """The end of a failed stream. None: vLLM closes the connection without an event."""

    def whole(self) -> bytes: ...


class BaseShape:
    """Common part of all shapes; `details` adds cached tokens to usage."""

    comments = False

    def __init__(self, request: Request, identity: str, created: int, details: bool) -> None:
        self.request = request
        self.identity = identity
        self.created = created
        self._details = details

    def _prompt_details(self) -> dict[str, Any] | None:
        if not self._details:
            return None
        return {
            "cached_tokens": self.request.cached_tokens,
            "created_cache_tokens": self.request.created_tokens,
            "multimodal_tokens": None,
        }

    def usage(self) -> dict[str, Any]:
        request = self.request
        return {
            "prompt_tokens": request.prompt_tokens,
            "total_tokens": request.prompt_tokens + request.generated,
            "completion_tokens": request.generated,
        }

    def whole_usage(self) -> dict[str, Any]:
        return {
            **self.usage(),
            "prompt_tokens_details": self._prompt_details(),
            "completion_tokens_details": None,
        }

    def final_usage(self) -> dict[str, Any]:
        details = self._prompt_details()
        if details is None:
            return self.usage()
        return {**self.usage(), "prompt_tokens_details": details}

    def accepted(self) -> list[bytes]:
        return []
