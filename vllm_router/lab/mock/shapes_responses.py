"""OpenAI's Responses API as vLLM 0.32 implements it."""

from __future__ import annotations

from typing import Any

from vllm_router.lab.mock.api_error import ApiError
from vllm_router.lab.mock.checks import truth
from vllm_router.lab.mock.request import Request
from vllm_router.lab.mock.shapes import BaseShape, encode, named


class ResponsesShape(BaseShape):
    """OpenAI's Responses API. Ends without `[DONE]`."""

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
        self._has_item = False

    def _named(self, value: dict[str, Any], kind: str) -> bytes:
        """The engine sends these events' fields in alphabetical order."""
        self._sequence += 1
        fields = {**value, "sequence_number": self._sequence, "type": kind}
        return named(dict(sorted(fields.items())))

    def unfinished(self, status: str) -> bytes:
        """The response object of a background request that has no result."""
        return encode({**self._response(finished=False), "status": status})

    def _response(self, *, finished: bool, with_output: bool = False) -> dict[str, Any]:
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
            "output": [self._item("completed")] if with_output else [],
            "parallel_tool_calls": True,
            "temperature": self._settings.get("temperature") or 1.0,
            "tool_choice": "none",
            "tools": [],
            "top_p": self._settings.get("top_p") or 1.0,
            "background": truth(self._settings.get("background")),
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
        text = self.request.text
        return {
            "id": self._message_id,
            "content": [self._part(text, None)] if status == "completed" and text else [],
            "role": "assistant",
            "status": status,
            "type": "message",
            "phase": None,
        }

    def accepted(self) -> list[bytes]:
        response = self._response(finished=False)
        return [
            self._named({"response": response}, "response.created"),
            self._named({"response": response}, "response.in_progress"),
        ]

    def opening(self) -> list[bytes]:
        return []

    def delta(self, words: list[bytes], *, last: bool) -> list[bytes]:
        events = []
        place = self._place()
        if words and not self._has_item:
            self._has_item = True
            item = {"item": self._item("in_progress"), "output_index": 0}
            events = [
                self._named(item, "response.output_item.added"),
                self._named({**place, "part": self._part("", [])}, "response.content_part.added"),
            ]
        for word in words:
            delta = {**place, "delta": word.decode(), "logprobs": []}
            events.append(self._named(delta, "response.output_text.delta"))
        return events

    def closing(self) -> list[bytes]:
        """The last event is `response.completed` whatever the status, even after an abort."""
        place = self._place()
        text = self.request.text
        part = {**place, "part": self._part(text, None)}
        item = {"item": self._item("completed"), "output_index": 0}
        response = self._response(finished=True, with_output=self._has_item)
        events = []
        if self._has_item:
            events = [
                self._named({**place, "logprobs": [], "text": text}, "response.output_text.done"),
                self._named(part, "response.content_part.done"),
                self._named(item, "response.output_item.done"),
            ]
        return [*events, self._named({"response": response}, "response.completed")]

    def failed(self, error: ApiError) -> None:
        """vLLM 0.32 sends no event: the exception closes the connection."""

    def whole(self) -> bytes:
        return encode(self._response(finished=True, with_output=True))
