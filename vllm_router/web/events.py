"""Events of the feed. Pure: the wall clock is an argument."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter

from vllm_router.config.reload import Reloader
from vllm_router.errors import NO_VALUES, Problem
from vllm_router.fleet.reason import NONE, Reason
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State, Transition
from vllm_router.proxy.record import Record
from vllm_router.web.reasons import reason_fields
from vllm_router.web.schema import Event

KEPT = 100
"""Past events that a new client receives, in addition to events of single requests."""

KEPT_OF_REQUESTS = 20
"""Past events of single requests. They come in masses, and must not displace all others."""

FULL_PERIOD = 60
"""Seconds that are summed up in one event per full server.

A server at its limit is full and up again every second or two. These changes are no events.
"""

EXHAUSTED_PER_SECOND = 5
"""Failed-request events per second; further ones are combined into one event."""

ALIKE_PER_SECOND = 5
"""Equal changes of state per second that are events of their own; further ones are combined.
If more servers than this were full, there is one event for all of them.

A start or a lost switch changes hundreds of servers at once.
"""


class EventLog:
    """The last events, numbered; `announce` is called with each new one."""

    _OF_REQUESTS = "retries_exhausted"

    def __init__(self, announce: Callable[[Event], None], wall: Callable[[], float]) -> None:
        """`wall` returns Unix time."""
        self._last: deque[Event] = deque(maxlen=KEPT)
        self._last_of_requests: deque[Event] = deque(maxlen=KEPT_OF_REQUESTS)
        self._full: Counter[str] = Counter()
        self._alike: dict[tuple[State, State], list[Transition]] = {}
        self._seconds = 0
        self._announce = announce
        self._wall = wall
        self._count = 0
        self._exhausted = 0
        self._drained: set[Server] = set()
        self._refused = 0

    @property
    def last(self) -> list[Event]:
        """The events that are kept, oldest first."""
        return list(heapq.merge(self._last, self._last_of_requests, key=attrgetter("id")))

    def add(
        self,
        kind: str,
        text: str,
        *,
        server: str | None = None,
        old: str | None = None,
        new: str | None = None,
        reason: Reason = NONE,
        count: int | None = None,
        servers: Sequence[str] = (),
        code: str | None = None,
        values: Mapping[str, str] = NO_VALUES,
    ) -> None:
        """`code` and `values` are the text for translations, if its kind does not say it all."""
        self._count += 1
        time = round(self._wall(), 3)
        event = Event(
            id=self._count,
            time=time,
            kind=kind,
            text=text,
            text_code=code,
            text_values=dict(values),
            server=server,
            old=old,
            new=new,
            **reason_fields(reason),
            count=count,
            servers=list(servers),
        )
        kept = self._last_of_requests if kind == self._OF_REQUESTS else self._last
        kept.append(event)
        self._announce(event)

    def transition(self, change: Transition) -> None:
        if {change.old, change.new} == {State.UP, State.FULL}:
            if change.new == State.FULL:
                self._full[change.server] += 1
            return
        alike = self._alike.setdefault((change.old, change.new), [])
        alike.append(change)
        if len(alike) <= ALIKE_PER_SECOND:
            self._changed(change)

    def _changed(self, change: Transition) -> None:
        reason = f" ({change.reason.text})" if change.reason else ""
        text = f"{change.server}: {change.old} → {change.new}{reason}"
        self.add(
            "state",
            text,
            server=change.server,
            old=change.old,
            new=change.new,
            reason=change.reason,
        )

    def _changed_alike(self, old: State, new: State, changes: Sequence[Transition]) -> None:
        """The changes of a second after the first ones, as one event."""
        if len(changes) <= 1:
            for change in changes:
                self._changed(change)
            return
        names = list(dict.fromkeys(change.server for change in changes))
        self.add(
            "states",
            f"{len(names)} more servers: {old} → {new}",
            old=old,
            new=new,
            count=len(names),
            servers=names,
        )

    def exhausted(self, record: Record) -> None:
        """A request has failed on several servers. A series of them adds one event per second."""
        self._exhausted += 1
        if self._exhausted > EXHAUSTED_PER_SECOND:
            return
        last = record.server.name if record.server is not None else None
        request = record.request_id.decode("latin-1")
        why = record.code or record.status
        self.add(
            self._OF_REQUESTS,
            f"request {request}: {record.attempts} attempts failed, the last on {last}: {why}",
            server=last,
            code="request_failed",
            values={
                "request": request,
                "n": str(record.attempts),
                "server": last or "",
                "why": str(why),
            },
        )

    def second(self) -> None:
        """Called every second."""
        more = self._exhausted - EXHAUSTED_PER_SECOND
        if more > 0:
            text = f"and {more} more requests within a second"
            values = {"n": str(more)}
            self.add(self._OF_REQUESTS, text, code="requests_failed", values=values)
        self._exhausted = 0
        for (old, new), changes in self._alike.items():
            self._changed_alike(old, new, changes[ALIKE_PER_SECOND:])
        self._alike.clear()
        self._seconds += 1
        if self._seconds % FULL_PERIOD == 0:
            self._sum_up_full()

    def _sum_up_full(self) -> None:
        """Announce how often servers were full: an event per server, or one for many servers."""
        if len(self._full) > ALIKE_PER_SECOND:
            names, times = list(self._full), self._full.total()
            text = f"{len(names)} servers: full {_times(times)} in a minute"
            self.add("full", text, count=times, servers=names)
        else:
            for server, times in self._full.items():
                text = f"{server}: full {_times(times)} in a minute"
                self.add("full", text, server=server, count=times)
        self._full.clear()

    def look(self, servers: Collection[Server], reloader: Reloader | None) -> None:
        """Detect changes that are not announced by callbacks."""
        idle = {
            server
            for server in servers
            if server.draining and not server.in_flight and not server.elsewhere
        }
        for server in idle - self._drained:
            self.add(
                "drained", f"{server.name}: drained, no requests in flight", server=server.name
            )
        self._drained = idle
        if reloader is not None and reloader.refused_total != self._refused:
            self._refused = reloader.refused_total
            text = reloader.last_error or ""
            code, values = _refused(text.splitlines(), reloader.last_problem)
            self.add("reload_refused", text, code=code, values=values)


def _refused(problems: Sequence[str], first: Problem | None) -> tuple[str, dict[str, str]]:
    """Code and values of a refused file: its first problem, and how many more there are."""
    if first is None:
        code, values = "file_refused", {"problem": problems[0] if problems else ""}
    else:
        where, key, reason = first
        name = where.rpartition("/")[2]
        code, values = "key_refused", {"where": name, "key": key, "problem": reason}
    if len(problems) <= 1:
        return code, values
    return f"{code}_more", {**values, "n": str(len(problems) - 1)}


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def missed(count: int, wall: float) -> Event:
    """The event for a client that was too slow for `count` events."""
    text = f"{count} events were dropped because this client reads too slowly"
    return Event(id=0, time=round(wall, 3), kind="missed", text=text, count=count)
