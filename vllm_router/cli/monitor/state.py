"""The state of the monitor, and the effect of keys. Pure: no terminal, no socket, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_router.cli.monitor.trend import Trend
from vllm_router.web.schema import VERSION, Event, FleetView, Hello, ServerView, Snapshot

HISTORY = 300
"""Seconds of each server's load history, one value per second."""

EVENTS = 200
PAGE = 10
STALE_SECONDS = 2.5
"""Seconds without a snapshot after which the figures are marked as old."""

_BADNESS = (
    "down",
    "ejected",
    "silent",
    "asleep",
    "paused",
    "unknown",
    "draining",
    "refusing",
    "full",
    "up",
)

SortKey = Callable[[ServerView], tuple[float, str]]

SORTS: Sequence[tuple[str, SortKey | None]] = (
    ("order", None),
    ("load", lambda server: (-server.load, server.name)),
    ("state", lambda server: (_badness(server.state), server.name)),
    ("name", lambda server: (0.0, server.name)),
    ("requests", lambda server: (-server.requests_per_s, server.name)),
    ("ttft", lambda server: (-server.ttft.p95 if server.ttft else 1.0, server.name)),
)
"""The sort orders of key `s`; the first is the order of the configuration."""


def _badness(state: str) -> float:
    return _BADNESS.index(state) if state in _BADNESS else len(_BADNESS)


@dataclass(frozen=True, slots=True)
class Quit:
    """Leave the monitor."""


@dataclass(frozen=True, slots=True)
class SetDrain:
    """Drain a server, or take it back."""

    server: str
    on: bool


@dataclass(frozen=True, slots=True)
class Explain:
    """Ask the router where a request for the model would go; None asks for any model."""

    model: str | None


Action = Quit | SetDrain | Explain


@dataclass(frozen=True, slots=True)
class Question:
    """A question at the bottom of the screen: `y` performs `action`, other keys cancel."""

    text: str
    action: Action


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
    help: bool = False
    details: bool = False
    """Whether the selected server is shown alone."""
    explained: dict[str, Any] | None = None
    """The router's answer to `Explain`, while it is shown."""
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

    def _greet(self, hello: Hello) -> None:
        if hello.schema > VERSION:
            raise ValueError(f"the router {hello.version} is newer than this program")
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
        self.snapshot = snapshot
        self.connected = True
        self.heard = now
        if snapshot.time - self._row_time >= 0.95:
            self._row_time = snapshot.time
            self.trend.add(snapshot.fleet)
            self.loads = {
                server.name: self.loads.get(server.name, deque(maxlen=HISTORY))
                for server in snapshot.servers
            }
            for server in snapshot.servers:
                self.loads[server.name].append(server.load)
        names = [server.name for server in snapshot.servers]
        if self.selected not in names:
            self.selected = names[0] if names else None

    def _tell(self, event: Event) -> None:
        if event.id and event.id <= self._newest:
            return
        self._newest = max(self._newest, event.id)
        self.events.append(event)

    # -- what is seen ---------------------------------------------------------------------------

    def servers(self) -> list[ServerView]:
        """The servers that match the filter, in the chosen order."""
        servers = list(self.snapshot.servers) if self.snapshot is not None else []
        if self.filter:
            servers = [server for server in servers if self._matches(server)]
        key = SORTS[self.sort][1]
        return sorted(servers, key=key) if key is not None else servers

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
        interval = self.hello.config.feed_interval if self.hello is not None else 0.5
        return not self.connected or now - self.heard > max(STALE_SECONDS, 4 * interval)

    # -- keys -----------------------------------------------------------------------------------

    def key(self, key: str) -> Action | None:
        """The action of a key, if it does more than change the display."""
        self.message = ""
        if key == "ctrl-c":
            return Quit()
        if self.question is not None:
            question, self.question = self.question, None
            return question.action if key in ("y", "Y") else None
        if self.help or self.details or self.explained is not None:
            self.help, self.details, self.explained = False, False, None
            return None
        if self.typing:
            self._type(key)
            return None
        if key in ("q", "Q"):
            return self._leave()
        if key == "e":
            server = self.chosen()
            return Explain(server.models[0] if server is not None and server.models else None)
        if key in ("d", "u"):
            self._ask_drain(on=key == "d")
        elif key == "/":
            self.typing = True
        elif key == "escape":
            self._filter("")
        elif key == "enter":
            self.details = self.chosen() is not None
        elif key == "r":
            self.hour = not self.hour
        elif key == "s":
            self.sort = (self.sort + 1) % len(SORTS)
        elif key == "S":
            self.sort = (self.sort - 1) % len(SORTS)
        elif key == "m":
            self.models = not self.models
        elif key in ("?", "h"):
            self.help = True
        else:
            self._move(key)
        return None

    def _type(self, key: str) -> None:
        """A key of the filter: enter keeps it, escape drops it."""
        if key in ("enter", "escape"):
            self.typing = False
        if key == "escape":
            self._filter("")
        elif key == "backspace":
            self._filter(self.filter[:-1])
        elif len(key) == 1:
            self._filter(self.filter + key)
        else:
            self._move(key)

    def _filter(self, text: str) -> None:
        self.filter = text
        names = [server.name for server in self.servers()]
        if self.selected not in names and names:
            self.selected = names[0]

    def _leave(self) -> Action | None:
        if not self.attached:
            return Quit()
        streams = self.snapshot.router.open_streams if self.snapshot is not None else 0
        self.question = Question(f"Stop the router? {_in_flight(streams)}", Quit())
        return None

    def _ask_drain(self, *, on: bool) -> None:
        server = self.chosen()
        if server is None:
            return
        if self.hello is not None and not self.hello.admin:
            self.message = "To drain: on the router's own machine as its user, or with --key."
        elif not self.connected:
            self.message = "There is no connection to the router."
        elif on == (server.state == "draining"):
            already = "is draining already" if on else "is not draining"
            self.message = f"{server.name} {already}."
        elif on:
            text = f"Drain {server.name}? {_in_flight(server.leases)}"
            self.question = Question(text, SetDrain(server.name, on=True))
        else:
            self.question = Question(f"Take {server.name} back?", SetDrain(server.name, on=False))

    def _move(self, key: str) -> None:
        names = [server.name for server in self.servers()]
        if not names:
            return
        at = names.index(self.selected) if self.selected in names else 0
        steps = {"up": -1, "k": -1, "down": 1, "j": 1, "page-up": -PAGE, "page-down": PAGE}
        ends = {"home": 0, "g": 0, "end": len(names) - 1, "G": len(names) - 1}
        at = ends.get(key, at + steps.get(key, 0))
        self.selected = names[min(max(at, 0), len(names) - 1)]


def _in_flight(number: int) -> str:
    if number == 0:
        return "Nothing is in flight."
    return f"{number} in flight may finish."
