"""How often the probes ask each server: often where it matters, seldom where nothing happens.

A server matters while it has requests, of this router or of others, or its health is in doubt. The
other servers are idle. Together they are asked for each page (`/health`, `/metrics`, `/v1/models`)
at most `idle_probes_per_second` times a second, so their intervals grow with their number, and not
at all in a small fleet. Servers that went down or came back a short time ago are a group of their
own with the same rate: a few are followed closely, a thousand are not. An idle server that gets a
request is asked at once. Pure: time is an argument, in seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_router.config.schema import Settings
from vllm_router.fleet.server import Server

SETTLES_IN = 60.0
"""Seconds for which a server that went down or came back belongs to the group of such servers."""

LONGEST = 30.0
"""Maximum seconds between two questions to an idle server, unless its interval is longer anyway."""


def matters(server: Server) -> bool:
    """Whether the figures and the health of the server must be fresh.

    Requests of others show in its gauges: requests that this router has not sent.
    """
    health, load = server.active_health, server.load_estimate
    return (
        server.in_flight > 0
        or load.running + load.waiting > 0.0
        or health.up is None
        or not health.settled
        or server.passive_health.ejected
        or server.silence.since is not None
        or server.paused_at is not None
        or bool(server.refusals.known)
    )


def changed_recently(server: Server, now: float) -> bool:
    """Whether the server has gone down or come back within SETTLES_IN."""
    return now - max(server.went_down_at, server.recovered_at) < SETTLES_IN


Group = dict[Server, Callable[[], None]]
"""Servers with the functions that wake their probes."""


class ProbePace:
    """The intervals of the probes of one fleet.

    At most `idle_probes_per_second` idle servers are asked at once each second because they have
    got a request. Beyond that, a server is asked when its request has lasted `metrics_interval`:
    thousands of short requests a second on a thousand servers need no thousands of scrapes.
    """

    def __init__(self) -> None:
        self._idle: Group = {}
        self._changed: Group = {}
        """Idle servers as well, but ones that have gone down or come back recently."""
        self._postponed: dict[Server, tuple[float, Callable[[], None]]] = {}
        self._rate = 1.0
        self._patience = 0.0
        self._allowed = 0.0
        self._counted_at = 0.0

    def is_idle(self, server: Server) -> bool:
        """Whether the server did not matter when it was asked last, and has no request since."""
        return server in self._idle or server in self._changed

    def interval(self, server: Server, usual: float) -> float:
        """Seconds between two questions for a page that is usually read every `usual` seconds."""
        if server in self._idle:
            return max(usual, min(len(self._idle) / self._rate, LONGEST))
        if server in self._changed:
            return max(usual, min(len(self._changed) / self._rate, LONGEST))
        return usual

    def scraped(
        self, server: Server, settings: Settings, now: float, wake: Callable[[], None]
    ) -> float:
        """Decide again whether the server matters; returns the interval to its next scrape.

        Call after each scrape, successful or not. `wake` is called once if the idle server gets a
        request and must be asked now.
        """
        self._rate = settings.idle_probes_per_second
        self._patience = usual = settings.metrics_interval
        self._postponed.pop(server, None)
        matter = matters(server)
        changed = not matter and changed_recently(server, now)
        for group, belongs in ((self._idle, not matter and not changed), (self._changed, changed)):
            if belongs:
                group[server] = wake
            else:
                group.pop(server, None)
        interval = self.interval(server, usual)
        server.on_chosen = self.chosen if interval > usual else None
        server.load_estimate.expect_scrapes(interval)
        self._wake_postponed(now)
        return interval

    def chosen(self, server: Server, now: float) -> None:
        """An idle server has got a request."""
        server.on_chosen = None
        wake = self._idle.pop(server, None) or self._changed.pop(server, None)
        if wake is None:
            return
        earned = (now - self._counted_at) * self._rate
        self._allowed = min(self._allowed + max(0.0, earned), self._rate)
        self._counted_at = now
        if self._allowed >= 1.0:
            self._allowed -= 1.0
            wake()
        else:
            self._postponed[server] = (now + self._patience, wake)

    def _wake_postponed(self, now: float) -> None:
        """Wake the probes of the servers whose requests have lasted; the others are idle again.

        Wherever intervals are stretched, a scrape of some server ends every few milliseconds.
        """
        while self._postponed:
            server = next(iter(self._postponed))
            due, wake = self._postponed[server]
            if due > now:
                return
            del self._postponed[server]
            if server.in_flight:
                wake()
            else:
                self._idle[server] = wake
                server.on_chosen = self.chosen

    def forget(self, server: Server) -> None:
        """The server is not probed any more."""
        server.on_chosen = None
        self._idle.pop(server, None)
        self._changed.pop(server, None)
        self._postponed.pop(server, None)
