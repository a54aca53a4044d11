"""A bucket of frames, or of anything else that a client may send in moderation."""

from __future__ import annotations


class Allowance:
    """`burst` at once, and `per_second` in the long run. Times are the caller's, in seconds."""

    def __init__(self, now: float, burst: int, per_second: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._left = float(burst)
        self._at = now

    def take(self, now: float, count: int = 1) -> bool:
        """Whether so many more are within the allowance; if not, none is taken."""
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < count:
            return False
        self._left -= count
        return True

    def earn(self, count: int) -> None:
        """Allow so many more."""
        self._left += count
