"""The load of one server: its scraped gauges, corrected by our leases, slow start and errors."""

from __future__ import annotations

import math

from vllm_router.fleet.engine_metrics import EngineMetrics

STALE_AFTER_INTERVALS = 3
"""Scrape intervals after which metrics are not used for routing any more."""

SLOW_START_MIN = 0.1
"""The slow start factor of a server that has just come back."""

DEFAULT_RESPONSE_SECONDS = 1.0
"""Assumed duration of a good response before the first one."""

MIN_ERROR_PENALTY = 0.01
"""A smaller penalty is dropped."""

EWMA_WEIGHT = 0.05
"""Weight of a new sample in the mean durations."""


class LoadEstimate:
    """Requests on the server now, and the load that policies compare.

    running, waiting: requests that the engine runs and queues, as far as known.
    active: running + 0.5 × waiting + error_penalty.
    relative: running + 0.5 × waiting, per unit of weighted capacity.
    value: the same per unit of the capacity that operators see.
    effective: what policies compare. Equals `relative` outside slow start and without a penalty,
        else (active + 1) / (weighted capacity × slow_start_factor) - 1 / weighted capacity: the
        prospective request is included, so that an empty server in slow start is not flooded.
    slow_start_factor: part of its capacity that the server gets; 1 outside slow start.
    error_penalty: requests added for fast errors, decaying over the duration of a good response;
        without it the server that fails fastest would look least busy (a sinkhole).
    advancing: whether slow_start_factor or error_penalty change with time, see `advance`.
    metrics, scraped_at: the last scrape with a load, None before the first.
    fresh: whether the metrics are recent enough to be used.
    leases_at_scrape: leases held when that scrape was requested.
    stuck: requests in the gauges that do not exist (vllm#29928), see `EngineActivity`.
    """

    def __init__(self) -> None:
        self.weighted_capacity = 1.0
        self.shown_capacity = 1.0
        self.slow_start = 0.0
        self.stale_after = math.inf
        self.relative = 0.0
        self.running = 0.0
        self.waiting = 0.0
        self.active = 0.0
        self.effective = 0.0
        self.slow_start_factor = 1.0
        self.error_penalty = 0.0
        self.advancing = False
        self.metrics: EngineMetrics | None = None
        self.scraped_at: float | None = None
        self.fresh = False
        self.leases_at_scrape = 0
        self.stuck = 0.0
        self.response_seconds = 0.0
        """Mean duration of good responses; 0 before the first."""
        self.first_token_seconds = 0.0
        """Mean time to the first token of streams; 0 before the first."""
        self._advanced_at = 0.0

    def configure(
        self, weighted_capacity: float, slow_start: float, metrics_interval: float
    ) -> None:
        """Apply settings; call `update` afterwards."""
        self.set_capacity(weighted_capacity, weighted_capacity)
        self.slow_start = slow_start
        self.expect_scrapes(metrics_interval)

    def expect_scrapes(self, interval: float) -> None:
        """The next scrapes follow in so many seconds, each."""
        self.stale_after = STALE_AFTER_INTERVALS * interval

    def set_capacity(self, weighted: float, shown: float) -> None:
        """The capacity that policies use, and the one that operators see, both with the weight."""
        self.weighted_capacity, self.shown_capacity = weighted, shown

    @property
    def value(self) -> float:
        """The load that operators see."""
        return (self.running + 0.5 * self.waiting) / self.shown_capacity

    def update(self, in_flight: int) -> None:
        """Recompute the figures for `in_flight` leases.

        The last scrape is corrected by the leases taken and released since. The sum is at least
        `in_flight`: gauges lag a new request by up to 41 ms (vLLM 0.32), and a scrape may come
        before the request has reached the engine.
        """
        metrics = self.metrics
        if self.fresh and metrics is not None and metrics.running is not None:
            waiting = metrics.waiting or 0.0
            total = metrics.running + waiting - self.stuck + (in_flight - self.leases_at_scrape)
            if total < in_flight:
                total = in_flight
            if waiting > total:
                waiting = total
            running = total - waiting
        else:
            running, waiting = float(in_flight), 0.0
        self.running, self.waiting = running, waiting
        self.active = active = running + 0.5 * waiting
        capacity = self.weighted_capacity
        self.relative = self.effective = active / capacity
        if self.advancing:
            self.active = active = active + self.error_penalty
            self.effective = (active + 1.0) / (capacity * self.slow_start_factor) - 1.0 / capacity

    def advance(self, now: float, recovered_at: float) -> bool:
        """Update the terms that change with time; False once none does any more.

        Call `update` afterwards. An earlier `now` counts as the last one.
        """
        now = max(now, self._advanced_at)
        age = now - recovered_at
        self.slow_start_factor = 1.0
        if age < self.slow_start:
            self.slow_start_factor = max(SLOW_START_MIN, age / self.slow_start)
        if self.error_penalty:
            scale = self.response_seconds or DEFAULT_RESPONSE_SECONDS
            left = self.error_penalty * math.exp((self._advanced_at - now) / scale)
            self.error_penalty = left if left > MIN_ERROR_PENALTY else 0.0
        self._advanced_at = now
        self.advancing = self.slow_start_factor < 1.0 or self.error_penalty > 0.0
        return self.advancing

    def record_success(self, seconds: float) -> None:
        """A good response took this long."""
        weight = EWMA_WEIGHT if self.response_seconds else 1.0
        self.response_seconds += weight * (seconds - self.response_seconds)

    def record_first_token(self, seconds: float) -> None:
        """The first token of a stream took this long."""
        weight = EWMA_WEIGHT if self.first_token_seconds else 1.0
        self.first_token_seconds += weight * (seconds - self.first_token_seconds)

    def record_fast_error(
        self, now: float, seconds: float, fleet_mean: float, recovered_at: float
    ) -> bool:
        """Add a penalty for an error that came faster than a good response; True if one was added.

        `fleet_mean` is the mean duration of good responses in the fleet (0 if unknown): the
        server's own estimate is drawn towards it, as it is outdated the longer the server fails.
        Call `update` afterwards.
        """
        if fleet_mean:
            self.record_success(fleet_mean)
        expected = self.response_seconds or DEFAULT_RESPONSE_SECONDS
        if seconds >= expected:
            return False
        self.advance(now, recovered_at)
        # The penalty decays exponentially: its integral is the missing part of a good response.
        self.error_penalty += 1.0 - seconds / expected
        self.advancing = True
        return True

    def take_scrape(self, metrics: EngineMetrics, now: float, leases: int) -> None:
        """A metrics page was read; `leases` were held when it was requested.

        A page without a load (`--disable-log-stats`) discards the earlier figures. Call `update`
        afterwards.
        """
        if metrics.has_load:
            self.metrics, self.scraped_at = metrics, now
        else:
            self.metrics = self.scraped_at = None
        self.fresh = metrics.has_load
        self.leases_at_scrape = leases

    def age(self, now: float) -> float:
        """Seconds since the last good scrape; infinite before the first."""
        return now - self.scraped_at if self.scraped_at is not None else math.inf

    @property
    def asleep(self) -> bool:
        """The engine sleeps: requests would wait until it is woken up."""
        return self.metrics is not None and self.metrics.asleep
