"""How one process of a router wakes another: an event descriptor for each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import trio


class Bells:
    """The event descriptors of all processes, by number; they stay the caller's."""

    def __init__(self, descriptors: Sequence[int], mine: int) -> None:
        self._descriptors = descriptors
        self._mine = descriptors[mine]

    @staticmethod
    def create() -> int:
        """A descriptor; whoever calls closes it."""
        return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def ring(self, number: int) -> None:
        """Wake the process, soon. Ringing again before it has woken does nothing more."""
        with contextlib.suppress(BlockingIOError):  # rung 2 ** 64 times already
            os.eventfd_write(self._descriptors[number], 1)

    async def wait(self) -> None:
        """Until this process is rung for."""
        while True:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._mine)
                await trio.lowlevel.checkpoint()
                return
            await trio.lowlevel.wait_readable(self._mine)
