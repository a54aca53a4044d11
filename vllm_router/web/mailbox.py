"""The messages for one client of the feed: the newest snapshot, and events in order."""

from __future__ import annotations

from collections import deque

import trio

MAX_EVENTS = 64
"""Queued events of a slow client; beyond that the oldest are dropped, and the client is notified.
"""


class Mailbox:
    """Filled without blocking, emptied by one task: a slow client delays no other."""

    def __init__(self) -> None:
        self.missed = 0
        self._events: deque[str] = deque()
        self._snapshot: str | None = None
        self._closed = False
        self._filled = trio.Event()

    def put_snapshot(self, text: str) -> None:
        """Replace the snapshot; each is complete."""
        self._snapshot = text
        self._filled.set()

    def put_event(self, text: str) -> bool:
        """Add an event; returns False if the oldest one was dropped for it."""
        self._filled.set()
        self._events.append(text)
        if len(self._events) <= MAX_EVENTS:
            return True
        self._events.popleft()
        self.missed += 1
        return False

    def take_missed(self) -> int:
        """The number of events dropped since the last call."""
        missed, self.missed = self.missed, 0
        return missed

    def close(self) -> None:
        """No further messages: `get` returns None after the queued events."""
        self._closed = True
        self._filled.set()

    async def get(self) -> str | None:
        """The next message; None after `close`. Cancellation loses no message."""
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
