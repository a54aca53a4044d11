"""Wake-ups between processes when a server becomes free for a waiting request of another."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import trio

from vllm_router.proxy.handler import Proxy

POLL_WHILE_WAITING = 0.01
"""Seconds between two reads of the other processes' pages while requests wait in this one."""

POLL_WHILE_IDLE = 0.05
"""The same while no request waits here; keeps the backlog of changes short."""


class Wakeups:
    """One event descriptor per process, by number. The caller owns the descriptors."""

    def __init__(self, descriptors: Sequence[int], mine: int) -> None:
        self._descriptors = descriptors
        self._mine = descriptors[mine]

    @staticmethod
    def create() -> int:
        """Create an event descriptor; the caller closes it."""
        return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def notify(self, number: int) -> None:
        """Wake a process. Further calls before it has woken have no effect."""
        with contextlib.suppress(BlockingIOError):  # the counter is at its maximum
            os.eventfd_write(self._descriptors[number], 1)

    async def wait(self) -> None:
        """Wait until this process is notified."""
        while True:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._mine)
                await trio.lowlevel.checkpoint()
                return
            await trio.lowlevel.wait_readable(self._mine)


async def serve_waiters(proxy: Proxy, wakeups: Wakeups) -> None:
    """Assign servers that other processes have released to requests that wait here."""
    while True:
        admission = proxy.context.admission
        waiting = admission is not None and admission.holds_waiters
        with trio.move_on_after(POLL_WHILE_WAITING if waiting else POLL_WHILE_IDLE):
            await wakeups.wait()
        admission = proxy.context.admission
        if admission is not None:
            proxy.context.fleet.refresh_leases()
            admission.follow_peers(trio.current_time())
