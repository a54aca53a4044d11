"""The clients of `scripts/bench-routing`: chats, and agents as Claude Code and Codex send them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from vllm_router.errors import RouterError
from vllm_router.http.client.pool import Pool

from .environment import Skipped
from .routing_traffic import Conversation

GOOD_FIRST_TOKEN = 0.4
GOOD_TOKEN_TIME = 0.05

PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}

MARKS = {
    "chat": (b'"content":"', b'"content": "'),
    "messages": (b"text_delta",),
    "responses": (b"response.output_text.delta",),
}
"""In the events of a stream that bring text."""

TOOLS = [
    {
        "name": name,
        "description": f"{name} something in the project. " * 8,
        "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}},
    }
    for name in ("Read", "Write", "Edit", "Bash", "Grep")
]


@dataclass
class Results:
    """Seconds. An answer that failed has no times."""

    firsts: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    good: int = 0
    asked: int = 0
    failed: int = 0
    hit_rate: float = 0.0


class Talk:
    """One conversation as its client writes it: the history, and requests from it."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.api = conversation.api
        self.session = str(uuid.uuid5(uuid.NAMESPACE_URL, f"session-{conversation.number}"))
        self._history: list[dict[str, Any]] = []
        self._count = 0

    def ask(self, said: str, tokens: int) -> tuple[list[tuple[str, str]], bytes]:
        """The headers and the body of the next turn."""
        self._count += 1
        kind = "input_text" if self.api == "responses" else "text"
        content: object = said if self.api == "chat" else [{"type": kind, "text": said}]
        self._history.append({"role": "user", "content": content})
        build = {"chat": self._chat, "messages": self._messages, "responses": self._responses}
        headers, body = build[self.api](tokens)
        return headers, json.dumps(body | {"ignore_eos": True}).encode()

    def answered(self, text: str) -> None:
        kind = "output_text" if self.api == "responses" else "text"
        content: object = text if self.api == "chat" else [{"type": kind, "text": text}]
        self._history.append({"role": "assistant", "content": content})

    def _chat(self, tokens: int) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        system = self.conversation.system
        messages = [{"role": "system", "content": system}] if system else []
        return [], {
            "model": self.conversation.model,
            "messages": [*messages, *self._history],
            "stream": True,
            "max_tokens": tokens,
        }

    def _messages(self, tokens: int) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """As Claude Code: its billing header changes with every request."""
        digest = hashlib.sha256(f"{self.session}{self._count}".encode()).hexdigest()[:5]
        billing = f"x-anthropic-billing-header: cc_version=2.1.0; cc_entrypoint=cli; cch={digest};"
        headers = [
            ("anthropic-version", "2023-06-01"),
            ("user-agent", "claude-cli/2.1.0 (external, cli)"),
            ("x-app", "cli"),
        ]
        return headers, {
            "model": self.conversation.model,
            "max_tokens": tokens,
            "stream": True,
            "system": [
                {"type": "text", "text": billing},
                {
                    "type": "text",
                    "text": self.conversation.system,
                    "cache_control": {"type": "ephemeral"},
                },
            ],
            "tools": TOOLS,
            "messages": self._history,
            "metadata": {"user_id": json.dumps({"session_id": self.session})},
        }

    def _responses(self, tokens: int) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """As Codex: everything with every request, nothing stored."""
        headers = [("user-agent", "codex_cli_rs/0.50.0"), ("session_id", self.session)]
        return headers, {
            "model": self.conversation.model,
            "instructions": self.conversation.system,
            "input": [{"type": "message", **message} for message in self._history],
            "stream": True,
            "store": False,
            "max_output_tokens": tokens,
            "prompt_cache_key": self.session,
        }


class Clients:
    """Run the conversations, each turn after the response to the previous one."""

    def __init__(self, url: str, warm_up: float) -> None:
        self._pool = Pool(url)
        self._host = url.removeprefix("http://")
        self._warm_up = warm_up
        self._began = 0.0
        self.results = Results()

    async def run(self, conversations: Sequence[Conversation]) -> Results:
        await self._wait_until_served()
        self._began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for conversation in conversations:
                nursery.start_soon(self._converse, conversation)
        self._pool.close()
        return self.results

    async def _wait_until_served(self) -> None:
        talk = Talk(Conversation(0.0, "", ()))
        headers, body = talk.ask("ready?", 1)
        with trio.move_on_after(30) as patience:
            while True:
                with contextlib.suppress(RouterError):
                    if await self._ask("chat", headers, body) is not None:
                        break
                await trio.sleep(0.2)
        if patience.cancelled_caught:
            raise Skipped("it serves nothing")

    async def _converse(self, conversation: Conversation) -> None:
        await trio.sleep_until(self._began + conversation.start)
        talk = Talk(conversation)
        for turn, (pause, said, tokens) in enumerate(conversation.turns):
            if turn:
                await trio.sleep(pause)
            asked_at = trio.current_time()
            counted = asked_at - self._began >= self._warm_up
            self.results.asked += counted
            answer = None
            headers, body = talk.ask(said, tokens)
            with trio.move_on_after(30):
                with contextlib.suppress(RouterError):
                    answer = await self._ask(talk.api, headers, body)
            if answer is None:
                self.results.failed += counted
                return
            first, last, content = answer
            talk.answered(content)
            if counted:
                each = (last - first) / max(1, tokens - 1)
                self.results.firsts.append(first - asked_at)
                self.results.tokens.append(each)
                self.results.good += (
                    first - asked_at <= GOOD_FIRST_TOKEN and each <= GOOD_TOKEN_TIME
                )

    async def _ask(
        self, api: str, headers: Sequence[tuple[str, str]], body: bytes
    ) -> tuple[float, float, str] | None:
        """The times of the first and the last token, and the response; None if it was refused."""
        pool = self._pool
        connection = pool.take_idle(trio.current_time()) or await pool.open()
        try:
            lines = [
                f"POST {PATHS[api]} HTTP/1.1",
                f"host: {self._host}",
                "content-type: application/json",
                *(f"{name}: {value}" for name, value in headers),
                f"content-length: {len(body)}",
            ]
            await connection.send("\r\n".join(lines).encode() + b"\r\n\r\n", body)
            answer = await connection.read_head()
            first = last = 0.0
            parts = []
            while piece := await connection.read_body():
                parts.append(piece)
                if any(mark in piece for mark in MARKS[api]):
                    last = trio.current_time()
                    # The first event of a stream may name the role and bring no token.
                    if not first and text_of(api, piece):
                        first = last
            if answer.status != 200 or not first:
                return None
            return first, last, text_of(api, b"".join(parts))
        finally:
            pool.give_back(connection, trio.current_time())


def text_of(api: str, stream: bytes) -> str:
    """The text in the events of a stream, or in a part of it."""
    words = []
    for line in stream.split(b"\n"):
        if not line.startswith(b"data: {"):
            continue
        try:
            event = json.loads(line[6:])
        except ValueError:
            continue  # cut by a read: the whole is read again at the end
        if api == "chat":
            words += [choice["delta"].get("content") or "" for choice in event.get("choices", ())]
        elif api == "messages" and event.get("type") == "content_block_delta":
            words.append(event["delta"].get("text") or "")
        elif api == "responses" and event.get("type") == "response.output_text.delta":
            words.append(event["delta"])
    return "".join(words)
