"""How fast waiting requests get a server, and how fast answers are. Pure.

Both figures are used to refuse requests that would wait in vain, so both are forgotten with time:
a fleet that was slow an hour ago may be fast now.
"""

from __future__ import annotations

from collections import deque

RATE_OVER = 32
"""Freed servers, or answers, that a figure is made of at most."""

RATE_FROM = 4
"""Freed servers, or answers, that a figure is made of at least."""

REMEMBERED = 60.0
"""Seconds after which a freed server, or an answer, no longer counts."""

IDLE_FORGETS = 10.0
"""Seconds without a waiting request after which the drain rate is measured anew."""

MARGIN = 1.1
"""Safety factor on predictions: a request expected to finish right at its deadline is as likely
as not to be cut there, after a server has done the work."""


class DrainRate:
    """Servers per second that become free for waiting requests.

    Measured on a clock that stands still while no request waits or no server can be asked: a fleet
    with little to do is not a slow one. Times are in seconds.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._running_since: float | None = None
        self._ended_at = 0.0
        self._marks: deque[tuple[float, float]] = deque(maxlen=RATE_OVER + 1)
        self._in_a_row = 0

    @property
    def running(self) -> bool:
        return self._running_since is not None

    @property
    def is_current(self) -> bool:
        """Whether enough servers have become free since requests last began to wait. Only then
        is the rate good enough to refuse a request."""
        return self._in_a_row >= RATE_FROM

    def begin(self, now: float) -> None:
        """A request has to wait, and servers that may become free exist. Idempotent."""
        if self._running_since is not None:
            return
        if now - self._ended_at > IDLE_FORGETS:
            self._marks.clear()
        self._running_since = now
        self._in_a_row = 0
        if not self._marks:
            self._marks.append((self._clock, now))

    def end(self, now: float) -> None:
        """No request waits any more, or no server can be asked. Idempotent."""
        if self._running_since is not None:
            self._clock, self._running_since, self._ended_at = self._time(now), None, now
            self._in_a_row = 0

    def freed(self, now: float) -> None:
        """A server has become free for a waiting request."""
        if self._running_since is not None:
            self._marks.append((self._time(now), now))
            self._in_a_row += 1

    def forget(self, now: float) -> None:
        """Measure anew: the servers are not those that were measured."""
        self._marks.clear()
        self._in_a_row = 0
        if self._running_since is not None:
            self._clock, self._running_since = self._time(now), now
            self._marks.append((self._clock, now))

    def _time(self, now: float) -> float:
        since = self._running_since
        return self._clock + (now - since if since is not None else 0.0)

    def per_second(self, now: float) -> float | None:
        """None if too few servers have become free lately. What was measured before requests last
        began to wait counts only until enough has been measured since."""
        marks = self._marks
        while len(marks) > 1 and now - marks[1][1] > REMEMBERED:
            marks.popleft()  # the first one left is where the measurement begins
        if self._running_since is None and now - self._ended_at > IDLE_FORGETS:
            return None
        freed = len(marks) - 1
        if self.is_current:
            freed = min(freed, self._in_a_row)
        elapsed = self._time(now) - marks[-1 - freed][0] if marks else 0.0
        return freed / elapsed if freed >= RATE_FROM and elapsed > 0.0 else None


class Quickest:
    """The shortest time in which one of the last answers was complete.

    A request with less time left cannot make it. The mean says nothing: where answers take long on
    average, a short one may still be quick.
    """

    def __init__(self) -> None:
        self._took: deque[tuple[float, float]] = deque(maxlen=RATE_OVER)

    def add(self, seconds: float, now: float) -> None:
        self._took.append((seconds, now))

    def seconds(self, now: float) -> float:
        """With a safety margin; 0 if there were too few answers lately."""
        took = self._took
        while took and now - took[0][1] > REMEMBERED:
            took.popleft()
        return MARGIN * min(took)[0] if len(took) >= RATE_FROM else 0.0
