"""Whether a server has fallen silent: requests wait on it, and none gets a token.

A paused engine (`POST /pause`), and one that hangs, answer `/health` with 200, send the head of
every stream at once, show no load, and let requests wait. What tells is that nobody has got
anything since: a client that leaves before its first byte is evidence, if no other request has had
output since it was sent. So is a load that stands still together with all counters; a load may also
be stuck above the truth after many aborts (vllm#29928), so that it is not believed either.

A silent server is asked when there is no other. Otherwise one request tries it after a time, and
the first output ends the silence. A trial that stays silent is taken to another server. Pure: time
is an argument, in seconds.
"""

from __future__ import annotations

LEFT_AFTER, LEFT_TIMES = 1.0, 3.0
"""A client is evidence that has waited for so many seconds, and so many times as long as the first
token of a stream takes on the server: others change their minds, as those that complete code."""

STILL_FOR = 10.0
"""Seconds for which counters must stand still while requests wait."""

TRIAL_PATIENCE = 1.0
"""Seconds that a trial may be silent before it goes elsewhere; twice what answers take, if more.
Any work of the engine that its counters show ends the silence sooner."""

LONGEST = 60.0
"""Seconds between two trials, at most."""


class Silence:
    """The suspicion against one server; `since` is None while there is none.

    `reason` is for people, `until` is when a trial is due, `trial` says that one is under way.
    """

    __slots__ = ("reason", "rounds", "since", "trial", "until")

    def __init__(self) -> None:
        self.since: float | None = None
        self.reason = ""
        self.until = 0.0
        self.rounds = 0
        self.trial = False

    def suspect(self, since: float, now: float, reason: str, hold: float) -> bool:
        """Nobody has had output since then; a trial is due in `hold` seconds, or more if an earlier
        one was silent. True if that is news."""
        if self.since is not None and now < self.until:
            return False
        self.rounds = self.rounds + 1 if self.since is not None else 1
        self.since = since if self.since is None else self.since
        self.reason, self.trial = reason, False
        self.until = now + min(hold * self.rounds, max(hold, LONGEST))
        return True

    def admits(self, now: float) -> bool:
        """Whether a request may be sent now: no suspicion, or a trial is due."""
        return self.since is None or (now >= self.until and not self.trial)

    def start_trial(self, now: float) -> bool:
        """A request has been leased; True if that makes it a trial."""
        if self.since is None or now < self.until:
            return False
        self.trial = True
        return True

    def clear(self) -> bool:
        """The server has given output; True if it was suspected."""
        was = self.since is not None
        self.since, self.rounds, self.trial, self.reason = None, 0, False, ""
        return was


class StandStill:
    """Since when a server's counters stand still although it has requests."""

    __slots__ = ("gauges", "since")

    def __init__(self) -> None:
        self.since: float | None = None
        self.gauges = (0.0, 0.0)

    def lasts(self, now: float, life: float, gauges: tuple[float, float], *, mine: bool) -> float:
        """For how long; called on every scrape of a server that has requests, `mine` if they are
        this router's. `life` is when it last showed any sign of work."""
        if self.since is None or life > self.since or (gauges != self.gauges and not mine):
            self.since, self.gauges = now, gauges
        return now - self.since

    def over(self) -> None:
        """It has no request, or does not tell."""
        self.since = None
