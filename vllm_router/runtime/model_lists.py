"""A fresh look at the servers' lists of models, shared by all requests that need one.

A request for a model that no list names may be for one that was loaded a moment ago. Before the
router says that the model does not exist, it reads the lists once more: one look at a time, no two
within `gap` seconds, and each request is served by the first look that begins after it came. So a
flood of wrong names costs the servers one look per `gap`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import trio

LOOK_GAP = 1.0
"""Seconds between two looks."""

Reader = Callable[[], Awaitable[None]]


class _Look:
    """One look; `changed` is set, and replaced, whenever a list has been read."""

    def __init__(self) -> None:
        self.changed = trio.Event()
        self.ended = False

    def note(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class ModelLists:
    """`readers` gives what reads one list each; they bound their time themselves."""

    def __init__(self, readers: Callable[[], Iterable[Reader]], gap: float = LOOK_GAP) -> None:
        self._readers = readers
        self._gap = gap
        self._wanted = trio.Event()
        self._next = _Look()

    async def fresh(self, found: Callable[[], bool], patience: float) -> None:
        """Wait until a look that began after this call has ended, or `found` says yes.

        At most `patience` seconds besides the gap.
        """
        look = self._next
        self._wanted.set()
        with trio.move_on_after(self._gap + patience):
            while not (look.ended or found()):
                await look.changed.wait()

    async def run(self) -> None:
        """Look whenever it is asked for, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            look, self._next = self._next, _Look()
            try:
                async with trio.open_nursery() as nursery:
                    for read in self._readers():
                        nursery.start_soon(self._read, read, look)
            finally:
                look.ended = True
                look.note()
            await trio.sleep(self._gap)

    @staticmethod
    async def _read(read: Reader, look: _Look) -> None:
        await read()
        look.note()
