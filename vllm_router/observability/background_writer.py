"""A thread for work that can be done later, so that the event loop never waits for it.

Queueing costs less than a microsecond. The thread takes a batch at most four times a second: each
time it takes the interpreter lock from the event loop, whose caches need a millisecond to warm up
again. When the queue is full, things are dropped and counted.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

GATHER = 0.25
"""Seconds between two batches. The first thing after a pause is taken at once."""

HURRY = 0.05
"""Seconds between two batches if a caller has asked for haste."""

BATCH = 1000

CLOSE_TIME = 2.0
"""Seconds for the last batches at the end."""

logger = logging.getLogger(__name__)


class BackgroundWriter:
    """Passes batches to `take` in its own thread. `close` ends it.

    `dropped` counts things. A threading.Event in the queue is set when everything before it has
    been taken.
    """

    def __init__(self, name: str, limit: int, take: Callable[[list[Any]], None]) -> None:
        self.dropped = 0
        self._limit = limit
        self._take = take
        self._waiting: deque[Any] = deque()
        self._asleep = False
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, thing: Any) -> None:
        """Queue a thing. Never blocks, never raises; callable from any thread."""
        if len(self._waiting) >= self._limit:
            self.dropped += 1
            return
        self._waiting.append(thing)
        if self._asleep:
            self._asleep = False
            self._bell.put(None)

    def wake(self) -> None:
        """Call `take` within HURRY seconds, even with an empty batch."""
        if self._bell.empty():
            self._bell.put(None)

    def flush(self) -> bool:
        """Wait up to a second until everything queued so far is taken; returns False on timeout."""
        done = threading.Event()
        self.put(done)
        self.wake()
        return done.wait(1.0)

    def close(self) -> bool:
        """Take everything queued, within CLOSE_TIME; returns False on timeout.

        A blocked thread ends with the process.
        """
        self._stop.set()
        self.wake()
        self._thread.join(CLOSE_TIME)
        return not self._thread.is_alive()

    # -- in the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        rung = False
        while not self._stop.is_set():
            self._asleep = True
            if not (rung or self._waiting):
                self._bell.get()
            self._asleep = False
            self._empty()
            self._stop.wait(HURRY)
            rung = self._rings_within(GATHER - HURRY)
        self._empty()

    def _rings_within(self, seconds: float) -> bool:
        try:
            self._bell.get(timeout=seconds)
        except Empty:
            return False
        return True

    def _empty(self) -> None:
        waiting = self._waiting
        while True:
            things = [waiting.popleft() for _ in range(min(len(waiting), BATCH))]
            awaited = [thing for thing in things if isinstance(thing, threading.Event)]
            if awaited:
                things = [thing for thing in things if not isinstance(thing, threading.Event)]
            try:
                self._take(things)
            except Exception:
                # A defect costs one batch, not the thread and all later batches.
                logger.exception("thread %s: a batch was dropped after an error", self._thread.name)
            for event in awaited:
                event.set()
            if not waiting:
                return
