"""One request that waits for a server. Pure."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar


class Route(NamedTuple):
    """The servers that a request may use. Requests with equal routes are blocked together.

    `servers` are all servers that may ever take the request, in any state; `more` is everything
    else that its candidates depend on.
    """

    servers: frozenset[Hashable]
    more: Hashable = None


class OfferResult(enum.Enum):
    """The result of offering servers to a waiting request."""

    SERVED = enum.auto()
    """It was given `QueueEntry.server`."""
    DISMISSED = enum.auto()
    """It leaves the queue without a server."""
    BLOCKED = enum.auto()
    """No server is free for it, nor for the rest of its route."""
    HELD = enum.auto()
    """A server is free for it, but another process has to take it."""


NOWHERE = Route(frozenset())


@dataclass(slots=True, eq=False)
class QueueEntry:
    """One waiting request. Times in seconds.

    model: the model, as in `ModelQueue`.
    key: name of the client's API key, or a stand-in for it.
    since, until: when it began to wait, and when it gives up.
    returning: whether a server has failed it; it may not use that server again.
    owner: number of the process that serves it.
    number: its stamp (see `WaitingQueue.stamp`), set when it joins unless it has one.
    server, served_at: the server that it was given and the stamp of that; 0 for none.
    """

    model: str | None
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


E = TypeVar("E", bound=QueueEntry)


def insert(queue: OrderedDict[E, None], entry: E) -> None:
    """Insert an entry by its number. O(1) for the youngest and the oldest, else O(n log n)."""
    youngest = next(reversed(queue)) if queue else entry
    oldest = next(iter(queue)) if queue else entry
    queue[entry] = None
    if entry.number < oldest.number:
        queue.move_to_end(entry, last=False)
    elif entry.number < youngest.number:
        for one in sorted(queue, key=_number):
            queue.move_to_end(one)


def _number(entry: QueueEntry) -> int:
    return entry.number
