"""How often the probes ask each server: often where it matters, seldom where nothing happens.

A server matters while it has requests, of this router or of others, or its health is in doubt. The
other servers are idle. Together they are asked for each page (`/health`, `/metrics`, `/v1/models`)
at most `idle_probes_per_second` times a second, so their intervals grow with their number, and not
at all in a small fleet. Servers that went down or came back a short time ago are a group of their
own with the same rate: a few are followed closely, a thousand are not. An idle server that gets a
request is asked after the usual interval, if the request still runs then: thousands of short
requests a second on a thousand servers need no scrapes, and what the router has sent it knows.

Up to `busy_servers_at_full_rate` servers that matter are asked at the usual intervals. If more
matter, their intervals grow, so that all together are asked as often as so many. Servers whose
figures the router cannot predict from its own requests, or whose health is in doubt, have half of
these places, so a few of them are asked as usual among a thousand others. Between two scrapes the
router corrects the figures by its own requests. Pure: time is an argument, in seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_router.config.schema import Settings
from vllm_router.fleet.server import Server

SETTLES_IN = 60.0
"""Seconds for which a server that went down or came back belongs to the group of such servers."""

LONGEST = 30.0
"""Maximum seconds between two questions to a server, unless its usual interval is longer."""

LAGGING = 1.0
"""Requests that the gauges of a server may show although they have just ended."""

DOUBTFUL_SHARE = 0.5
"""Least share of the places at full rate for doubtful servers, as far as they need them."""


def matters(server: Server) -> bool:
    """Whether the figures and the health of the server must be fresh.

    Requests of others show in its gauges: requests that this router has not sent.
    """
    load = server.load_estimate
    return server.in_flight > 0 or load.running + load.waiting > 0.0 or _health_is_in_doubt(server)


def is_doubtful(server: Server) -> bool:
    """Whether the next figures of a server that matters cannot be predicted from our requests.

    Requests wait in the engine, others send requests as well, or the health is in doubt.
    """
    load = server.load_estimate
    return (
        load.waiting > 0.0
        or load.running > server.in_flight + LAGGING
        or _health_is_in_doubt(server)
    )


def _health_is_in_doubt(server: Server) -> bool:
    health = server.active_health
    return (
        health.up is None
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
    """The intervals of the probes of one fleet."""

    def __init__(self) -> None:
        self._idle: Group = {}
        self._changed: Group = {}
        """Idle servers as well, but ones that have gone down or come back recently."""
        self._busy: Group = {}
        """Servers that matter, except doubtful ones."""
        self._doubtful: Group = {}
        self._full_rate = 1
        self._chosen: dict[Server, tuple[float, Callable[[], None]]] = {}
        """Servers that were idle and have got a request, with the times when they are asked."""
        self._rate = 1.0
        self._usual = 0.0
        self._allowed = 0.0
        self._counted_at = 0.0

    def is_idle(self, server: Server) -> bool:
        """Whether the server did not matter when it was asked last, and has no request since."""
        return server in self._idle or server in self._changed

    def is_predicted(self, server: Server) -> bool:
        """Whether it is asked more seldom than usual because its figures were predictable."""
        if server in self._busy:
            return self._stretch(server) > 1.0
        return self.is_idle(server)

    def interval(self, server: Server, usual: float) -> float:
        """Seconds between two questions for a page that is usually read every `usual` seconds."""
        if server in self._idle:
            return max(usual, min(len(self._idle) / self._rate, LONGEST))
        if server in self._changed:
            return max(usual, min(len(self._changed) / self._rate, LONGEST))
        if len(self._busy) + len(self._doubtful) <= self._full_rate:
            return usual
        return max(usual, min(usual * self._stretch(server), LONGEST))

    def _stretch(self, server: Server) -> float:
        """How many times as long as usual the intervals of a server that matters are."""
        busy, doubtful = len(self._busy), len(self._doubtful)
        places = max(self._full_rate * DOUBTFUL_SHARE, self._full_rate - busy)
        if server in self._doubtful:
            return max(1.0, doubtful / places)
        left = self._full_rate - min(places, doubtful)
        return max(1.0, busy / left) if busy else 1.0

    def scraped(
        self,
        server: Server,
        settings: Settings,
        now: float,
        wake: Callable[[], None],
        *,
        spared: bool = False,
    ) -> float:
        """Decide again whether the server matters; returns the interval to its next scrape.

        Call after each scrape, successful or not, or when one was due that another router does
        (`spared`): it takes no place of the servers that matter. `wake` is called once if the
        server was idle and has a request, or fails one, and must be asked now.
        """
        self._rate = settings.idle_probes_per_second
        self._full_rate = settings.busy_servers_at_full_rate
        self._usual = usual = settings.metrics_interval
        self._chosen.pop(server, None)
        matter = matters(server)
        changed = not matter and changed_recently(server, now)
        doubtful = matter and is_doubtful(server)
        for group, belongs in (
            (self._idle, not matter and not changed),
            (self._changed, changed),
            (self._busy, matter and not doubtful and not spared),
            (self._doubtful, doubtful and not spared),
        ):
            if belongs:
                group[server] = wake
            else:
                group.pop(server, None)
        interval = self.interval(server, usual)
        server.on_chosen = self.chosen if interval > usual and not matter else None
        server.load_estimate.expect_scrapes(interval)
        self._wake_chosen(now)
        return interval

    def chosen(self, server: Server, now: float) -> None:
        """An idle server has got a request."""
        server.on_chosen = None
        wake = self._idle.pop(server, None) or self._changed.pop(server, None)
        if wake is not None:
            self._chosen[server] = (now + self._usual, wake)

    def failed(self, server: Server, now: float) -> None:
        """A request has failed on the server: ask it now, if it is asked seldom."""
        if server in self._chosen:
            _, wake = self._chosen[server]
        elif self._stretch(server) > 1.0 and (server in self._busy or server in self._doubtful):
            wake = self._busy.get(server) or self._doubtful[server]
        else:
            return
        if self._may_wake(now):
            wake()

    def _may_wake(self, now: float) -> bool:
        """Whether another server may be asked outside of its interval; counts it if so."""
        earned = (now - self._counted_at) * self._rate
        self._allowed = min(self._allowed + max(0.0, earned), self._rate)
        self._counted_at = now
        if self._allowed < 1.0:
            return False
        self._allowed -= 1.0
        return True

    def _wake_chosen(self, now: float) -> None:
        """Wake the probes of the servers whose requests have lasted; the others are idle again.

        Wherever intervals are stretched, a scrape of some server ends every few milliseconds.
        """
        while self._chosen:
            server = next(iter(self._chosen))
            due, wake = self._chosen[server]
            if due > now:
                return
            del self._chosen[server]
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
        self._busy.pop(server, None)
        self._doubtful.pop(server, None)
        self._chosen.pop(server, None)
