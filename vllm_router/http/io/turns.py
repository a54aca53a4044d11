"""Duration of the event loop's turns: in one turn every task that can run runs once.

The hub calls `Turns` at both ends of every turn, for about 0.5 µs; a heartbeat task would wake an
idle process again and again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic

LONG = 0.05
"""Seconds from which a turn, or a delay of the wait for it, is reported."""


class Turns:
    """Measures the turns of one loop, in seconds on the monotonic clock.

    `began` is the start of the current turn, infinite while the loop waits; another thread may
    read it. `number` counts the turns. `on_long(length)` is called at the end of a turn longer than
    LONG, and after a wait that ended that much too late: the process was stopped or had no CPU.
    """

    __slots__ = ("_limit", "_longest", "_wake_at", "began", "number", "on_long")

    def __init__(self, on_long: Callable[[float], None]) -> None:
        self.on_long = on_long
        self.began = monotonic()
        self.number = 0
        self._wake_at = math.inf
        self._longest = self._limit = 0.0

    def take_longest(self) -> float:
        """Length of the longest turn or delay since the last call."""
        longest = self._longest
        self._longest = self._limit = 0.0
        return longest

    def wait_ended(self) -> None:
        """A turn begins."""
        self.began = now = monotonic()
        self.number += 1
        if now - self._wake_at > self._limit:
            self._note(now - self._wake_at)

    def turn_ended(self, timeout: float) -> None:
        """The loop is about to wait for `timeout` seconds at most."""
        now = monotonic()
        length = now - self.began
        self.began = math.inf
        self._wake_at = now + timeout
        if length > self._limit:
            self._note(length)

    def _note(self, length: float) -> None:
        self._longest = max(self._longest, length)
        self._limit = min(self._longest, LONG)
        if length > LONG:
            self.on_long(length)
