"""The JSON of generation answers, field by field in the order of a real vLLM 0.32.

A shape turns a request's words into the body of a plain answer (`whole`) or into SSE events
(`opening`, `delta`, `closing`), each framed as an HTTP chunk of its own, as uvicorn sends them.
"""

from __future__ import annotations

import zlib
from typing import Any, Protocol

import msgspec

from .request import Request

VERSION = "0.32.0"
DONE = b"e\r\ndata: [DONE]\n\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."

encode = msgspec.json.encode


def chunk(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


def data(value: object) -> bytes:
    """One unnamed event."""
    return chunk(b"data: %b\n\n" % encode(value))


def named(value: dict[str, Any]) -> bytes:
    """One event named by its `type`, as Anthropic's and the responses API have it."""
    return chunk(b"event: %b\ndata: %b\n\n" % (value["type"].encode(), encode(value)))


def error_event(message: str = ENGINE_DEAD, code: int = 500) -> bytes:
    # vLLM writes this one with Python's json, hence the spaces.
    text = (
        f'data: {{"error": {{"message": "{message}", "type": "InternalServerError", '
        f'"param": null, "code": {code}}}}}\n\n'
    )
    return chunk(text.encode())


def fingerprint(model: str) -> str:
    """Differs per server start in a real vLLM; here the same answer is the same everywhere."""
    return f"vllm-{VERSION}-{zlib.crc32(model.encode()):08x}"


class Shape(Protocol):
    """`done` tells whether the stream ends with `data: [DONE]`."""

    done: bool

    def opening(self) -> list[bytes]: ...
    def delta(self, words: list[bytes]) -> list[bytes]: ...
    def closing(self) -> list[bytes]: ...
    def whole(self) -> bytes: ...


class BaseShape:
    """What all answers know; `details`: cached tokens in usage."""

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


class _OpenAIShape(BaseShape):
    """What chat and text completions have in common: fast frames for words of known length."""

    done = True
    _object = b""
    _before = b""
    _after = b""
    _after_last = b""

    def __init__(
        self,
        request: Request,
        identity: str,
        created: int,
        *,
        details: bool = False,
        include_usage: bool = False,
        continuous_usage: bool = False,
    ) -> None:
        super().__init__(request, identity, created, details)
        self._include_usage = include_usage
        self._continuous = continuous_usage
        self._head = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
            encode(identity),
            self._object,
            created,
            encode(request.model),
        )
        tail = b"}\n\n\r\n"
        frame = len(self._head) + len(self._before) + 4 + len(self._after) + len(tail) - 2
        self._word_head = b"%x\r\n%b%b" % (frame, self._head, self._before)
        self._word_tail = self._after + tail

    def _event(self, choices: bytes, more: bytes = b"") -> bytes:
        return chunk(b"%b%b%b}\n\n" % (self._head, choices, more))

    def _usage_so_far(self, generated: int) -> bytes:
        if not self._continuous:
            return b""
        prompt = self.request.prompt_tokens
        return (
            b',"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d,'
            b'"completion_tokens_details":null}' % (prompt, prompt + generated, generated)
        )

    def opening(self) -> list[bytes]:
        return []

    def delta(self, words: list[bytes]) -> list[bytes]:
        """The words' events; if the request has finished, the last carries the finish reason."""
        last = None
        if self.request.finish_reason is not None:
            last = words[-1] if words else b""
            words = words[:-1]
        if self._continuous:
            first = self.request.generated - len(words) + (last is None)
            events = [
                self._event(self._before + word + self._after, self._usage_so_far(first + number))
                for number, word in enumerate(words)
            ]
        else:
            head, tail = self._word_head, self._word_tail
            events = [head + word + tail for word in words]
        if last is not None:
            events.append(self._last(last))
        return events

    def _last(self, word: bytes) -> bytes:
        request = self.request
        reasons = encode(request.finish_reason), encode(request.stop_reason)
        choice = self._before + word + self._after_last % reasons
        more = self._usage_so_far(request.generated)
        if not self._include_usage:
            more += b',"system_fingerprint":"%b"' % fingerprint(request.model).encode()
        return self._event(choice, more)

    def closing(self) -> list[bytes]:
        if not self._include_usage:
            return []
        more = b',"usage":%b,"system_fingerprint":"%b"' % (
            encode(self.final_usage()),
            fingerprint(self.request.model).encode(),
        )
        return [self._event(b"]", more)]


class ChatShape(_OpenAIShape):
    _object = b"chat.completion.chunk"
    _before = b'{"index":0,"delta":{"content":"'
    _after = b'"},"logprobs":null,"finish_reason":null,"token_ids":null}]'
    _after_last = b'"},"logprobs":null,"finish_reason":%b,"stop_reason":%b,"token_ids":null}]'

    def opening(self) -> list[bytes]:
        choice = (
            b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
            b'"finish_reason":null}]'
        )
        return [
            self._event(
                choice, self._usage_so_far(0) + b',"prompt_token_ids":null,"prompt_text":null'
            )
        ]

    def whole(self) -> bytes:
        request = self.request
        return encode(
            {
                "id": self.identity,
                "object": "chat.completion",
                "created": self.created,
                "model": request.model,
                "choices": [
                    {
                        "index": 0,
                        "message": {
                            "role": "assistant",
                            "content": request.text,
                            "refusal": None,
                            "annotations": None,
                            "audio": None,
                            "function_call": None,
                            "reasoning": None,
                        },
                        "logprobs": None,
                        "finish_reason": request.finish_reason,
                        "stop_reason": request.stop_reason,
                        "token_ids": None,
                        "routed_experts": None,
                    }
                ],
                "service_tier": None,
                "system_fingerprint": fingerprint(request.model),
                "usage": self.whole_usage(),
                "prompt_logprobs": None,
                "prompt_token_ids": None,
                "prompt_text": None,
                "kv_transfer_params": None,
                "ec_transfer_params": None,
                "metrics": None,
            }
        )


class CompletionShape(_OpenAIShape):
    _object = b"text_completion"
    _before = b'{"index":0,"text":"'
    _after = (
        b'","logprobs":null,"finish_reason":null,"stop_reason":null,'
        b'"prompt_token_ids":null,"token_ids":null}]'
    )
    _after_last = (
        b'","logprobs":null,"finish_reason":%b,"stop_reason":%b,'
        b'"prompt_token_ids":null,"token_ids":null}]'
    )

    def whole(self) -> bytes:
        request = self.request
        return encode(
            {
                "id": self.identity,
                "object": "text_completion",
                "created": self.created,
                "model": request.model,
                "choices": [
                    {
                        "index": 0,
                        "text": request.text,
                        "logprobs": None,
                        "finish_reason": request.finish_reason,
                        "stop_reason": request.stop_reason,
                        "token_ids": None,
                        "prompt_logprobs": None,
                        "prompt_token_ids": None,
                        "routed_experts": None,
                    }
                ],
                "service_tier": None,
                "system_fingerprint": fingerprint(request.model),
                "usage": self.whole_usage(),
                "kv_transfer_params": None,
                "ec_transfer_params": None,
                "metrics": None,
            }
        )
