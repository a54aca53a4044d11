"""Responses held back until they prove that the engine has answered.

A stream is held until its first output, a plain body until it is complete. Comments of a stream,
white space before JSON, and the head of a stream after HEAD_AFTER, go to the client before that:
they keep its connection alive and commit to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import trio

from vllm_router.http.client.connection import Connection
from vllm_router.http.io.async_socket import Interrupted
from vllm_router.proxy.answers.opening import UNJUDGED, WAIT, Opening
from vllm_router.proxy.server_response import ServerResponse

HOLD_LIMIT = 256 * 1024
"""Bytes of a plain body that are held until it is complete, so that it can still be retried."""

HOLD_STREAM = 1024 * 1024
"""Bytes of a stream that are held until an event proves it. The opening events of /v1/responses
repeat the request's instructions and tools, twice."""

HEAD_AFTER = 2.0
"""Seconds after which the head of an unproven stream goes to the client: clients give up on a head
before they give up on an event. Until then a failure can have a status."""

SendEarly = Callable[[bytes], Awaitable[None]]
"""Sends bytes that commit to nothing, after the head if the client does not have that yet."""


async def hold_plain(
    response: ServerResponse, send_early: SendEarly | None, *, whole: bool
) -> None:
    """Read the body into `response.held`, all of it up to HOLD_LIMIT.

    If it need not be `whole`, only its first bytes. White space before JSON is a heartbeat: it
    goes to `send_early` at once.
    """
    connection = response.connection
    parts: list[bytes] = []
    size = 0
    while size < HOLD_LIMIT:
        piece = await connection.read_body()
        now = response.received()
        if send_early is not None and not parts and piece.isspace():
            await send_early(piece)
        else:
            parts.append(piece)
            size += len(piece)
        if connection.complete or not whole:
            break
        response.deadline.extend(now)
    response.held = b"".join(parts)


async def hold_stream(
    response: ServerResponse, opening: Opening, send_early: SendEarly | None, head_at: float
) -> None:
    """Read events into `opening` until one proves the response, or shows that it is no answer.

    Sets `response.held` and `verdict`. Comments go to `send_early` as they come; at `head_at` it
    is called without any.
    """
    connection = response.connection
    verdict = WAIT
    while verdict is WAIT:
        try:
            if head_at == math.inf or connection.can_stream:
                piece = await connection.read_body(head_at)
            else:
                piece = await _read_before(connection, head_at)
        except Interrupted:
            assert send_early is not None
            head_at = math.inf
            await send_early(b"")
            continue
        if not piece:
            verdict = opening.end()
            break
        now = response.received()
        verdict = opening.feed(piece)
        if verdict is not WAIT:
            break
        comments = opening.take_comments()
        if comments and send_early is not None:
            head_at = math.inf
            await send_early(comments)
        if opening.size >= HOLD_STREAM:
            verdict = UNJUDGED
        response.deadline.extend(now)
    response.held = opening.take_comments() + opening.held
    response.verdict = verdict


async def _read_before(connection: Connection, until: float) -> bytes:
    """The next bytes of the body, b"" at its end. Raises Interrupted if nothing comes by then.

    For connections whose own reads have no `until`.
    """
    with trio.move_on_at(until):
        return await connection.read_body()
    raise Interrupted
