"""A fresh look at the servers' lists of models, shared by all requests that need one.

A request for a model that no list names may be for one that was loaded a moment ago. Before the
router says that the model does not exist, it reads the lists once more: one look at a time, and
each request is served by the first look that begins after it came. A look is not remembered: the
model may have been loaded since. A few wrong names are looked for at once; a flood of them costs
the servers one look per `gap` seconds.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable

import trio

LOOK_GAP = 0.2
"""Seconds between two looks while there are many. A list costs vLLM about 1 ms, its metrics, which
are read twice a second anyway, 6 ms."""

AT_ONCE = 10
"""Looks that may follow each other without a gap; each `gap` seconds without a look allow one more.
"""

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
        self._allowed = float(AT_ONCE)
        self._counted_at = -math.inf
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
            await self._until_allowed()
            self._wanted = trio.Event()
            look, self._next = self._next, _Look()
            try:
                async with trio.open_nursery() as nursery:
                    for read in self._readers():
                        nursery.start_soon(self._read, read, look)
            finally:
                look.ended = True
                look.note()

    async def _until_allowed(self) -> None:
        """Wait until another look may begin: a token bucket."""
        now = trio.current_time()
        earned = (now - self._counted_at) / self._gap
        self._allowed = allowed = min(self._allowed + earned, AT_ONCE) - 1.0
        self._counted_at = now
        if allowed < 0.0:
            await trio.sleep(-allowed * self._gap)

    @staticmethod
    async def _read(read: Reader, look: _Look) -> None:
        await read()
        look.note()
