"""The state of the monitor, and the effect of keys. Pure: no terminal, no socket, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_router.cli.monitor.actions import (
    Action,
    Explain,
    Overlay,
    Question,
    Quit,
    ReloadFile,
    SetDrain,
    Suspend,
)
from vllm_router.cli.monitor.texts import ENGLISH, Texts
from vllm_router.cli.monitor.trend import Trend
from vllm_router.web.schema import VERSION, Event, FleetView, Hello, ServerView, Snapshot

HISTORY = 300
"""Seconds of each server's load history, one value per second."""

EVENTS = 200
OF_REQUESTS, KEPT_OF_REQUESTS = "retries_exhausted", 20
"""The kind of event about a single request, and how many of those events are kept at most."""

PAGE = 10
WHEEL = 3
"""Lines of one step of the mouse's wheel."""

MOST_LINES = 100_000
"""More lines than anything shown has."""

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
    ("sort_order", None),
    ("sort_load", lambda server: (-server.load, server.name)),
    ("sort_state", lambda server: (_badness(server.state), server.name)),
    ("sort_name", lambda server: (0.0, server.name)),
    ("sort_requests", lambda server: (-server.requests_per_s, server.name)),
    ("sort_ttft", lambda server: (-server.ttft.p95 if server.ttft else 1.0, server.name)),
)
"""The sort orders of key `s`, by a key of the texts; the first is the configuration's order."""


_STEPS = {
    "up": -1,
    "k": -1,
    "wheel-up": -WHEEL,
    "page-up": -PAGE,
    "down": 1,
    "j": 1,
    "wheel-down": WHEEL,
    "page-down": PAGE,
}
"""Lines by which a key moves."""


def _badness(state: str) -> float:
    return _BADNESS.index(state) if state in _BADNESS else len(_BADNESS)


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
        if key == "ctrl-z":
            return self._suspend()
        if self.question is not None:
            question, self.question = self.question, None
            return question.action if key in ("y", "Y") else None
        if self.overlay is not None:
            self._overlaid(key)
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
        elif key == "R":
            self._ask_reload()
        elif key == "/":
            self.typing = True
        elif key == "escape":
            self._filter("")
        elif key == "r":
            self.hour = not self.hour
        elif key in ("s", "S"):
            self.sort = (self.sort + (1 if key == "s" else -1)) % len(SORTS)
        elif key == "m":
            self.models = not self.models
        elif not self._open(key):
            self._move(key)
        return None

    def click(self, server: str | None) -> None:
        """A click: on the line of a server, or elsewhere. It selects; a second one shows more."""
        self.message = ""
        if self.question is not None:
            self.question = None
        elif self.overlay is not None:
            self.overlay = None
        elif server is not None and server == self.selected:
            self.show(Overlay.DETAILS)
        elif server is not None:
            self.selected = server

    def show(self, overlay: Overlay) -> None:
        """Show something instead of the fleet, from its beginning."""
        self.overlay, self.scroll = overlay, 0

    def _open(self, key: str) -> bool:
        """Open what the key shows; False if it shows nothing."""
        if key == "enter" and self.chosen() is not None:
            self.show(Overlay.DETAILS)
        elif key == "t":
            self.show(Overlay.REQUESTS)
        elif key == "l" and self.attached:
            self.show(Overlay.LOG)
        elif key == "l":
            self.message = self.texts("log_elsewhere")
        elif key in ("?", "h"):
            self.show(Overlay.HELP)
        else:
            return False
        return True

    def _overlaid(self, key: str) -> None:
        """A key while the fleet is hidden: it scrolls or goes back."""
        steps = {**_STEPS, "home": -MOST_LINES, "g": -MOST_LINES, "end": MOST_LINES}
        step = steps.get(key, MOST_LINES if key == "G" else 0)
        if not step:
            self.overlay = None
        elif self.overlay is Overlay.LOG:
            self.scroll = max(0, self.scroll - step)
        else:
            self.scroll = max(0, self.scroll + step)

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
        self.question = Question(self.texts("ask_stop", more=self._in_flight(streams)), Quit())
        return None

    def _suspend(self) -> Action | None:
        if not self.attached:
            return Suspend()
        self.message = self.texts("no_suspend")
        return None

    def _may_change(self) -> bool:
        """Whether this client may administrate the router; says why not."""
        if self.hello is not None and not self.hello.admin:
            self.message = self.texts("not_admin")
        elif not self.connected:
            self.message = self.texts("not_connected")
        return not self.message

    def _ask_drain(self, *, on: bool) -> None:
        server = self.chosen()
        if server is None or not self._may_change():
            return
        if on == (server.state == "draining"):
            key = "already_draining" if on else "not_draining"
            self.message = self.texts(key, server=server.name)
        elif on:
            more = self._in_flight(server.leases)
            text = self.texts("ask_drain", server=server.name, more=more)
            self.question = Question(text, SetDrain(server.name, on=True))
        else:
            text = self.texts("ask_undrain", server=server.name)
            self.question = Question(text, SetDrain(server.name, on=False))

    def _ask_reload(self) -> None:
        if self.snapshot is None or not self._may_change():
            return
        file = self.snapshot.router.reload.source
        if file is None:
            self.message = self.texts("no_file")
        else:
            self.question = Question(self.texts("ask_reload", file=file), ReloadFile())

    def _in_flight(self, number: int) -> str:
        return self.texts("some_in_flight" if number else "none_in_flight", n=number)

    def _move(self, key: str) -> None:
        names = [server.name for server in self.servers()]
        if not names:
            return
        at = names.index(self.selected) if self.selected in names else 0
        ends = {"home": 0, "g": 0, "end": len(names) - 1, "G": len(names) - 1}
        at = ends.get(key, at + _STEPS.get(key, 0))
        self.selected = names[min(max(at, 0), len(names) - 1)]
