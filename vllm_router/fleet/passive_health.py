"""Health by real traffic: ejection, and recovery by a trial request."""

from __future__ import annotations

from vllm_router.fleet.health_rules import FORGET_AFTER, HealthRules
from vllm_router.fleet.reason import NONE, Reason, because

TRIAL_GAP = 2.0
"""Seconds that a trial request may be silent before a second one follows."""

LONGEST_TRIAL_GAP = 60.0

INVALID_REMEMBERED = 60.0
"""Seconds in which a second invalid response, to a different request, makes both count."""


class PassiveHealth:
    """Ejection by failed requests, and probation: a trial request decides about the return.

    The ejection lasts `ejection_time` seconds times the number of recent ejections. Then one trial
    request is sent, and its good response ends the ejection. If a trial stays silent, another one
    follows after TRIAL_GAP seconds, then after twice that, and so on: a plain response may take
    minutes. One ejection is forgotten per FORGET_AFTER seconds of good service.

    A failure that the request itself may have caused carries the fingerprint `body` of the
    request. The same body does not count again until another server has answered it
    (`answered_elsewhere`), so a client that repeats a request that fails everywhere ejects no
    server. An `odd` (invalid) response counts only once the response to a different body is
    invalid, too, or another server has answered this body.
    """

    WINDOW = 10.0
    """Seconds of the success rate's window, in two halves; at least one half has passed."""

    def __init__(self, rules: HealthRules) -> None:
        self.rules = rules
        self.failures_in_row = 0
        self.ejections = 0
        self.ejected = False
        self.reason = NONE
        self.until = 0.0
        self.trial = False
        self.next_trial_at = 0.0
        """When another trial may follow a silent one."""
        self._gap = TRIAL_GAP
        self._restored_at = 0.0
        self._last_body: int | None = None
        self._repeats = 0
        self._odd_body: int | None = None
        self._odd_until = 0.0
        self._forget_rate(0.0)

    def apply(self, rules: HealthRules) -> None:
        self.rules = rules

    def admits(self, now: float) -> bool:
        """Whether a request may be sent now: not ejected, or a trial is due."""
        if not self.ejected:
            return True
        return now >= self.until and (not self.trial or now >= self.next_trial_at)

    # -- the success rate ---------------------------------------------------------------------

    def _forget_rate(self, now: float) -> None:
        self._good = self._bad = self._old_good = self._old_bad = 0
        self._half_until = now + self.WINDOW / 2

    def _next_half(self, now: float) -> None:
        """Begin the next half of the window."""
        if now >= self._half_until + self.WINDOW / 2:
            self._forget_rate(now)
            return
        self._old_good, self._old_bad, self._good, self._bad = self._good, self._bad, 0, 0
        self._half_until += self.WINDOW / 2

    def success_rate(self, now: float) -> tuple[float, int]:
        """The share of good requests in the window, and the number of all."""
        if now >= self._half_until:
            self._next_half(now)
        bad = self._bad + self._old_bad
        count = self._good + self._old_good + bad
        return (1.0 - bad / count if count else 1.0), count

    # -- results of requests ------------------------------------------------------------------

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

        trial: whether it was a trial request.
        jitter: factor on the ejection time, so that several servers do not return together.
        body: fingerprint of the request, if it may be the cause.
        odd: whether the request probably is the cause.
        allowed: whether the server may be ejected.
        """
        if odd and not self._odd_again(body, now):
            return False
        if now >= self._half_until:
            self._next_half(now)
        if body is not None and body == self._last_body:
            self._repeats += 1
        else:
            self._last_body, self._repeats = body, 0
            self.failures_in_row += 1
            self._bad += 1
        if self.ejected:
            if not trial or now < self.until:
                # Sent before the ejection or by the panic rule. If it counted, many requests that
                # fail at the same moment would be many ejections.
                return False
            self.eject(now, jitter, because("trial_failed"))
            return True
        return allowed and self._eject_failing(now, jitter)

    def _odd_again(self, body: int | None, now: float) -> bool:
        """Whether a different request recently had an odd response, too; else remember this."""
        if self._odd_body is None or now >= self._odd_until:
            self._odd_body, self._odd_until = body, now + INVALID_REMEMBERED
            return False
        return body != self._odd_body

    def answered_elsewhere(self, body: int, now: float, *, jitter: float, allowed: bool) -> bool:
        """Another server has answered the request that failed here; True if that ejects it."""
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
        self.eject(now, jitter, because("failed_in_row", n=self.failures_in_row))
        return True

    def eject(self, now: float, jitter: float, reason: Reason) -> None:
        """Eject the server, for longer than the last time."""
        if not self.ejected:
            served_well = now - self._restored_at
            self.ejections = max(0, self.ejections - int(served_well / FORGET_AFTER))
        self.ejections += 1
        time = self.rules.time_out(self.ejections)
        self.ejected, self.trial, self.until = True, False, now + time * jitter
        self._gap = TRIAL_GAP
        self.reason = reason

    def hint(self) -> None:
        """Another router has ejected the server: one strike.

        It is never the last one, so that a router with a bad cable does not empty the fleet.
        """
        if self.failures_in_row + 1 < self.rules.failure_threshold:
            self.failures_in_row += 1

    def succeeded(self, now: float, *, trial: bool) -> bool:
        """A request was answered; True if that ends the ejection."""
        self.failures_in_row = self._repeats = 0
        if now >= self._half_until:
            self._next_half(now)
        self._good += 1
        if not (self.ejected and trial):
            return False
        self._restore(now)
        return True

    def start_trial(self, now: float) -> bool:
        """A request was leased; True if it is a trial."""
        self.trial = self.ejected
        if self.trial:
            self.next_trial_at = now + self._gap
            if now >= self.until:  # else it was sent by the panic rule
                self._gap = min(2 * self._gap, LONGEST_TRIAL_GAP)
        return self.trial

    def trial_ended(self) -> None:
        """The trial ended without a result (the client left): another may follow."""
        self.trial = False

    def restarted(self, now: float) -> None:
        """The server went down and came up: a new process with a clean record."""
        self.failures_in_row = self._repeats = 0
        self._restore(now)

    def _restore(self, now: float) -> None:
        self.ejected = self.trial = False
        self._restored_at = now
        self._forget_rate(now)
