"""Token bucket for frames that a client may send."""

from __future__ import annotations


class Allowance:
    """`burst` tokens at once, `per_second` in the long run. The caller passes times, in seconds."""

    def __init__(self, now: float, burst: int, per_second: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._left = float(burst)
        self._at = now

    def take(self, now: float, count: int = 1) -> bool:
        """Take `count` tokens; False, and none is taken, if there are fewer."""
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < count:
            return False
        self._left -= count
        return True

    def earn(self, count: int) -> None:
        """Add tokens."""
        self._left += count
