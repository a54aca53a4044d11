"""The JSON of the messages API (Anthropic) and the responses API (OpenAI), as vLLM 0.32 has it."""

from __future__ import annotations

from typing import Any

from .request import Request
from .shapes import BaseShape, encode, named


class MessagesShape(BaseShape):
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


class ResponsesShape(BaseShape):
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
