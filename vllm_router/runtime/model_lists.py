"""On-demand refresh of the servers' model lists, shared by all requests that need one.

A request for an unlisted model may be for a model that was loaded a moment ago. Before the router
answers that the model does not exist, it reads the lists again: one refresh at a time, and each
request is served by the first refresh that begins after its arrival. Negative results are not
cached, because the model may have been loaded since. A token bucket allows a few refreshes at once
and bounds the cost of a flood of wrong names to one refresh per `gap` seconds.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable

import trio

LOOK_GAP = 0.2
"""Seconds between two refreshes under load.

A model list costs vLLM about 1 ms; its metrics, which are read twice a second anyway, 6 ms.
"""

AT_ONCE = 10
"""Refreshes that may follow each other without a gap; each `gap` seconds without a refresh allow
one more."""

Reader = Callable[[], Awaitable[None]]


class _Look:
    """One refresh; `changed` is set, and replaced, whenever a list has been read."""

    def __init__(self) -> None:
        self.changed = trio.Event()
        self.ended = False

    def note(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class ModelLists:
    """`readers` returns the functions that read one list each, with their own timeouts."""

    def __init__(self, readers: Callable[[], Iterable[Reader]], gap: float = LOOK_GAP) -> None:
        self._readers = readers
        self._gap = gap
        self._allowed = float(AT_ONCE)
        self._counted_at = -math.inf
        self._wanted = trio.Event()
        self._next = _Look()

    async def fresh(self, found: Callable[[], bool], patience: float) -> None:
        """Wait until a refresh that began after this call has ended, or `found` returns True.

        Waits at most `patience` seconds besides the gap.
        """
        look = self._next
        self._wanted.set()
        with trio.move_on_after(self._gap + patience):
            while not (look.ended or found()):
                await look.changed.wait()

    async def run(self) -> None:
        """Refresh on request, until cancelled."""
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
        """Take a token of the bucket; wait for it if the bucket is empty."""
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
