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


class _Shape:
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


class _OpenAIShape(_Shape):
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


class MessagesShape(_Shape):
    """Anthropic's messages API. Ends without `[DONE]`."""

    done = False

    def _stop_reason(self) -> str:
        reason = self.request.finish_reason
        return "max_tokens" if reason == "length" else "end_turn"

    def _usage(self) -> dict[str, int]:
        return {
            "input_tokens": self.request.prompt_tokens,
            "output_tokens": self.request.generated,
        }

    def opening(self) -> list[bytes]:
        message: dict[str, Any] = {
            "id": self.identity,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self.request.model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": self.request.prompt_tokens, "output_tokens": 0},
        }
        block = {"type": "text", "text": ""}
        return [
            named({"type": "message_start", "message": message}),
            named({"type": "content_block_start", "content_block": block, "index": 0}),
        ]

    def delta(self, words: list[bytes]) -> list[bytes]:
        return [
            named(
                {
                    "type": "content_block_delta",
                    "delta": {"type": "text_delta", "text": word.decode()},
                    "index": 0,
                }
            )
            for word in words
        ]

    def closing(self) -> list[bytes]:
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": self.request.stop_reason}
        return [
            named({"type": "content_block_stop", "index": 0}),
            named({"type": "message_delta", "delta": delta, "usage": self._usage()}),
            named({"type": "message_stop"}),
        ]

    def whole(self) -> bytes:
        return encode(
            {
                "id": self.identity,
                "type": "message",
                "role": "assistant",
                "content": [{"type": "text", "text": self.request.text}],
                "model": self.request.model,
                "stop_reason": self._stop_reason(),
                "usage": self._usage(),
            }
        )


class ResponsesShape(_Shape):
    """OpenAI's responses API. Ends without `[DONE]`."""

    done = False

    def __init__(
        self,
        request: Request,
        identity: str,
        created: int,
        *,
        message_id: str,
        settings: dict[str, Any],
    ) -> None:
        super().__init__(request, identity, created, details=True)
        self._message_id = message_id
        self._settings = settings
        self._sequence = -1

    def _named(self, value: dict[str, Any], kind: str) -> bytes:
        """The engine sends these events' fields in alphabetical order."""
        self._sequence += 1
        fields = {**value, "sequence_number": self._sequence, "type": kind}
        return named(dict(sorted(fields.items())))

    def _response(self, *, finished: bool) -> dict[str, Any]:
        request = self.request
        status, incomplete = "in_progress", None
        if finished:
            status = "completed"
            if request.finish_reason == "length":
                status, incomplete = "incomplete", {"reason": "max_output_tokens"}
        usage = {
            "input_tokens": request.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": request.cached_tokens,
                "cache_write_tokens": request.created_tokens,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": request.generated,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": request.prompt_tokens + request.generated,
        }
        return {
            "id": self.identity,
            "created_at": self.created,
            "incomplete_details": incomplete,
            "instructions": self._settings.get("instructions"),
            "metadata": self._settings.get("metadata"),
            "model": request.model,
            "object": "response",
            "output": [self._item("completed")] if finished else [],
            "parallel_tool_calls": True,
            "temperature": self._settings.get("temperature") or 1.0,
            "tool_choice": "none",
            "tools": [],
            "top_p": self._settings.get("top_p") or 1.0,
            "background": False,
            "max_output_tokens": request.limit,
            "max_tool_calls": None,
            "previous_response_id": self._settings.get("previous_response_id"),
            "prompt": None,
            "reasoning": None,
            "service_tier": "auto",
            "status": status,
            "text": None,
            "top_logprobs": None,
            "truncation": "disabled",
            "usage": usage if finished else None,
            "user": self._settings.get("user"),
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "input_messages": None,
            "output_messages": None,
        }

    def _part(self, text: str, logprobs: list[Any] | None) -> dict[str, Any]:
        return {"annotations": [], "text": text, "type": "output_text", "logprobs": logprobs}

    def _place(self) -> dict[str, Any]:
        return {"content_index": 0, "item_id": self._message_id, "output_index": 0}

    def _item(self, status: str) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "content": [self._part(self.request.text, None)] if status == "completed" else [],
            "role": "assistant",
            "status": status,
            "type": "message",
            "phase": None,
        }

    def opening(self) -> list[bytes]:
        place = self._place()
        return [
            self._named({"response": self._response(finished=False)}, "response.created"),
            self._named({"response": self._response(finished=False)}, "response.in_progress"),
            self._named(
                {"item": self._item("in_progress"), "output_index": 0},
                "response.output_item.added",
            ),
            self._named({**place, "part": self._part("", [])}, "response.content_part.added"),
        ]

    def delta(self, words: list[bytes]) -> list[bytes]:
        return [
            self._named(
                {
                    "content_index": 0,
                    "delta": word.decode(),
                    "item_id": self._message_id,
                    "logprobs": [],
                    "output_index": 0,
                },
                "response.output_text.delta",
            )
            for word in words
        ]

    def closing(self) -> list[bytes]:
        place = self._place()
        text = self.request.text
        return [
            self._named({**place, "logprobs": [], "text": text}, "response.output_text.done"),
            self._named({**place, "part": self._part(text, None)}, "response.content_part.done"),
            self._named(
                {"item": self._item("completed"), "output_index": 0}, "response.output_item.done"
            ),
            self._named({"response": self._response(finished=True)}, "response.completed"),
        ]

    def whole(self) -> bytes:
        return encode(self._response(finished=True))
