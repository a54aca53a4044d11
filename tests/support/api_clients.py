"""Clients of the four generation APIs, and the content of their responses."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from typing import Any

import httpx

PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
KINDS = [(api, stream) for api in PATHS for stream in (True, False)]
# Every API marks the end of a response in its own way.
ENDS = {
    "chat": b"data: [DONE]",
    "completions": b"data: [DONE]",
    "responses": b"event: response.completed",
    "messages": b"event: message_stop",
}


def body(
    api: str, tokens: int, *, stream: bool, text: str = "Hello", model: str = "tiny"
) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": model, "stream": stream}
    if api == "completions":
        asked |= {"prompt": text, "max_tokens": tokens}
    elif api == "responses":
        asked |= {"input": text, "max_output_tokens": tokens}
    else:
        asked |= {"messages": [{"role": "user", "content": text}], "max_tokens": tokens}
    if api in ("chat", "completions"):
        asked |= {"ignore_eos": True}
    return asked


@dataclass
class Got:
    """One response as a client has it; `whole`: its framing ended properly."""

    api: str
    stream: bool
    status: int = 0
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    body: bytes = b""
    whole: bool = False
    error: str = ""

    @property
    def text(self) -> str:
        """The generated text, in any API."""
        if not self.stream:
            return said(json.loads(self.body))
        return "".join(said(event) for event in self.events)

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = (line for line in self.body.split(b"\n") if line.startswith(b"data: {"))
        return [json.loads(line[6:]) for line in lines]

    @property
    def aborted(self) -> bool:
        """Whether it says that the engine aborted the request.

        The responses API does not say so.
        """
        if self.api in ("chat", "completions"):
            return b'"finish_reason":"abort"' in self.body
        if self.api == "messages" and self.stream:
            return b'"delta":{"stop_reason":null' in self.body
        return self.api == "messages" and b'"stop_reason"' not in self.body


def said(value: dict[str, Any]) -> str:
    """The text in a plain answer or in one event that adds to it."""
    if value.get("type") == "response.output_text.delta":
        return str(value["delta"])
    if value.get("type") == "content_block_delta":
        return str(value["delta"].get("text", ""))
    if "choices" in value:
        return "".join(
            choice.get("text")
            or (choice.get("delta") or choice.get("message") or {}).get("content")
            or ""
            for choice in value["choices"]
        )
    parts = [value] if value.get("type") == "message" else value.get("output", [])
    return "".join(
        part.get("text", "") for item in parts for part in item.get("content") or [] if part
    )


def ask(
    url: str,
    api: str,
    tokens: int,
    *,
    stream: bool,
    text: str = "Hello",
    begun: threading.Semaphore | None = None,
    timeout: float = 90.0,
) -> Got:
    got = Got(api, stream)
    asked = body(api, tokens, stream=stream, text=text)
    with httpx.Client(timeout=timeout) as client:
        try:
            with client.stream("POST", url + PATHS[api], json=asked) as answer:
                got.status, got.headers = answer.status_code, answer.headers
                for data in answer.iter_raw():
                    got.body += data
                    if begun is not None and said_something(got):
                        begun.release()
                        begun = None
            got.whole = True
        except httpx.TransportError as error:
            got.error = repr(error)
    return got


def said_something(got: Got) -> bool:
    try:
        return bool(got.text)
    except json.JSONDecodeError:
        return False  # the last event, or the JSON body, is incomplete
