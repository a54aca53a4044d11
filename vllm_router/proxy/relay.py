"""Copying a proven response to the client as it arrives."""

from __future__ import annotations

from collections.abc import Callable

from vllm_router.proxy.answers.ending import Ending
from vllm_router.proxy.answers.events import at_boundary
from vllm_router.proxy.answers.opening import UNJUDGED, Verdict
from vllm_router.proxy.downstream import Downstream
from vllm_router.proxy.record import Record
from vllm_router.proxy.retry import Outcome
from vllm_router.proxy.server_response import ServerResponse
from vllm_router.proxy.tail import StreamTail

_ENDINGS = {
    Verdict.CUT: Outcome.ENGINE_ABORT,
    Verdict.UNCLEAR: Outcome.UNCLEAR_ERROR,
    Verdict.FAILED: Outcome.TRUNCATED,
    Verdict.BUSY: Outcome.TRUNCATED,
}
"""The outcomes of responses that the client has in part and that end with a failure."""


async def relay(response: ServerResponse, downstream: Downstream, record: Record) -> None:
    """Send the held bytes, then the rest as it arrives; back-pressure is the awaited write.

    Where both connections allow it, pieces pass without waking a task.
    """
    connection = response.connection
    write_now = downstream.write_now if connection.can_stream else None
    piece, response.held = response.held, b""
    while piece:
        note_piece(response, record, piece)
        await downstream.write(piece)
        if connection.complete:
            return
        if write_now is not None:
            await _relay_between_tasks(response, downstream, record, write_now)
            return
        piece = await connection.read_body()
        response.relayed()


async def _relay_between_tasks(
    response: ServerResponse,
    downstream: Downstream,
    record: Record,
    write_now: Callable[[bytes], bool],
) -> None:
    """Relay in callbacks of the event loop while the client keeps up."""
    connection, now_is = response.connection, response.now
    lease, server, deadline = response.lease, response.lease.server, response.deadline
    assert response.tail is not None  # only a complete response has none
    note = response.tail.add

    def take(piece: bytes) -> bool:
        # `relayed` and `note_piece`, in place: this runs once per chunk.
        lease.last_byte_at = server.last_byte_at = now = now_is()
        if now > deadline.next_move:
            deadline.move(now)
        record.bytes_out += len(piece)
        record.chunks += 1
        note(piece)
        return write_now(piece)

    while True:
        await connection.stream_into(take)
        response.relayed()
        if connection.complete:
            return
        await downstream.drain()


def note_piece(response: ServerResponse, record: Record, piece: bytes) -> None:
    """Account for a piece of the body that goes to the client."""
    record.bytes_out += len(piece)
    record.chunks += 1
    if response.tail is not None:
        response.tail.add(piece)


def judge_ending(response: ServerResponse, outcome: Outcome) -> tuple[Ending, Outcome, bool]:
    """The end of a relayed response, the outcome of the attempt, and whether it is complete.

    A complete one goes to the client as it is, with the error that it may end with. One without
    its end is incomplete: the client's connection must be cut.
    """
    tail = response.tail
    assert tail is not None
    ending = tail.read(response.api)
    if ending.verdict is not Verdict.UNFINISHED:
        return ending, _ENDINGS.get(ending.verdict, outcome), True
    if isinstance(tail, StreamTail) and response.verdict is UNJUDGED:
        # Its beginning could not be judged: its end need not be one that the router knows.
        return ending, outcome, True
    return ending, Outcome.TRUNCATED, False


def may_add_event(response: ServerResponse) -> bool:
    """Whether an error event can follow what was relayed: after whole events only.

    After half an event a blank line would complete it.
    """
    tail = response.tail
    return isinstance(tail, StreamTail) and at_boundary(tail.bytes)
