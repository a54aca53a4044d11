"""Measurements that predict the waiting time: drain rate, and shortest response time. Pure.

Both are used to refuse requests that would time out anyway. Both expire: a fleet that was slow an
hour ago may be fast now.
"""

from __future__ import annotations

from collections import deque

MAX_SAMPLES = 32
"""Samples (freed servers, or responses) that a measurement uses at most."""

MIN_SAMPLES = 4
"""Samples that a measurement needs."""

SAMPLE_EXPIRY = 60.0
"""Seconds after which a sample no longer counts."""

IDLE_RESET = 10.0
"""Seconds without a waiting request after which the drain rate is measured anew."""

MARGIN = 1.1
"""Safety factor on predicted completion: a request expected to finish right at its deadline would
often waste server work."""


class DrainRate:
    """Servers per second that become free for waiting requests.

    The clock stops while no request waits or no server is available, so that an idle fleet does
    not look slow. Times are in seconds.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._running_since: float | None = None
        self._ended_at = 0.0
        self._marks: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES + 1)
        self._in_a_row = 0

    @property
    def running(self) -> bool:
        return self._running_since is not None

    @property
    def is_current(self) -> bool:
        """Whether there are enough samples since requests last began to wait.

        Only then is the rate reliable enough to refuse a request.
        """
        return self._in_a_row >= MIN_SAMPLES

    def begin(self, now: float) -> None:
        """A request waits, and there are servers that may become free. Idempotent."""
        if self._running_since is not None:
            return
        if now - self._ended_at > IDLE_RESET:
            self._marks.clear()
        self._running_since = now
        if not self._marks:
            self._marks.append((self._clock, now))

    def end(self, now: float) -> None:
        """No request waits any more, or no server is available. Idempotent."""
        if self._running_since is not None:
            self._clock, self._running_since, self._ended_at = self._time(now), None, now
            self._in_a_row = 0

    def freed(self, now: float) -> None:
        """A server has become free for a waiting request."""
        if self._running_since is not None:
            self._marks.append((self._time(now), now))
            self._in_a_row += 1

    def forget(self, now: float) -> None:
        """Discard all samples, after the set of servers has changed."""
        self._marks.clear()
        self._in_a_row = 0
        if self._running_since is not None:
            self._clock, self._running_since = self._time(now), now
            self._marks.append((self._clock, now))

    def _time(self, now: float) -> float:
        since = self._running_since
        return self._clock + (now - since if since is not None else 0.0)

    def per_second(self, now: float) -> float | None:
        """The rate, or None with too few samples.

        Samples from before requests last began to wait are used only until there are enough newer
        ones.
        """
        marks = self._marks
        while len(marks) > 1 and now - marks[1][1] > SAMPLE_EXPIRY:
            marks.popleft()  # the first mark is the start of the measurement
        if self._running_since is None and now - self._ended_at > IDLE_RESET:
            return None
        freed = len(marks) - 1
        if self.is_current:
            freed = min(freed, self._in_a_row)
        elapsed = self._time(now) - marks[-1 - freed][0] if marks else 0.0
        return freed / elapsed if freed >= MIN_SAMPLES and elapsed > 0.0 else None


class ShortestResponse:
    """The shortest time of a recent complete response.

    A request with less time left cannot finish. The mean is no use: a short response may be quick
    although responses take long on average.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def add(self, seconds: float, now: float) -> None:
        self._samples.append((seconds, now))

    def seconds(self, now: float) -> float:
        """The time with a safety margin; 0 with too few samples."""
        samples = self._samples
        while samples and now - samples[0][1] > SAMPLE_EXPIRY:
            samples.popleft()
        return MARGIN * min(samples)[0] if len(samples) >= MIN_SAMPLES else 0.0
