"""Stored responses, as vLLM 0.32 keeps them with VLLM_ENABLE_RESPONSES_API_STORE=1.

In memory, until the server ends. A background request is generated without its client: its events
are kept, and played to every client that asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from vllm_router.lab.mock import checks
from vllm_router.lab.mock.api_error import ApiError, bad_request
from vllm_router.lab.mock.connection import Connection
from vllm_router.lab.mock.shapes_responses import ResponsesShape

Status = Literal["queued", "done", "cancelled"]


class Background(Connection):
    """Takes the place of the client's connection. `events` are the events of a stream, each framed
    as a chunk.
    """

    def __init__(self, *, stream: bool) -> None:
        self.number = 0
        self.answerer = None
        self.closed = False
        self.stream = stream
        self.events: list[bytes] = []
        self.followers: list[Callable[[], None]] = []
        self._has_head = False

    def write(self, data: bytes) -> None:
        """The head comes first, alone or with a plain body, then chunks with one event each."""
        if not self._has_head:
            self._has_head = True
        elif self.stream:
            self.events += _chunks(data)
            for follow in list(self.followers):
                follow()

    def finish(self, *, keep_alive: bool) -> None:
        """The response is complete."""

    def close(self, how: str) -> None:
        self.closed = True


def _chunks(data: bytes) -> list[bytes]:
    """The chunks of a chunked body, with their framing."""
    found = []
    place = 0
    while place < len(data):
        line = data.index(b"\r\n", place)
        end = line + 2 + int(data[place:line], 16) + 2
        found.append(data[place:end])
        place = end
    return found


class Stored:
    """One stored response. `messages` are its conversation, without the answer.

    `background` has the events of a background request, `abort` ends its generation.
    """

    def __init__(
        self,
        shape: ResponsesShape,
        messages: list[Any],
        background: Background | None = None,
    ) -> None:
        self.shape = shape
        self.background = background
        self.status: Status = "done" if background is None else "queued"
        self.abort: Callable[[], None] = lambda: None
        self._messages = messages

    def body(self) -> bytes:
        """The response object as it is now."""
        if self.status == "done":
            return self.shape.whole()
        return self.shape.unfinished(self.status)

    @property
    def conversation(self) -> list[Any]:
        """The messages and the answer."""
        answer = {"role": "assistant", "content": self.shape.request.text}
        return [*self._messages, answer]


class ResponseStore:
    """The stored responses of one server."""

    def __init__(self) -> None:
        self.by_id: dict[str, Stored] = {}

    def get(self, identity: str) -> Stored:
        """Raises ApiError for an unknown id."""
        found = self.by_id.get(identity)
        if found is None:
            message = f"Response with id '{identity}' not found."
            raise ApiError(404, message, "invalid_request_error", "response_id")
        return found

    def messages(self, body: Mapping[str, Any]) -> list[Any]:
        """The conversation that a request continues, and its input. Raises ApiError."""
        given = body["input"]
        new = list(given) if isinstance(given, list) else [{"role": "user", "content": given}]
        previous = body.get("previous_response_id")
        return new if previous is None else [*self.get(str(previous)).conversation, *new]


def wants_store(body: Mapping[str, Any], *, enabled: bool) -> bool:
    """Whether the response is to be stored. Raises ApiError as vLLM does."""
    store, background = checks.truth(body.get("store", True)), checks.truth(body.get("background"))
    if background and not store:
        message = "background can only be used when `store` is true (parameter=background)"
        raise bad_request(message, "background")
    if background and not enabled:
        raise ApiError(
            400,
            "This vLLM engine does not support `store=True` and therefore does not support the "
            "background mode. To enable these features, set the environment variable "
            "`VLLM_ENABLE_RESPONSES_API_STORE=1` when launching the vLLM server.",
            "invalid_request_error",
            "background",
        )
    return enabled and store
