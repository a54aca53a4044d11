"""How fast a server is, next to the others of its fleet: learnt from its time per token.

Gauges show how many requests a server runs at once, not how fast: with equal settings a slow GPU
runs as many as a fast one. vLLM exports no figure of the hardware, but the times. A step of the
engine takes longer the more requests are in it, so times are reduced to an empty engine's.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from vllm_router.fleet.engine_metrics import EngineMetrics

HALF_LIFE = 60.0
"""Seconds after which a time per token counts half. Long, since hardware does not change, and a
busy server whose share jumped would get a burst of requests."""

PRIOR = 100.0
"""Weight of the fleet's median, in tokens, while the server has generated few."""

IDLE_HALF_LIFE = 20.0
MOST_WEIGHT = 4000.0
"""The weight of its own time, in tokens, is at most MOST_WEIGHT, and halves in so many seconds
without requests. So a server that was slow for a while, and gets few for that, is as good as
others after two minutes, and is tried again."""

PER_REQUEST = 0.015
"""How much longer a step takes for each request in it, over a step for none; 0.01 to 0.03 for 8B
to 70B models, with the prompts that are computed meanwhile. Without it a loaded server would seem
slow, and get less than its share."""

SLOWEST, FASTEST = 0.25, 4.0
"""More is no difference in hardware, but a fault."""

MARGIN = 0.1
"""Servers whose speed differs by less from the median count as equal; from twice as much on, the
difference counts in full."""


class SpeedPool:
    """The mean times per token of a fleet's servers, in order."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def replace(self, old: float, new: float) -> None:
        """Take a server's new time instead of its old one, in seconds; 0 for none."""
        times = self._times
        if old:
            del times[bisect_left(times, old)]
        if new:
            insort(times, new)

    @property
    def median(self) -> float:
        """The lower median of the times, in seconds; 0 before two servers have one."""
        times = self._times
        return times[(len(times) - 1) // 2] if len(times) > 1 else 0.0

    @property
    def fastest(self) -> float:
        """The highest speed of a server; 1 for the median."""
        median = self.median
        return _limited(median / self._times[0]) if median else 1.0


class SpeedEstimate:
    """The speed of one server.

    time: mean time per token of an engine with no other request, in seconds; 0 before the first.
    ratio: the speed over the median of the fleet.
    """

    def __init__(self, pool: SpeedPool | None = None) -> None:
        self.pool = pool if pool is not None else SpeedPool()
        self.time = 0.0
        self.ratio = 1.0
        self._sum = self._count = 0.0
        self._weight = 0.0

    def join(self, pool: SpeedPool) -> None:
        """Compare with the servers of a fleet, and no more with others."""
        if self.time:
            self.pool.replace(self.time, 0.0)
            pool.replace(0.0, self.time)
        self.pool = pool

    def observe(self, earlier: EngineMetrics, metrics: EngineMetrics, elapsed: float) -> None:
        """Read the counters of two scrapes of one process, so many seconds apart."""
        sums, counts = metrics.token_latency_sum, metrics.token_latency_count
        old_sums, old_counts = earlier.token_latency_sum, earlier.token_latency_count
        if sums is None or counts is None or old_sums is None or old_counts is None:
            return
        count, seconds = counts - old_counts, sums - old_sums
        keep: float = 0.5 ** (max(elapsed, 0.0) / HALF_LIFE)
        self._sum *= keep
        self._count *= keep
        self._weight *= 0.5 ** (max(elapsed, 0.0) / IDLE_HALF_LIFE)
        if count >= 1.0 and seconds > 0.0:  # less than one token is no count, and overflows
            requests = 0.5 * ((earlier.running or 0.0) + (metrics.running or 0.0))
            self._sum += seconds / (1.0 + PER_REQUEST * requests)
            self._count += count
            self._weight = min(self._weight + count, MOST_WEIGHT)
            self._set(self._sum / self._count)
        self._compare()

    def forget(self) -> None:
        """Another process runs on the server, perhaps on other hardware."""
        self._sum = self._count = self._weight = 0.0
        self.ratio = 1.0
        self._set(0.0)

    def _set(self, time: float) -> None:
        self.pool.replace(self.time, time)
        self.time = time

    def _compare(self) -> None:
        median = self.pool.median
        self.ratio = 1.0
        if median and self.time:
            mean = (self._weight * self.time + PRIOR * median) / (self._weight + PRIOR)
            self.ratio = _limited(median / mean)


def _limited(ratio: float) -> float:
    """The ratio within SLOWEST and FASTEST, and 1 within MARGIN, without a jump between."""
    ratio = min(max(ratio, SLOWEST), FASTEST)
    difference = abs(ratio - 1.0)
    if difference >= 2.0 * MARGIN:
        return ratio
    counted = 2.0 * max(0.0, difference - MARGIN)
    return 1.0 + counted if ratio > 1.0 else 1.0 - counted
