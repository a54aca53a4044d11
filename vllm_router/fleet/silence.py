"""Suspicion that a server has fallen silent: requests wait on it, and none gets a token.

A paused engine (`POST /pause`), and one that hangs, answers `/health` with 200, sends the head of
every stream at once, shows no load, and lets requests wait. The evidence is that no request has
had output since a given time: a client that leaves before its first byte counts, if no other
request has had output since it was sent; so does a load that stands still together with all
counters. A load may also be stuck above the truth after many aborts (vllm#29928).

A silent server gets requests only if there is no other. After a time one trial request is sent;
the first output ends the suspicion, and a trial that stays silent moves to another server. Pure:
time is an argument, in seconds.
"""

from __future__ import annotations

from vllm_router.fleet.reason import NONE, Reason

LEFT_AFTER, LEFT_TIMES = 1.0, 3.0
"""A client that leaves is evidence after so many seconds, and so many times the usual time to the
first token: clients that complete code often cancel earlier."""

STILL_FOR = 10.0
"""Seconds for which counters must stand still while requests wait."""

TRIAL_PATIENCE = 1.0
"""Seconds that a trial may be silent before it moves; or twice the usual response time, if longer.
Any work that the engine's counters show ends the suspicion earlier."""

LONGEST = 60.0
"""Maximum seconds between two trials."""


class Silence:
    """The suspicion against one server.

    since: start of the silence; None without a suspicion.
    reason: the evidence, for displays.
    until: when a trial is due.
    trial: whether a trial is running.
    """

    __slots__ = ("reason", "rounds", "since", "trial", "until")

    def __init__(self) -> None:
        self.since: float | None = None
        self.reason = NONE
        self.until = 0.0
        self.rounds = 0
        self.trial = False

    def suspect(self, since: float, now: float, reason: Reason, hold: float) -> bool:
        """No request has had output since `since`; True if the suspicion is new or renewed.

        A trial is due in `hold` seconds, and later after each silent trial.
        """
        if self.since is not None and now < self.until:
            return False
        self.rounds += 1
        self.since = since if self.since is None else self.since
        self.reason, self.trial = reason, False
        self.until = now + min(hold * self.rounds, max(hold, LONGEST))
        return True

    def admits(self, now: float) -> bool:
        """Whether a request may be sent now: no suspicion, or a trial is due."""
        return self.since is None or (now >= self.until and not self.trial)

    def start_trial(self, now: float) -> bool:
        """A request was leased; True if it is a trial."""
        if self.since is None or now < self.until:
            return False
        self.trial = True
        return True

    def clear(self) -> bool:
        """The server has given output; True if it was suspected."""
        was = self.since is not None
        self.since, self.rounds, self.trial, self.reason = None, 0, False, NONE
        return was


class StandStill:
    """How long a server's counters have stood still although it has requests."""

    __slots__ = ("gauges", "since")

    def __init__(self) -> None:
        self.since: float | None = None
        self.gauges = (0.0, 0.0)

    def lasts(self, now: float, life: float, gauges: tuple[float, float], *, own: bool) -> float:
        """Seconds of the stand-still. Call on every scrape of a server that has requests.

        `life` is the time of its last sign of work, `own` whether requests of this router run.
        """
        if self.since is None or life > self.since or (gauges != self.gauges and not own):
            self.since, self.gauges = now, gauges
        return now - self.since

    def reset(self) -> None:
        """The server has no request, or exports no counters."""
        self.since = None
