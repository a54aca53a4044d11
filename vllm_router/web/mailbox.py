"""What waits for one client of the feed: the newest snapshot, and events in their order."""

from __future__ import annotations

from collections import deque

import trio

MAX_EVENTS = 64
"""Events that wait for a slow client; beyond that the oldest are lost, and it is told."""


class Mailbox:
    """Filled without waiting, emptied by one task. Nothing a client does delays another."""

    def __init__(self) -> None:
        self.missed = 0
        self._events: deque[str] = deque()
        self._snapshot: str | None = None
        self._closed = False
        self._filled = trio.Event()

    def put_snapshot(self, text: str) -> None:
        """Replace the snapshot, read or not: each is complete."""
        self._snapshot = text
        self._filled.set()

    def put_event(self, text: str) -> bool:
        """Add an event; False if the oldest one was lost for it."""
        self._filled.set()
        self._events.append(text)
        if len(self._events) <= MAX_EVENTS:
            return True
        self._events.popleft()
        self.missed += 1
        return False

    def take_missed(self) -> int:
        """How many events have been lost since this was asked last."""
        missed, self.missed = self.missed, 0
        return missed

    def close(self) -> None:
        """Nothing will follow: `get` returns None once the events have been taken."""
        self._closed = True
        self._filled.set()

    async def get(self) -> str | None:
        """The next message; None after `close`. Cancellable, nothing is lost by it."""
        while True:
            if self._events:
                return self._events.popleft()
            if self._closed:
                return None
            if self._snapshot is not None:
                text, self._snapshot = self._snapshot, None
                return text
            self._filled = trio.Event()
            await self._filled.wait()
