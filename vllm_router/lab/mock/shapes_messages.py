"""Anthropic's Messages API as vLLM 0.32 implements it."""

from __future__ import annotations

from typing import Any

from vllm_router.lab.mock.api_error import ApiError
from vllm_router.lab.mock.shapes import BaseShape, encode, named

# vLLM makes these events from a chat stream. An error in it lacks the fields of a chunk, so that
# the client gets pydantic's message, which shows both ends of the error.
_NOT_A_CHUNK = "2 validation errors for ChatCompletionStreamResponse"
_MISSING = (
    "\n{field}\n  Field required [type=missing, input_value={shown}, input_type=dict]\n"
    "    For further information visit https://errors.pydantic.dev/2.14/v/missing"
)
_SHOWN_CHARACTERS = 25, 24  # characters of the error's beginning and end


class MessagesShape(BaseShape):
    """Anthropic's Messages API. Ends without `[DONE]`."""

    done = False
    _has_block = False

    def _stop_reason(self) -> str | None:
        """None for an aborted response."""
        request = self.request
        if request.finish_reason == "length":
            return "max_tokens"
        if request.finish_reason != "stop":
            return None
        return "end_turn" if request.stop_reason is None else "stop_sequence"

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
        return [named({"type": "message_start", "message": message})]

    def delta(self, words: list[bytes], *, last: bool) -> list[bytes]:
        events = []
        if words and not self._has_block:
            self._has_block = True
            block = {"type": "text", "text": ""}
            events.append(
                named({"type": "content_block_start", "content_block": block, "index": 0})
            )
        for word in words:
            delta = {"type": "text_delta", "text": word.decode()}
            events.append(named({"type": "content_block_delta", "delta": delta, "index": 0}))
        return events

    def closing(self) -> list[bytes]:
        reason = self._stop_reason()
        if not self.request.generated:
            # Without the chat's finish reason, vLLM reports a normal end.
            reason = "end_turn"
        delta = {"stop_reason": reason, "stop_sequence": self.request.stop_reason}
        events = [named({"type": "content_block_stop", "index": 0})] if self._has_block else []
        return [
            *events,
            named({"type": "message_delta", "delta": delta, "usage": self._usage()}),
            named({"type": "message_stop"}),
        ]

    def failed(self, error: ApiError) -> list[bytes]:
        given = {
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.status,
        }
        text = repr({"error": given})
        first, last = _SHOWN_CHARACTERS
        shown = f"{text[:first]}...{text[-last:]}"
        message = _NOT_A_CHUNK + "".join(
            _MISSING.format(field=field, shown=shown) for field in ("model", "choices")
        )
        return [
            named({"type": "error", "error": {"type": "internal_error", "message": message}}),
        ]

    def whole(self) -> bytes:
        answer: dict[str, Any] = {
            "id": self.identity,
            "type": "message",
            "role": "assistant",
            "content": [{"type": "text", "text": self.request.text}],
            "model": self.request.model,
        }
        if (reason := self._stop_reason()) is not None:
            answer["stop_reason"] = reason
        if self.request.stop_reason is not None:
            answer["stop_sequence"] = self.request.stop_reason
        return encode({**answer, "usage": self._usage()})
