"""Rates and percentiles over the last seconds. Pure: time is an argument, in seconds."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

_GROWTH = 1.05
_LOG_GROWTH = math.log(_GROWTH)
_SMALLEST = 1e-5
"""Seconds; whatever is shorter counts as this."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds, each exact to 2.5 %. `count` values lie in the window."""

    p50: float
    p95: float
    p99: float
    count: int


class SlidingPercentiles:
    """The distribution of the durations seen in the last `window` seconds.

    Durations are counted in buckets that grow by 5 %, so memory and time do not depend on how
    many there were. The window moves in steps of `step` seconds.
    """

    def __init__(self, window: float = 60.0, step: float = 2.0) -> None:
        self._step = step
        self._kept = math.ceil(window / step)
        self._total: dict[int, int] = {}
        self._steps: deque[tuple[int, dict[int, int]]] = deque()
        self._answer: Percentiles | None = None
        self._stale = False

    def add(self, seconds: float, now: float) -> None:
        """Take one duration in; O(1)."""
        bucket = int(math.log(max(seconds, _SMALLEST) / _SMALLEST) / _LOG_GROWTH)
        number = int(now / self._step)
        steps = self._steps
        if not steps or steps[-1][0] != number:
            self._expire(number)
            steps.append((number, {}))
        counts = steps[-1][1]
        counts[bucket] = counts.get(bucket, 0) + 1
        self._total[bucket] = self._total.get(bucket, 0) + 1
        self._stale = True

    def read(self, now: float) -> Percentiles | None:
        """What the window holds now; None if it is empty. O(buckets in use), at most 500."""
        self._expire(int(now / self._step))
        if self._stale:
            self._answer, self._stale = self._compute(), False
        return self._answer

    def _expire(self, number: int) -> None:
        steps, total = self._steps, self._total
        while steps and steps[0][0] <= number - self._kept:
            for bucket, count in steps.popleft()[1].items():
                total[bucket] -= count
                if not total[bucket]:
                    del total[bucket]
            self._stale = True

    def _compute(self) -> Percentiles | None:
        count = sum(self._total.values())
        if not count:
            return None
        found = list(self._ranks([0.50 * count, 0.95 * count, 0.99 * count]))
        return Percentiles(found[0], found[1], found[2], count)

    def _ranks(self, ranks: list[float]) -> Iterator[float]:
        """The value at each rank; `ranks` ascend."""
        buckets = iter(sorted(self._total))
        seen = 0
        value = 0.0
        for rank in ranks:
            while seen < rank:
                bucket = next(buckets)
                seen += self._total[bucket]
                value = _SMALLEST * _GROWTH ** (bucket + 0.5)
            yield value


class Rate:
    """How fast a counter rises, from readings of it over the last `window` seconds.

    A counter that falls has begun anew (its server was restarted): earlier readings are dropped.
    """

    def __init__(self, window: float = 5.0) -> None:
        self._window = window
        self._readings: deque[tuple[float, float]] = deque()

    def observe(self, total: float, now: float) -> None:
        """A reading of the counter; times ascend."""
        readings = self._readings
        if readings and total < readings[-1][1]:
            readings.clear()
        readings.append((now, total))
        # The oldest one kept is just outside the window, so that the whole window is covered.
        while len(readings) > 2 and readings[1][0] <= now - self._window:
            readings.popleft()

    @property
    def rise(self) -> float:
        """By how much the counter has risen within the window."""
        return self._readings[-1][1] - self._readings[0][1] if self._readings else 0.0

    @property
    def per_second(self) -> float:
        """0 until there are two readings."""
        readings = self._readings
        if len(readings) < 2 or readings[-1][0] <= readings[0][0]:
            return 0.0
        return self.rise / (readings[-1][0] - readings[0][0])


class Ratio:
    """The share that one counter's rise has in another's, over the last `window` seconds.

    While neither rises, the share over the counters' lifetime; None before both are known.
    """

    def __init__(self, window: float = 60.0) -> None:
        self._part, self._whole = Rate(window), Rate(window)
        self._lifetime: float | None = None

    def observe(self, part: float | None, whole: float | None, now: float) -> None:
        if part is None or whole is None:
            return
        self._part.observe(part, now)
        self._whole.observe(whole, now)
        self._lifetime = part / whole if whole else None

    @property
    def value(self) -> float | None:
        whole = self._whole.rise
        return self._part.rise / whole if whole > 0 else self._lifetime
