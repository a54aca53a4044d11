"""Every use of names that Trio's documentation does not promise (read: Trio 0.31 to 0.35).

Each function has a plain alternative: `TrioSocket` for the trap, a task for the epoll.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

import trio
from trio.lowlevel import Abort, RaiseCancelT, wait_task_rescheduled

AbortFunction = Callable[[RaiseCancelT], Abort]


def ask_for_trap(abort: AbortFunction) -> object:
    """The value that a waiting task yields to Trio's scheduler, with this abort function.

    `wait_task_rescheduled` creates one per wait; a socket uses the same for all of its waits.
    """
    waiting = wait_task_rescheduled(abort)  # noqa: ASYNC105 (run to its first step only)
    trap: object = waiting.send(None)
    waiting.close()
    return trap


def _trap_maker() -> Callable[[AbortFunction], object]:
    """The class of these values if it makes them from an abort function; else `ask_for_trap`."""

    def abort(_: RaiseCancelT) -> Abort:
        return Abort.SUCCEEDED

    trap = ask_for_trap(abort)
    kind = type(trap)
    try:
        return kind if kind(abort) == trap else ask_for_trap  # type: ignore[call-arg]
    except TypeError:
        return ask_for_trap


make_trap = _trap_maker()
"""As `ask_for_trap`, without a coroutine for every socket."""


def register_in_trio_epoll(fileno: int) -> bool:
    """Let input on this descriptor wake up the event loop, without a task that waits for it.

    Trio ignores events on descriptors that no task waits for. False if Trio's epoll is not where
    it was in Trio 0.31 to 0.35.
    """
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        epoll: select.epoll = GLOBAL_RUN_CONTEXT.runner.io_manager._epoll
    except (ImportError, AttributeError):
        return False
    epoll.register(fileno, select.EPOLLIN)
    return True


def release_ssl_stream(stream: trio.SSLStream[Any]) -> None:
    """Free the memory of an SSLStream, some 30 KB. The stream can only be closed any more.

    An SSLStream refers to itself, and the router hardly ever collects cycles. Trio closes the
    streams of `serve_listeners` after their handler, under Hypercorn alone.
    """
    fields = vars(stream)
    closed = type(fields["_state"]).CLOSED
    fields.clear()
    fields["_state"] = closed


def take_outgoing(stream: trio.SSLStream[Any]) -> bytes:
    """Encrypted bytes that an SSLStream has produced and not sent."""
    outgoing: bytes = vars(stream)["_outgoing"].read()
    return outgoing
