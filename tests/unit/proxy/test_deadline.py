"""The time limits of one attempt, with numbers as time."""

from __future__ import annotations

import math

import pytest
import trio

from vllm_router.proxy.deadline import MOVES_PER_IDLE_TIMEOUT, Deadline
from vllm_router.proxy.retry import Outcome

SLACK = 16.0 / MOVES_PER_IDLE_TIMEOUT
CONNECT, IDLE = Outcome.CONNECT_TIMEOUT, Outcome.IDLE_TIMEOUT


class Waiting:
    """A connection whose read can be interrupted, or can no longer be."""

    def __init__(self, waits: bool) -> None:
        self.waits = waits
        self.interrupted = 0

    def interrupt(self) -> bool:
        self.interrupted += 1
        return self.waits


def make(total: float = 1000.0) -> Deadline:
    return Deadline(total, 16.0)


def begun(at: float = 10.0, *, total: float = 1000.0) -> tuple[Deadline, trio.CancelScope]:
    deadline = make(total)
    deadline.begin(CONNECT, at)
    return deadline, deadline.scope()


def test_deadline_new_moves_with_no_piece_and_cannot_be_cancelled():
    deadline = make()
    assert (deadline.next_move, deadline.connection) == (math.inf, None)
    assert deadline.cancel("why") is False


@pytest.mark.parametrize(("at", "ends"), [(10.0, 10.0), (1000.0, 1000.0), (1000.1, 1000.0)])
def test_deadline_of_a_phase_ends_a_read_or_a_scope(at, ends):
    deadline = make()
    deadline.begin(CONNECT, at)
    assert (deadline.outcome, deadline.at, deadline.read_until) == (CONNECT, ends, ends)
    scope = deadline.scope()
    assert (scope.deadline, deadline.read_until) == (ends, math.inf)
    deadline.begin(IDLE, at)
    assert (scope.deadline, deadline.read_until, deadline.outcome) == (ends, math.inf, IDLE)


def test_deadline_extended_by_bytes_is_an_idle_timeout_within_the_total():
    deadline, scope = begun(total=30.0)
    deadline.extend(12.0)
    assert (deadline.outcome, scope.deadline) == (IDLE, 28.0)
    deadline.extend(20.0)
    assert scope.deadline == 30.0


def test_deadline_cancelled_ends_its_scope_once_there_is_one():
    deadline, scope = begun()
    deadline.connection = connection = Waiting(True)
    assert deadline.cancel("gone") is True
    assert scope.cancel_called
    assert connection.interrupted == 0


@pytest.mark.parametrize("waits", [True, False])
def test_deadline_without_scope_interrupts_the_connection(waits):
    deadline = make()
    deadline.begin(CONNECT, 10.0)
    deadline.connection = connection = Waiting(waits)
    assert deadline.cancel("gone") is waits
    assert connection.interrupted == 1


async def test_deadline_ended_can_begin_anew(autojump_clock):
    deadline, scope = begun()
    deadline.connection = Waiting(True)
    deadline.end()
    assert deadline.cancel("late") is False
    assert not scope.cancel_called
    deadline.begin(CONNECT, 50.0)
    assert (deadline.read_until, scope.deadline) == (50.0, 10.0)


def test_deadline_of_stream_without_scope_stays():
    deadline = make()
    deadline.begin(CONNECT, 10.0)
    deadline.begin_stream(5.0, whole=False)
    assert (deadline.outcome, deadline.read_until, deadline.next_move) == (CONNECT, 10.0, math.inf)


def test_deadline_of_stream_is_an_idle_timeout_that_pieces_move():
    deadline, scope = begun(at=100.0)  # later than the stream may be silent
    deadline.begin_stream(5.0, whole=False)
    assert deadline.outcome is IDLE
    assert (scope.deadline, deadline.next_move) == (5.0 + 16.0 + SLACK, 5.0 + SLACK)
    deadline.move(9.0)
    assert (scope.deadline, deadline.next_move) == (25.0 + SLACK, 9.0 + SLACK)
    deadline.move(990.0)
    assert scope.deadline == 1000.0


@pytest.mark.parametrize(("left", "moved"), [(7.9, True), (8.0, False), (30.0, False)])
def test_deadline_of_whole_response_moves_only_if_little_time_is_left(left, moved):
    deadline, scope = begun(at=100.0 + left)
    deadline.begin_stream(100.0, whole=True)
    assert scope.deadline == (100.0 + 16.0 + SLACK if moved else 100.0 + left)
    assert deadline.outcome is (IDLE if moved else CONNECT)
    assert deadline.next_move == 100.0 + SLACK
