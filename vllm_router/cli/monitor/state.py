"""The state of the monitor. Pure: no terminal, no socket, no clock. `controls` has the keys."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from vllm_router.cli.monitor.actions import Overlay, Question
from vllm_router.cli.monitor.order import in_order
from vllm_router.cli.monitor.texts import ENGLISH, Texts
from vllm_router.cli.monitor.trend import Trend
from vllm_router.web.schema import VERSION, Event, FleetView, Hello, ServerView, Snapshot

HISTORY = 300
"""Seconds of each server's load history, one value per second."""

EVENTS = 200
OF_REQUESTS, KEPT_OF_REQUESTS = "retries_exhausted", 20
"""The kind of event about a single request, and how many of those events are kept at most."""

GAP = 3.5
"""Intervals, of a second at least, from which charts have a gap; a busy machine misses some."""

MOST_FILLED = 3600
"""Seconds of the charts that are filled at once: all that they show."""

STALE_SECONDS = 2.5
"""Seconds without a snapshot after which the figures are marked as old."""


@dataclass(slots=True)
class View:
    """All displayed state. `url` is the router's; times are Unix times.

    attached: the monitor belongs to the router that started it; leaving it stops the router.
    """

    url: str
    attached: bool = False
    models: bool = False
    hello: Hello | None = None
    snapshot: Snapshot | None = None
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENTS))
    trend: Trend = field(default_factory=Trend)
    loads: dict[str, deque[float | None]] = field(default_factory=dict)
    connected: bool = False
    trouble: str = ""
    """Why the connection is lost."""
    heard: float = 0.0
    """The arrival of the last snapshot, by this machine's clock."""
    sort: int = 0
    selected: str | None = None
    question: Question | None = None
    message: str = ""
    texts: Texts = ENGLISH
    overlay: Overlay | None = None
    scroll: int = 0
    """Lines of the overlay above the screen; below it for the log, which begins with its end."""
    explained: dict[str, Any] | None = None
    """The router's answer to `Explain`."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """The last requests, newest first, as `/decisions` has them."""
    requests_problem: str = ""
    log: list[str] = field(default_factory=list)
    hour: bool = False
    """Whether charts show the last hour instead of five minutes."""
    filter: str = ""
    typing: bool = False
    """Whether keys are typed into the filter."""
    _newest: int = 0
    _row_time: float = 0.0

    # -- what the router says -------------------------------------------------------------------

    def take(self, message: Hello | Snapshot | Event, now: float) -> None:
        """Apply a message of the feed. Raises ValueError if its schema is newer."""
        if isinstance(message, Hello):
            self._greet(message)
        elif isinstance(message, Snapshot):
            self._show(message, now)
        else:
            self._tell(message)

    def lost(self, why: str) -> None:
        """The connection is lost; the figures stay, and are marked as old."""
        self.connected = False
        self.trouble = why

    def unheard(self, hello: Hello) -> list[Event]:
        """The events of a hello that no message had before it."""
        same = self.hello is not None and hello.started == self.hello.started
        return [event for event in hello.events if not same or event.id > self._newest]

    def _greet(self, hello: Hello) -> None:
        if hello.schema > VERSION:
            version = hello.version
            raise ValueError(f"the router {version} is newer than this program")
        if self.hello is None or hello.started != self.hello.started:
            # The router has restarted, and numbers its events from one.
            self._newest = 0
        self.hello = hello
        history = hello.history
        self.trend.greet(hello)
        self.loads = {name: deque(values, HISTORY) for name, values in history.servers.items()}
        self._row_time = history.end
        for event in hello.events:
            self._tell(event)

    def _show(self, snapshot: Snapshot, now: float) -> None:
        if self.snapshot is not None and snapshot.time < self.snapshot.time - 1:
            # The router's clock was set back: no row would be due until it is where it was.
            self._row_time = min(self._row_time, snapshot.time - 1)
        self.snapshot = snapshot
        self.connected = True
        self.heard = now
        if snapshot.time - self._row_time >= 0.95:
            passed = snapshot.time - self._row_time if self._row_time else 1.0
            self._row_time = snapshot.time
            known = passed <= GAP * max(1.0, self._interval)
            if not known or self._interval > 1:
                self._fill(round(passed) - 1, snapshot, known=known)
            self.trend.add(snapshot.fleet)
            self.loads = {
                server.name: self.loads.get(server.name, deque(maxlen=HISTORY))
                for server in snapshot.servers
            }
            for server in snapshot.servers:
                self.loads[server.name].append(server.load)
        # If the server of the details was removed, they do not show another one.
        if self.chosen() is None and self.overlay is not Overlay.DETAILS:
            self.selected = next((server.name for server in self.servers()), None)

    def _fill(self, seconds: int, snapshot: Snapshot, *, known: bool) -> None:
        """Add the seconds before a snapshot that had none: alike, or empty if not `known`.

        So no line crosses the time in which the router, or this program, stood still.
        """
        loads = {server.name: server.load for server in snapshot.servers} if known else {}
        for _ in range(min(seconds, MOST_FILLED)):
            self.trend.add(snapshot.fleet if known else None)
        for name, values in self.loads.items():
            values.extend([loads.get(name)] * min(seconds, HISTORY))

    def _tell(self, event: Event) -> None:
        if event.id and event.id <= self._newest:
            return
        self._newest = max(self._newest, event.id)
        if event.kind == OF_REQUESTS:
            earlier = [one for one in self.events if one.kind == OF_REQUESTS]
            if len(earlier) >= KEPT_OF_REQUESTS:
                self.events.remove(earlier[0])
        self.events.append(event)

    # -- what is seen ---------------------------------------------------------------------------

    def servers(self) -> list[ServerView]:
        """The servers that match the filter, in the chosen order."""
        servers = list(self.snapshot.servers) if self.snapshot is not None else []
        if self.filter:
            servers = [server for server in servers if self._matches(server)]
        return in_order(servers, self.sort)

    def _matches(self, server: ServerView) -> bool:
        texts = (server.name, server.url, server.state, *(server.models or ()))
        return any(self.filter.lower() in text.lower() for text in texts)

    @property
    def fleet(self) -> FleetView | None:
        return self.snapshot.fleet if self.snapshot is not None else None

    def chosen(self) -> ServerView | None:
        """The selected server."""
        for server in self.snapshot.servers if self.snapshot is not None else ():
            if server.name == self.selected:
                return server
        return None

    def stale(self, now: float) -> bool:
        """True if the figures are old."""
        return not self.connected or now - self.heard > max(STALE_SECONDS, 4 * self._interval)

    @property
    def _interval(self) -> float:
        """Seconds between two snapshots."""
        return self.hello.config.feed_interval if self.hello is not None else 0.5

    # -- what the user chooses ------------------------------------------------------------------

    def show(self, overlay: Overlay) -> None:
        """Show something instead of the fleet, from its beginning."""
        self.overlay, self.scroll = overlay, 0

    def set_filter(self, text: str) -> None:
        """List only the servers with this text; empty for all of them."""
        self.filter = text
        names = [server.name for server in self.servers()]
        if self.selected not in names and names:
            self.selected = names[0]
