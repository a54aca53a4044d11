"""Health by active checks: probes of `/health` and reachability of `/metrics`.

Separate from passive health on purpose. A vLLM server in its shutdown grace period answers
`/health` with 200 while every request fails fast, so a good check must not end an ejection; and a
server that gets no requests can only be judged by checks.
"""

from __future__ import annotations

import enum
from collections import deque

from vllm_router.fleet.health_rules import FORGET_AFTER, HealthRules
from vllm_router.fleet.reason import NONE, Reason, because


class Check(enum.Enum):
    """The verdict of one active check."""

    GOOD = "good"
    UNHEALTHY = "unhealthy"  # an error status
    BUSY = "busy"  # 503 or 429: full if it serves requests at the same time, else unhealthy
    UNREACHABLE = "unreachable"  # refused, reset, not HTTP
    TIMEOUT = "timeout"  # no response in time


class ActiveHealth:
    """Up or down by active checks, with hysteresis. `up` is None until the first check.

    Down after `fall` failures in a row, or when a full window of checks has too low a success
    rate or too long a mean response time. Up again after `rise` good checks in a row; the window
    is cleared then, so that old failures do not outweigh a recovery.

    A server that goes down repeatedly is damped: after the second time its checks must be good for
    `ejection_time` seconds without a failure, after the third for twice that, and so on.
    """

    def __init__(self, rules: HealthRules) -> None:
        self.rules = rules
        self.up: bool | None = None
        self.reason = because("not_probed")
        self.failures_in_row = 0
        self.goods_in_row = 0
        self.total_checks = 0
        self.last_verdict: Check | None = None
        self.last_response_time: float | None = None
        self.window: deque[tuple[bool, float]] = deque(maxlen=rules.window)
        self.times_down = 0
        """How often it has gone down recently."""
        self._detail = NONE
        """The reason of the last failed check."""
        self._up_since = 0.0
        self._good_since = 0.0

    def apply(self, rules: HealthRules) -> None:
        """Take new rules after a reload; the state stays."""
        self.rules = rules
        if rules.window != self.window.maxlen:
            self.window = deque(self.window, maxlen=rules.window)

    @property
    def damped(self) -> bool:
        """Whether it is down only by flap damping: its checks are good again."""
        return self.up is False and self.goods_in_row >= self.rules.rise

    @property
    def settled(self) -> bool:
        """False while the last check contradicts the state: the next one should follow soon."""
        return self.failures_in_row == 0 if self.up else self.goods_in_row == 0

    @property
    def success_rate(self) -> float:
        """Share of good checks in the window; 1 for an empty window."""
        if not self.window:
            return 1.0
        return sum(good for good, _ in self.window) / len(self.window)

    @property
    def mean_response_time(self) -> float:
        """Mean seconds of the good checks in the window; 0 without any."""
        times = [elapsed for good, elapsed in self.window if good]
        return sum(times) / len(times) if times else 0.0

    def observe(self, check: Check, elapsed: float, now: float, detail: Reason = NONE) -> bool:
        """Record a `/health` check that took `elapsed` seconds; True if `up` has changed."""
        good = check is Check.GOOD
        self.total_checks += 1
        self.last_verdict = check
        self.last_response_time = elapsed
        self.window.append((good, elapsed))
        self._count(good, now)
        return self._judge(now, detail or because("check_failed", detail=check.value))

    def observe_scrape(self, reachable: bool, now: float, detail: Reason = NONE) -> bool:
        """Record whether a metrics scrape reached the server; True if `up` has changed.

        An unreachable port is a failed check. A successful scrape clears failures unless the last
        `/health` check was unhealthy (`/metrics` works with a dead engine); it brings no server up.
        """
        if not reachable:
            self._count(False, now)
            unreachable = because("check_failed", detail=Check.UNREACHABLE.value)
            return self._judge(now, detail or unreachable)
        if self.up and self.last_verdict is not Check.UNHEALTHY:
            self.failures_in_row = 0
        return False

    def _count(self, good: bool, now: float) -> None:
        if not self.goods_in_row:
            self._good_since = now
        self.failures_in_row = 0 if good else self.failures_in_row + 1
        self.goods_in_row = self.goods_in_row + 1 if good else 0

    def _judge(self, now: float, detail: Reason) -> bool:
        rules = self.rules
        if self.up is None:
            # The first check decides alone, so that a fleet is usable right after the start.
            self.up = self.failures_in_row == 0
            self.reason = NONE if self.up else detail
            self._up_since = now
            return True
        if not self.up:
            if self.failures_in_row and detail != self._detail:
                self.reason = self._detail = detail  # the latest reason helps most
            if self.goods_in_row < rules.rise:
                return False
            hold = rules.time_out(self.times_down - 1) if self.times_down > 1 else 0.0
            if now - self._good_since < hold:
                self.reason = because("damped", n=self.times_down, seconds=f"{hold:g}")
                return False
            self.up, self.reason, self._up_since = True, NONE, now
            self.window.clear()
            return True
        fault = self._fault(detail)
        if not fault:
            return False
        self.up, self.reason, self._detail = False, fault, detail
        forgotten = int((now - self._up_since) / FORGET_AFTER)
        self.times_down = max(0, self.times_down - forgotten) + 1
        self.goods_in_row = 0
        return True

    def _fault(self, detail: Reason) -> Reason:
        rules = self.rules
        if self.failures_in_row >= rules.fall:
            return detail.in_row(self.failures_in_row)
        if len(self.window) == rules.window:
            if self.success_rate < rules.min_success_rate:
                return because("few_good_checks", share=f"{self.success_rate:.0%}", n=rules.window)
            if self.mean_response_time > rules.max_response_time:
                return because("slow_checks", seconds=f"{self.mean_response_time:.1f}")
        return NONE
