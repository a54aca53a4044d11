"""The event loop hub: one edge-triggered epoll for all sockets of the data path.

Trio registers a socket with its epoll for every wait, and a write of its own wakes the peer at
once. For thousands of short waits and writes a second both cost more than the work between them.
The hub registers each socket once, and sends buffered writes after all tasks have had their turn,
just before the loop waits again: writes to one peer leave in one piece.

Trio waits for the hub's epoll as for a socket. Reading and writing run in Trio's instrument hooks
(`before_io_wait`, `after_io_wait`), between tasks.
"""

from __future__ import annotations

import logging
import math
import select
from collections.abc import Callable
from time import monotonic
from typing import Protocol

import trio

from vllm_router.http.io import trio_internals
from vllm_router.http.io.turns import Turns

log = logging.getLogger(__name__)

_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET

_MAX_EVENTS = 1024
"""Events handled in one pass; the next pass handles the others."""


class HubMember(Protocol):
    """A socket as the hub sees it. All methods are called between tasks."""

    fileno: int

    def flush(self) -> None:
        """Send buffered writes."""
        ...

    def on_events(self, events: int) -> None:
        """The kernel reports these epoll events."""
        ...

    def on_write_failed(self) -> None:
        """A write failed, see `EventLoopHub.report_failure`."""
        ...

    def expire(self, now: float) -> float:
        """End a wait whose time has passed; else the time when it must end."""
        ...


class EventLoopHub(trio.abc.Instrument):
    """The sockets of one Trio run."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.members: dict[int, HubMember] = {}
        self.written: list[HubMember] = []
        """Sockets with buffered writes."""
        self._failed: list[HubMember] = []
        self._before_wait: list[Callable[[], None]] = []
        self._token = trio.lowlevel.current_trio_token()
        self._timer = trio.CancelScope()
        self.wake_up = math.inf
        """When the waits are checked next, see `wake_up_by`."""
        self.turns: Turns | None = None
        """Measures the loop's turns if set. Must not raise."""
        self.in_trio_epoll = trio_internals.register_in_trio_epoll(self.epoll.fileno())

    @classmethod
    def of_this_run(cls) -> EventLoopHub:
        """The hub of the running loop, created on first use."""
        hub = _hub.get(None)
        if hub is None:
            hub = cls()
            _hub.set(hub)
            trio.lowlevel.add_instrument(hub)
            trio.lowlevel.spawn_system_task(hub._wake_loop)
            trio.lowlevel.spawn_system_task(hub._expire_waits)
        return hub

    def add(self, member: HubMember) -> None:
        self.epoll.register(member.fileno, _EVENTS)
        self.members[member.fileno] = member

    def report_failure(self, member: HubMember) -> None:
        """Call its `on_write_failed` soon, between tasks; also while the loop is about to wait."""
        self._failed.append(member)
        self._token.run_sync_soon(self._notify_failed, idempotent=True)

    def _notify_failed(self) -> None:
        failed, self._failed = self._failed, []
        for member in failed:
            member.on_write_failed()

    def wake_up_by(self, until: float) -> None:
        """Check the waits at this time. Sets the timer only if no earlier check is scheduled."""
        if until < self.wake_up:
            self.wake_up = self._timer.deadline = until

    async def _expire_waits(self) -> None:
        """End the waits whose `until` has passed: one pass over all members per timer."""
        while True:
            with self._timer:
                await trio.sleep_forever()
            self._timer = trio.CancelScope()
            self.wake_up = math.inf
            now = trio.current_time()
            self.wake_up_by(
                min([member.expire(now) for member in self.members.values()], default=math.inf)
            )

    async def _wake_loop(self) -> None:
        """Wake up the loop for events in the hub's epoll, until the run ends."""
        fileno = self.epoll.fileno()
        try:
            if self.in_trio_epoll:
                await trio.sleep_forever()
            while True:
                await trio.lowlevel.wait_readable(fileno)
        finally:
            trio.lowlevel.remove_instrument(self)
            self.epoll.close()

    def call_before_wait(self, call: Callable[[], None]) -> None:
        """Call it once after all tasks have had their turn, before buffered writes are sent."""
        self._before_wait.append(call)

    def before_io_wait(self, timeout: float) -> None:
        """All tasks have had their turn: send what they wrote."""
        if self._before_wait:
            calls, self._before_wait = self._before_wait, []
            for call in calls:
                try:
                    call()
                except Exception:
                    # Trio would remove the instrument, and with it all sockets.
                    log.exception("a call deferred to the end of a loop turn failed")
        written = self.written
        if written:
            self.written = []
            for member in written:
                member.flush()
        turns = self.turns
        if turns is not None:
            # `turn_ended` and `turn_began`, in place: two calls per chunk of a stream.
            now = monotonic()
            length = now - turns.began
            turns.began = math.inf
            turns.wake_at = now + timeout
            if length > turns.limit:
                turns.note(length)

    def after_io_wait(self, timeout: float) -> None:
        """Wake the tasks whose sockets have news."""
        turns = self.turns
        if turns is not None:
            turns.began = now = monotonic()
            turns.number += 1
            if now - turns.wake_at > turns.limit:
                turns.note(now - turns.wake_at)
        members = self.members
        for fileno, events in self.epoll.poll(0, _MAX_EVENTS):
            member = members.get(fileno)
            if member is None:
                continue
            try:
                member.on_events(events)
            except Exception:
                # Trio would remove the instrument, and with it all sockets.
                log.exception("a connection failed on a socket event")


_hub: trio.lowlevel.RunVar[EventLoopHub | None] = trio.lowlevel.RunVar(
    "vllm_router.event_loop_hub", None
)
