"""Duration of the event loop's turns: in one turn every task that can run runs once.

The hub notes both ends of every turn in `Turns`, for about 0.2 µs; a heartbeat task would wake an
idle process again and again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

LONG = 0.05
"""Seconds from which a turn, or a delay of the wait for it, is reported."""


class Turns:
    """Measures the turns of one loop, in seconds on the monotonic clock.

    `began` is the start of the current turn, infinite while the loop waits; another thread may
    read it. `number` counts the turns. `wake_at` is when the current or last wait should have ended
    at the latest. A length or delay above `limit` must be given to `note`. `on_long(length)` is
    called at the end of a turn longer than LONG, and after a wait that ended that much too late:
    the process was stopped or had no CPU.
    """

    __slots__ = ("_longest", "began", "limit", "number", "on_long", "wake_at")

    def __init__(self, on_long: Callable[[float], None], now: float) -> None:
        self.on_long = on_long
        self.began = now
        self.number = 0
        self.wake_at = math.inf
        self._longest = self.limit = 0.0

    def take_longest(self) -> float:
        """Length of the longest turn or delay since the last call."""
        longest = self._longest
        self._longest = self.limit = 0.0
        return longest

    def note(self, length: float) -> None:
        """A turn or delay longer than `limit`: the longest one so far, or a LONG one."""
        self._longest = max(self._longest, length)
        self.limit = min(self._longest, LONG)
        if length > LONG:
            self.on_long(length)
