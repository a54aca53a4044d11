"""Two small machines: what the probes say of a server, and what real traffic says.

They are separate on purpose. A vLLM server in its shutdown grace answers `/health` with 200 while
every request fails fast, so a good probe must not bring back a server that traffic has ejected;
and a server that no request reaches can only be judged by probes.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass


class Check(enum.Enum):
    """The verdict of one active check."""

    GOOD = "good"
    UNHEALTHY = "unhealthy"  # it answered, and said no
    BUSY = "busy"  # 503 or 429: full, if it has just answered requests; else as good as no
    UNREACHABLE = "unreachable"  # refused, reset, not HTTP
    TIMEOUT = "timeout"  # no answer in time


@dataclass(frozen=True, slots=True)
class HealthRules:
    """Settings of both machines; durations in seconds."""

    rise: int = 2
    fall: int = 3
    window: int = 10
    min_success_rate: float = 0.8
    max_response_time: float = 10.0
    failure_threshold: int = 3
    ejection_time: float = 5.0

    def time_out(self, times: int) -> float:
        """How long a server stays out that has failed so often lately: longer each time."""
        return min(self.ejection_time * times, max(60.0, self.ejection_time))


FORGET_AFTER = 30.0
"""For each so many seconds of good service one earlier failure of a server is forgotten."""


TRIAL_GAP = 2.0
"""Seconds that a trial of an ejected server may be silent before a second one follows."""

LONGEST_TRIAL_GAP = 60.0


ODD_REMEMBERED = 60.0
"""Seconds for which an odd answer is remembered, until one to another request is odd, too."""


class ProbeHealth:
    """Up or down by active checks, with hysteresis. `up` is None until the first check.

    Down after `fall` failures in a row, or when a full window of checks has too low a success
    rate or too long a mean response time; up again after `rise` good checks in a row, with an
    empty window, so that old failures do not outweigh a recovery.

    One that keeps falling is held back: after its second fall within a while its checks must have
    been good for `ejection_time` seconds on end, after the third for twice that, and so on.
    """

    def __init__(self, rules: HealthRules) -> None:
        self.rules = rules
        self.up: bool | None = None
        self.reason = "not probed yet"
        self.failures_in_row = 0
        self.goods_in_row = 0
        self.total_checks = 0
        self.last_verdict: Check | None = None
        self.last_response_time: float | None = None
        self.window: deque[tuple[bool, float]] = deque(maxlen=rules.window)
        self.falls = 0
        """How often it has fallen lately."""
        self._detail = ""
        """What the last failed check said."""
        self._up_since = 0.0
        self._good_since = 0.0

    def apply(self, rules: HealthRules) -> None:
        """New rules from a reload; what has been seen stays."""
        self.rules = rules
        if rules.window != self.window.maxlen:
            self.window = deque(self.window, maxlen=rules.window)

    @property
    def held_back(self) -> bool:
        """It is out only because it has fallen too often: its checks are good again."""
        return self.up is False and self.goods_in_row >= self.rules.rise

    @property
    def settled(self) -> bool:
        """False while checks contradict the state: the next one should come soon."""
        return self.failures_in_row == 0 if self.up else self.goods_in_row == 0

    @property
    def success_rate(self) -> float:
        """Share of good checks in the window; 1 while it is empty."""
        if not self.window:
            return 1.0
        return sum(good for good, _ in self.window) / len(self.window)

    @property
    def mean_response_time(self) -> float:
        """Seconds, over the good checks in the window; 0 while there are none."""
        times = [elapsed for good, elapsed in self.window if good]
        return sum(times) / len(times) if times else 0.0

    def observe(self, check: Check, elapsed: float, now: float, detail: str = "") -> bool:
        """Take one `/health` check in that took `elapsed`; True if the state flipped."""
        good = check is Check.GOOD
        self.total_checks += 1
        self.last_verdict = check
        self.last_response_time = elapsed
        self.window.append((good, elapsed))
        self._count(good, now)
        return self._judge(now, detail or check.value)

    def observe_scrape(self, reachable: bool, now: float, detail: str = "") -> bool:
        """Take the reachability seen by a metrics scrape in; True if the state flipped.

        An unreachable port is a failed check. An answered scrape clears failures, unless the
        last `/health` answered no: `/metrics` of a dead engine still works. It raises nobody.
        """
        if not reachable:
            self._count(False, now)
            return self._judge(now, detail or Check.UNREACHABLE.value)
        if self.up and self.last_verdict is not Check.UNHEALTHY:
            self.failures_in_row = 0
        return False

    def _count(self, good: bool, now: float) -> None:
        if good and not self.goods_in_row:
            self._good_since = now
        self.failures_in_row = 0 if good else self.failures_in_row + 1
        self.goods_in_row = self.goods_in_row + 1 if good else 0

    def _judge(self, now: float, detail: str) -> bool:
        rules = self.rules
        if self.up is None:
            # The first check decides alone: a fleet must be usable at once after a start.
            self.up = self.failures_in_row == 0
            self.reason = "" if self.up else detail
            self._detail = detail
            self._up_since = now
            return True
        if not self.up:
            if self.failures_in_row and detail != self._detail:
                self.reason = self._detail = detail  # the latest one helps most
            if self.goods_in_row < rules.rise:
                return False
            hold = rules.time_out(self.falls - 1) if self.falls > 1 else 0.0
            if now - self._good_since < hold:
                self.reason = f"it fell {self.falls} times: back after {hold:g} s of good checks"
                return False
            self.up, self.reason, self._up_since = True, "", now
            self.window.clear()
            return True
        fault = self._fault(detail)
        if fault is None:
            return False
        self.up, self.reason, self._detail = False, fault, detail
        self.falls = max(0, self.falls - int((now - self._up_since) / FORGET_AFTER)) + 1
        self.goods_in_row = 0
        return True

    def _fault(self, detail: str) -> str | None:
        rules = self.rules
        if self.failures_in_row >= rules.fall:
            return f"{detail} ({self.failures_in_row} checks in a row)"
        if len(self.window) == rules.window:
            if self.success_rate < rules.min_success_rate:
                return f"only {self.success_rate:.0%} of the last {rules.window} checks were good"
            if self.mean_response_time > rules.max_response_time:
                return f"checks take {self.mean_response_time:.1f} s on average"
        return None


class TrafficHealth:
    """Ejection by real traffic, with linkerd's probation: back in only by a trial request.

    Ejected for `ejection_time` seconds times the number of recent ejections; then one request
    tries it, and the first good answer restores it. While a trial is silent another one follows
    after TRIAL_GAP seconds, then after twice that, and so on: a trial may be a plain answer that
    takes minutes. An ejection is forgotten for each 30 seconds that the server has served well
    since.

    Failures that the request itself may have caused are told by its `body`: the same body again
    does not count again, until another server has answered it (`not_its_fault`). So a client that
    repeats what makes every server fail ejects none of them. An `odd` answer (not valid HTTP) is
    held against the request first: it counts once the answer to a different body is odd, too, or
    another server has answered this body well.
    """

    WINDOW = 10.0
    """Seconds over which the success rate is looked at: half of them at least, in two halves."""

    def __init__(self, rules: HealthRules) -> None:
        self.rules = rules
        self.failures_in_row = 0
        self.ejections = 0
        self.ejected = False
        self.reason = ""
        self.until = 0.0
        self.trial = False
        self.next_trial_at = 0.0
        """When another trial may follow one that is still silent."""
        self._trials = 0
        self._restored_at = 0.0
        self._last_body: int | None = None
        self._repeats = 0
        self._odd_body: int | None = None
        self._odd_until = 0.0
        self._forget_rate(0.0)

    def apply(self, rules: HealthRules) -> None:
        self.rules = rules

    def admits(self, now: float) -> bool:
        """Whether a request may be sent now: not ejected, or due for its trial."""
        if not self.ejected:
            return True
        return now >= self.until and (not self.trial or now >= self.next_trial_at)

    # -- the success rate ---------------------------------------------------------------------

    def _forget_rate(self, now: float) -> None:
        self._good = self._bad = self._old_good = self._old_bad = 0
        self._half_until = now + self.WINDOW / 2

    def _turn(self, now: float) -> None:
        """A half of the window is over."""
        if now >= self._half_until + self.WINDOW / 2:
            self._forget_rate(now)
            return
        self._old_good, self._old_bad, self._good, self._bad = self._good, self._bad, 0, 0
        self._half_until += self.WINDOW / 2

    def success_rate(self, now: float) -> tuple[float, int]:
        """The share of good ones among its last requests, and how many those are."""
        if now >= self._half_until:
            self._turn(now)
        bad = self._bad + self._old_bad
        count = self._good + self._old_good + bad
        return (1.0 - bad / count if count else 1.0), count

    # -- what requests show -------------------------------------------------------------------

    def failed(
        self,
        now: float,
        *,
        trial: bool,
        jitter: float = 1.0,
        body: int | None = None,
        odd: bool = False,
        allowed: bool = True,
    ) -> bool:
        """A request failed by the server's fault; True if that ejects it (again).

        `trial` tells whether it was one of the trial requests. `jitter` multiplies the ejection
        time, so that several servers do not return together. `body` is a fingerprint, where the
        request may be the reason; `odd` says that it probably is. Nothing is ejected unless
        `allowed`.
        """
        if odd and not self._odd_again(body, now):
            return False
        if now >= self._half_until:
            self._turn(now)
        if body is not None and body == self._last_body:
            self._repeats += 1
        else:
            self._last_body, self._repeats = body, 0
            self.failures_in_row += 1
            self._bad += 1
        if self.ejected:
            if not trial or now < self.until:
                # Sent before the ejection, or in panic: the clock is running already. Otherwise
                # the many requests of one moment would count as many ejections.
                return False
            self.eject(now, jitter, "its trial request failed")
            return True
        return allowed and self._eject_failing(now, jitter)

    def _odd_again(self, body: int | None, now: float) -> bool:
        """Whether a different request has had an odd answer lately; notes this one if not."""
        if self._odd_body is None or now >= self._odd_until:
            self._odd_body, self._odd_until = body, now + ODD_REMEMBERED
            return False
        return body != self._odd_body

    def not_its_fault(self, body: int, now: float, *, jitter: float, allowed: bool) -> bool:
        """Another server has answered the request that failed here; True if that ejects this."""
        if body == self._odd_body:
            self._odd_body = None
            self.failures_in_row += 1
            self._bad += 1
            return allowed and not self.ejected and self._eject_failing(now, jitter)
        if body != self._last_body:
            return False
        self.failures_in_row += self._repeats
        self._bad += self._repeats
        self._last_body, self._repeats = None, 0
        return allowed and not self.ejected and self._eject_failing(now, jitter)

    def _eject_failing(self, now: float, jitter: float) -> bool:
        if self.failures_in_row < self.rules.failure_threshold:
            return False
        self.eject(now, jitter, f"{self.failures_in_row} requests in a row failed")
        return True

    def eject(self, now: float, jitter: float, reason: str) -> None:
        """Out with it, for longer than the last time."""
        if not self.ejected:
            served_well = now - self._restored_at
            self.ejections = max(0, self.ejections - int(served_well / FORGET_AFTER))
        self.ejections += 1
        time = self.rules.time_out(self.ejections)
        self.ejected, self.trial, self.until = True, False, now + time * jitter
        self._trials = 0
        self.reason = reason

    def succeeded(self, now: float, *, trial: bool) -> bool:
        """A request was answered; True if that ends an ejection."""
        self.failures_in_row = self._repeats = 0
        if now >= self._half_until:
            self._turn(now)
        self._good += 1
        if not (self.ejected and trial):
            return False
        self._restore(now)
        return True

    def start_trial(self, now: float) -> bool:
        """A request has been leased; True if that makes it a trial."""
        self.trial = self.ejected
        if self.trial:
            gap = min(TRIAL_GAP * 2 ** min(self._trials, 8), LONGEST_TRIAL_GAP)
            self.next_trial_at = now + gap
            if now >= self.until:  # else it was sent for want of any other server
                self._trials += 1
        return self.trial

    def trial_ended(self) -> None:
        """The trial brought no verdict (the client left): another may follow."""
        self.trial = False

    def restarted(self, now: float) -> bool:
        """Probes saw the server go down and come up: a new process, judged afresh."""
        was_ejected = self.ejected
        self.failures_in_row = self._repeats = 0
        self._restore(now)
        return was_ejected

    def _restore(self, now: float) -> None:
        self.ejected = self.trial = False
        self._restored_at = now
        self._forget_rate(now)
