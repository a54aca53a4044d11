"""Paths of stored responses, and requests that run in the background."""

from __future__ import annotations

from typing import Any

from vllm_router.lab.mock import checks
from vllm_router.lab.mock.api_error import ApiError, bad_request
from vllm_router.lab.mock.connection import Connection, Incoming
from vllm_router.lab.mock.endpoints import Handler
from vllm_router.lab.mock.exchange import Exchange
from vllm_router.lab.mock.faults import Fault
from vllm_router.lab.mock.generation import Generation
from vllm_router.lab.mock.heads import EVENT_STREAM, JSON
from vllm_router.lab.mock.request import Request
from vllm_router.lab.mock.response_store import Background, Stored
from vllm_router.lab.mock.shapes import LAST_CHUNK
from vllm_router.lab.mock.shapes_responses import ResponsesShape
from vllm_router.lab.mock.state import ServerState

PREFIX = "/v1/responses/"


def keep(generation: Generation, shape: ResponsesShape, messages: list[Any]) -> None:
    """Store the response of a client that waits for it, once it is complete."""

    def done() -> None:
        generation.server.responses.by_id[shape.identity] = Stored(shape, messages)

    generation.on_done = done


def in_background(
    server: ServerState,
    connection: Connection,
    incoming: Incoming,
    fault: Fault,
    request: Request,
    shape: ResponsesShape,
    messages: list[Any],
    *,
    stream: bool,
) -> Generation:
    """Answer the client, and make a generation without one. The caller submits it."""
    background = Background(stream=stream)
    stored = Stored(shape, messages, background)
    generation = Generation(server, background, incoming, fault, request, shape, stream=stream)

    def done() -> None:
        if stored.status == "queued":
            stored.status = "done"

    generation.on_done = done
    stored.abort = lambda: generation.abort_finish([])
    server.responses.by_id[shape.identity] = stored
    if stream:
        _Playback(server, connection, incoming, fault, background, 0)
    else:
        server.counts.done += 1
        server.reply(connection, incoming, 200, stored.body(), JSON)
    return generation


class _Playback(Exchange):
    """Sends the events of a background request from number `first` on, as they come."""

    def __init__(
        self,
        server: ServerState,
        connection: Connection,
        incoming: Incoming,
        fault: Fault,
        background: Background,
        first: int,
    ) -> None:
        super().__init__(server, connection, incoming, fault)
        self._background = background
        self._next = first
        connection.write(self.head(EVENT_STREAM, None))
        background.followers.append(self.follow)
        self.follow()

    def follow(self) -> None:
        """Send the events that have come since the last call."""
        if self.over:
            return
        events = self._background.events[self._next :]
        self._next += len(events)
        if events:
            self.connection.write(b"".join(events))
        if LAST_CHUNK in self._background.events:
            self.end()

    def _leave(self) -> None:
        super()._leave()
        if self.follow in self._background.followers:
            self._background.followers.remove(self.follow)


def routes_of(path: str) -> dict[str, Handler] | None:
    """The methods of a path below /v1/responses; None if vLLM 0.32 has no such path."""
    identity, slash, rest = path.removeprefix(PREFIX).partition("/")
    if not path.startswith(PREFIX) or not identity:
        return None
    if not slash:
        return {"GET": _retrieve}
    return {"POST": _cancel} if rest == "cancel" else None


def _stored(server: ServerState, incoming: Incoming) -> Stored:
    return server.responses.get(incoming.path.removeprefix(PREFIX).partition("/")[0])


def _retrieve(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    server.counts.total += 1
    stored = _stored(server, incoming)
    asked = dict(pair.partition("=")[::2] for pair in incoming.query.split("&") if pair)
    if not checks.truth(asked.get("stream", "false")):
        server.counts.done += 1
        server.reply(connection, incoming, 200, stored.body(), JSON)
        return
    background = stored.background
    if background is None or not background.stream:
        raise bad_request(f"Unknown response_id: {stored.shape.identity}", "response_id")
    first = int(asked.get("starting_after", "-1")) + 1
    fault = server.faults.choose(
        server.heads.name, incoming.path, incoming.mock, reused=False, body=b""
    )
    _Playback(server, connection, incoming, fault, background, first)


def _cancel(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    server.counts.total += 1
    stored = _stored(server, incoming)
    if stored.status != "queued":
        message = "Cannot cancel a synchronous response."
        raise ApiError(400, message, "invalid_request_error", "response_id")
    stored.status = "cancelled"
    stored.abort()
    server.counts.done += 1
    server.reply(connection, incoming, 200, stored.body(), JSON)
