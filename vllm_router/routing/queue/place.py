"""One request that waits for a server. Pure."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar


class Route(NamedTuple):
    """Where a request may go. Requests with equal routes can go, or cannot, at the same time.

    `servers` are all servers that may ever take it, whatever their state; `more` is everything
    else that its candidates depend on.
    """

    servers: frozenset[Hashable]
    more: Hashable = None


class Verdict(enum.Enum):
    """What came of the attempt to give a waiting request a server."""

    SERVED = enum.auto()
    """It has one: `Place.server`."""
    DISMISSED = enum.auto()
    """It waits no longer, without a server."""
    BLOCKED = enum.auto()
    """No server for it, nor for the rest of its pool."""
    HELD = enum.auto()
    """A server is for it, but another process has to take it."""


NOWHERE = Route(frozenset())


@dataclass(slots=True, eq=False)
class Place:
    """One request that waits. `until` is when it gives up; times in seconds.

    room: the model, as in `Room`.
    key: the name of the client's API key, or what stands for it.
    returning: a server has failed it, and it may not go there again.
    owner: the process that serves it.
    number: its stamp, given when it joins unless it has one.
    server, served_at: the server that it was given, and the stamp of that; 0 if none.
    """

    room: str | None
    priority: int
    key: Hashable
    since: float
    until: float
    returning: bool = False
    route: Route = NOWHERE
    owner: int = 0
    number: int = 0
    server: Hashable = None
    served_at: int = 0


P = TypeVar("P", bound=Place)


def append(queue: OrderedDict[P, None], place: P) -> None:
    """Add a place, nearly always the youngest; others come back or from another queue."""
    youngest = next(reversed(queue)) if queue else place
    oldest = next(iter(queue)) if queue else place
    queue[place] = None
    if place.number < oldest.number:
        queue.move_to_end(place, last=False)
    elif place.number < youngest.number:
        for one in sorted(queue, key=_number):
            queue.move_to_end(one)


def _number(place: Place) -> int:
    return place.number
