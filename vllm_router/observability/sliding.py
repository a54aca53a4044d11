"""Rates and percentiles over a sliding window. Pure: time is an argument, in seconds."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

Seconds: TypeAlias = Annotated[float, Meta(title="seconds")]

_GROWTH = 1.05
_LOG_GROWTH = math.log(_GROWTH)
_SMALLEST = 1e-5
"""Seconds; shorter durations are counted as this."""


LONGEST_WINDOW = 60.0
"""Seconds of the longest window."""

STEP = 2.0
"""Seconds by which the window advances."""


def bucket_of(seconds: float) -> int:
    """The bucket of a duration; bucket bounds grow by 5 %."""
    return int(math.log(seconds / _SMALLEST) / _LOG_GROWTH) if seconds > _SMALLEST else 0


def step_of(now: float) -> int:
    """The window step that contains a moment."""
    return int(now / STEP)


class Percentiles(msgspec.Struct, frozen=True, gc=False):
    """Percentiles of the durations of the last minute, each exact to 2.5 %."""

    p50: Seconds
    p95: Seconds
    p99: Seconds
    count: Annotated[int, Meta(description="Number of durations.")]


class SlidingPercentiles:
    """The distribution of the durations of the last `window` seconds.

    Durations are counted in buckets, so that memory and time do not depend on their number. Buckets
    and steps are arguments because several distributions share them.
    """

    def __init__(self, window: float = LONGEST_WINDOW) -> None:
        self._kept = math.ceil(window / STEP)
        self._total: dict[int, int] = {}
        self._steps: deque[tuple[int, dict[int, int]]] = deque()
        self._answer: Percentiles | None = None
        self._stale = False

    def add(self, bucket: int, step: int) -> None:
        """Add one duration; O(1). Steps ascend; an earlier one counts as the last."""
        steps, total = self._steps, self._total
        if not steps or steps[-1][0] < step:
            self._expire(step)
            steps.append((step, {}))
        counts = steps[-1][1]
        counts[bucket] = counts.get(bucket, 0) + 1
        total[bucket] = total.get(bucket, 0) + 1
        self._stale = True

    def read(self, now: float) -> Percentiles | None:
        """The percentiles of the window; None if it is empty. O(buckets in use), at most 500."""
        self._expire(step_of(now))
        if self._stale:
            self._answer, self._stale = _percentiles_in(self._total), False
        return self._answer

    def counts(self, now: float) -> dict[int, int]:
        """Number of durations of the window in each bucket."""
        self._expire(step_of(now))
        return self._total

    def _expire(self, step: int) -> None:
        steps, total = self._steps, self._total
        while steps and steps[0][0] <= step - self._kept:
            for bucket, count in steps.popleft()[1].items():
                total[bucket] -= count
                if not total[bucket]:
                    del total[bucket]
            self._stale = True


def percentiles_of(windows: Iterable[SlidingPercentiles], now: float) -> Percentiles | None:
    """The percentiles of several windows as if they were one. O(buckets in use)."""
    total: dict[int, int] = {}
    for window in windows:
        for bucket, count in window.counts(now).items():
            total[bucket] = total.get(bucket, 0) + count
    return _percentiles_in(total)


def _percentiles_in(total: dict[int, int]) -> Percentiles | None:
    count = sum(total.values())
    if not count:
        return None
    found = list(_values_at(total, [0.50 * count, 0.95 * count, 0.99 * count]))
    return Percentiles(found[0], found[1], found[2], count)


def _values_at(total: dict[int, int], ranks: list[float]) -> Iterator[float]:
    """The value at each rank; `ranks` ascend."""
    buckets = iter(sorted(total))
    seen = 0
    value = 0.0
    for rank in ranks:
        while seen < rank:
            bucket = next(buckets)
            seen += total[bucket]
            value = _SMALLEST * _GROWTH ** (bucket + 0.5)
        yield value


class Rate:
    """The rate of a counter, from its values over the last `window` seconds.

    A decrease means that the counter was reset (its server has restarted): earlier values are
    dropped.

    Times and values are in two lists, as pairs would be looked at by the garbage collector: a
    thousand servers make some ten thousand with each reading of the fleet.
    """

    __slots__ = ("_times", "_totals", "_window")

    def __init__(self, window: float = 5.0) -> None:
        self._window = window
        self._times: list[float] = []
        self._totals: list[float] = []

    def observe(self, total: float, now: float) -> None:
        """Add a value of the counter; times ascend.

        Of equal values in a row only the first and the last are kept: between two equal ones the
        counter stood still.
        """
        times, totals = self._times, self._totals
        if totals and total < totals[-1]:
            times.clear()
            totals.clear()
        if len(totals) > 1 and totals[-1] == total == totals[-2]:
            times[-1] = now
        else:
            times.append(now)
            totals.append(total)
        # Keep one value just outside the window, so that the whole window is covered.
        begin, last, old = now - self._window, len(times) - 2, 0
        while old < last and times[old + 1] <= begin:
            old += 1
        if old:
            del times[:old], totals[:old]
        if len(times) > 2 and times[0] < begin and totals[0] == totals[1]:
            times[0] = begin

    @property
    def rise(self) -> float:
        """The increase within the window."""
        totals = self._totals
        return totals[-1] - totals[0] if totals else 0.0

    @property
    def per_second(self) -> float:
        """0 until there are two values."""
        times = self._times
        if len(times) < 2 or times[-1] <= times[0]:
            return 0.0
        return self.rise / (times[-1] - times[0])


class Ratio:
    """The ratio of one counter's increase to another's, over the last `window` seconds.

    While neither increases, the ratio over the counters' lifetime; None before both are known.
    """

    def __init__(self, window: float = LONGEST_WINDOW) -> None:
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
