"""The time limits of one attempt."""

from __future__ import annotations

import math

import trio

from vllm_router.http.client.connection import Connection
from vllm_router.proxy.retry import Outcome

MOVES_PER_IDLE_TIMEOUT = 16
"""A stream's deadline is moved at most so often per idle timeout: a move costs as much as a read.
The deadline is later by that part of the idle timeout."""


class Deadline:
    """When an attempt ends: by the limit of its phase (connect, first byte, idle) or of the whole.

    A cancel scope enforces it, made by `scope`. Until there is one, the wait for a response head
    on a plain connection is bounded by `read_until`: most responses arrive whole in one read and
    never need the scope. Times are on trio's clock.

    `outcome` is how the attempt ends if the deadline passes; `next_move` is the time from which
    a piece of a stream moves it. `read_until` is when a read must end by itself: infinity within a
    scope. `connection` is one whose next read is bounded by it, while there is no scope.
    """

    __slots__ = (
        "_idle",
        "_scope",
        "at",
        "connection",
        "next_move",
        "outcome",
        "read_until",
        "total",
    )

    def __init__(self, total: float, idle: float) -> None:
        """`total` is when the whole exchange must have ended, `idle` the idle timeout in s."""
        self.total = total
        self._idle = idle
        self._scope: trio.CancelScope | None = None
        self.connection: Connection | None = None
        self.next_move = math.inf

    def begin(self, outcome: Outcome, at: float) -> None:
        """A phase begins that may last until `at`."""
        self.outcome = outcome
        if at > self.total:
            at = self.total
        self.at = at
        if self._scope is not None:
            self._scope.deadline = at
        else:
            self.read_until = at

    def scope(self) -> trio.CancelScope:
        """A cancel scope that enforces the deadline from now on."""
        self._scope = scope = trio.CancelScope(deadline=self.at)
        self.read_until = math.inf
        return scope

    def end(self) -> None:
        """The attempt is over, or starts again."""
        self._scope = self.connection = None

    def cancel(self, reason: str) -> bool:
        """End the attempt now. False if it can no longer be ended."""
        if self._scope is not None:
            self._scope.cancel(reason=reason)
            return True
        return self.connection is not None and self.connection.interrupt()

    def extend(self, now: float) -> None:
        """Bytes have arrived at `now`, more are due within the idle timeout."""
        self.begin(Outcome.IDLE_TIMEOUT, now + self._idle)

    def begin_stream(self, now: float, *, whole: bool) -> None:
        """The response goes to the client from `now` on.

        A `whole` response keeps the deadline it has if that leaves ample time.
        """
        scope, idle = self._scope, self._idle
        if scope is None:
            return
        slack = idle / MOVES_PER_IDLE_TIMEOUT
        self.next_move = now + slack
        if not whole or scope.deadline < now + idle / 2:
            self.outcome = Outcome.IDLE_TIMEOUT
            scope.deadline = min(now + idle + slack, self.total)

    def move(self, now: float) -> None:
        """Bytes of the stream have arrived at `now`, which is past `next_move`."""
        slack = self._idle / MOVES_PER_IDLE_TIMEOUT
        self.next_move = now + slack
        assert self._scope is not None
        self._scope.deadline = min(now + self._idle + slack, self.total)
