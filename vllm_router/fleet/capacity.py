"""How many requests a server runs at once without queueing: configured, or learnt from its gauges.

A server is full if requests have waited in its queue for some seconds and no more of them run
than before, or if its KV cache is full. What it runs then is its capacity. A server that runs more
without a queue has a larger one. A queue for a moment proves nothing: vLLM admits new requests
between two steps, and long prompts as its token budget allows. Before a server was ever full, only
the most that it ran without a queue is known: its load is shown against vLLM's default batch.

Policies want to know how many requests a server should get next to the others. That depends on
its speed: servers with the same settings are full with equally many, and a slow one computes them
for longer. So its share is EQUAL_SHARE times its speed, and less if it is full with fewer requests
than the others are. The scale never changes, because servers are scraped one after the other, and
the first with a larger scale would get all requests until the others have followed.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from statistics import median_low

from vllm_router.fleet.speed import SpeedEstimate

ASSUMED = 256
"""Shown as the capacity of a server that was never full: vLLM's default `--max-num-seqs`."""

EQUAL_SHARE = 32.0
"""Routing share of a server of median speed without a configured capacity. Beside servers with one
it is the median of theirs."""

KV_FULL = 0.95
"""KV cache usage from which a server is full."""

QUEUE_STAYS = 3.0
"""Seconds for which every scrape must show a queue before the server counts as full."""

HALF_LIFE = 10.0
"""Seconds in which a learnt capacity goes half the way to the requests that a full server runs."""

NOTICEABLE = 0.1
"""A change below this share changes no routing: affinities and scores stay as they are."""


MISFIT = 1.5
"""A configured capacity that differs by this factor from what was seen is worth a word."""


class CapacitySource(enum.StrEnum):
    """Where a capacity comes from."""

    CONFIGURED = "configured"
    LEARNT = "learnt"
    ASSUMED = "assumed"


class CapacityPool:
    """The learnt capacities of a fleet's servers, by the estimate that learnt each.

    configured: the median of the configured ones; None without any.
    """

    def __init__(self) -> None:
        self.configured: float | None = None
        self._learnt: dict[CapacityEstimate, float] = {}

    def take_configured(self, capacities: Iterable[int | None]) -> bool:
        """Take the configured capacities of the fleet; True if their median has changed."""
        known = [capacity for capacity in capacities if capacity is not None]
        before, self.configured = self.configured, median_low(known) if known else None
        return self.configured != before

    def note(self, estimate: CapacityEstimate, learnt: float | None) -> None:
        """Take a learnt capacity; None to forget the server."""
        if learnt is None:
            self._learnt.pop(estimate, None)
        else:
            self._learnt[estimate] = learnt

    @property
    def largest(self) -> float | None:
        """The largest learnt capacity; None before the first."""
        return max(self._learnt.values(), default=None)


class CapacityEstimate:
    """The capacity of one server.

    configured: `max_concurrent_requests`, None to learn it.
    speed: its speed next to the fleet's.
    peak: the most requests that ran without a queue.
    full_at: requests that it runs when it is full; None before it was full.
    """

    def __init__(
        self,
        configured: int | None,
        pool: CapacityPool | None = None,
        speed: SpeedEstimate | None = None,
    ) -> None:
        self.configured = configured
        self.speed = speed if speed is not None else SpeedEstimate()
        self.pool = pool if pool is not None else CapacityPool()
        self.peak = 0.0
        self.full_at: float | None = None
        self._used: float | None = None
        self._followed: float | None = None
        self._waiting_since: float | None = None
        self._ran = 0.0
        self._observed_at = -math.inf

    @property
    def source(self) -> CapacitySource:
        if self.configured is not None:
            return CapacitySource.CONFIGURED
        return CapacitySource.ASSUMED if self.full_at is None else CapacitySource.LEARNT

    @property
    def shown(self) -> int:
        """The capacity for operators, in requests."""
        if self.configured is not None:
            return self.configured
        if self.full_at is None:
            return max(ASSUMED, round(self.peak))
        return max(1, round(self.full_at))

    @property
    def proposed(self) -> int | None:
        """A better value for a configured capacity; None if it fits.

        More requests ran without a queue, or the server is full with less or more.
        """
        configured, full = self.configured, self.full_at
        if configured is None:
            return None
        if full is not None and not 1.0 / MISFIT <= full / configured <= MISFIT:
            return max(1, round(full))
        return round(self.peak) if self.peak > MISFIT * configured else None

    @property
    def share(self) -> float:
        """The capacity that policies use."""
        if self.configured is not None:
            return self.configured
        if self._followed is not None:
            return self._followed
        pool, ratio = self.pool, self.speed.ratio
        usual, largest = pool.configured, pool.largest
        if usual is not None:
            room = math.inf if self._used is None else self._used
            return min(usual * ratio, room)
        if self._used is None or largest is None:
            return EQUAL_SHARE * ratio
        return EQUAL_SHARE * min(ratio, self._used / largest * self.speed.pool.fastest)

    def join(self, pool: CapacityPool) -> None:
        """Compare with the servers of a fleet, and no more with others."""
        self.pool.note(self, None)
        self.pool = pool
        if self._used is not None and self.configured is None:
            pool.note(self, self._used)

    def observe(self, running: float, waiting: float, kv_usage: float | None, now: float) -> None:
        """Read one scrape of the engine's gauges."""
        if waiting <= 0:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now
        since = self._waiting_since
        ran, self._ran = self._ran, running
        before, self._observed_at = self._observed_at, now
        if running <= 0:
            return
        stays = since is not None and now - since >= QUEUE_STAYS and running <= ran
        if stays or (kv_usage or 0.0) >= KV_FULL:
            self._full(running, now - before)
        elif waiting <= 0:
            self._not_full(running)

    def follow(self, share: float) -> None:
        """Use the share that another process has learnt."""
        self._followed = share

    def refused(self, running: float, now: float) -> None:
        """The server refused a request as too busy while so many of ours were on it.

        One alone says nothing about the capacity.
        """
        if running > 1:
            self._full(running, now - self._observed_at)
            self._observed_at = now

    def forget(self) -> None:
        """A new process runs on the server, perhaps with other settings."""
        self.peak, self.full_at, self._used, self._followed = 0.0, None, None, None
        self._waiting_since, self._ran = None, 0.0
        self.pool.note(self, None)

    def _full(self, running: float, since: float) -> None:
        if self.full_at is None:
            self._learn(max(running, 1.0))
        else:
            kept = 0.5 ** (min(max(since, 0.0), HALF_LIFE) / HALF_LIFE)
            self._learn(running + kept * (self.full_at - running))

    def _not_full(self, running: float) -> None:
        self.peak = max(self.peak, running)
        if self.full_at is not None and running > self.full_at:
            self._learn(running)

    def _learn(self, value: float) -> None:
        self.full_at = value
        if self.configured is not None:
            return
        if self._used is None or abs(value - self._used) > NOTICEABLE * self._used:
            self._used = value
            self.pool.note(self, value)
