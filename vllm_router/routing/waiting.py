"""Who waits for a server, and whose turn it is when one is free. Pure.

There is a room for each model. In it a lower priority goes first, as in vLLM; among equals the
clients' keys take turns, and each key's requests go in the order in which they came. Between two
rooms whose first requests are equal, the one that came earlier goes first.

Requests that had a server already, which failed them, go before their equals.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

RATE_OVER = 32
"""Freed servers over which the drain rate is measured."""

RATE_FROM = 4
"""So many are needed before it says anything."""

MARGIN = 1.1
"""Whoever is predicted to make it only just is as likely as not to be cut at the end, after a
server has done the work."""

ANY_UNKNOWN = ""
"""The room of all models that nobody lists: clients invent names, and rooms must be bounded."""


@dataclass(slots=True, eq=False)
class Place:
    """One request that waits. `until` is when it gives up; times in seconds.

    `returning`: a server has failed it, and it may not go there again.
    """

    room: str | None
    priority: int
    key: str
    since: float
    until: float
    returning: bool = False
    given_up: bool = False
    """It was let go without a server, so that none has become free, and its key's turn is left."""
    number: int = 0
    """The order in which all of them came, given when it joins."""


P = TypeVar("P", bound=Place)


class DrainRate:
    """How many servers become free per second, measured while somebody waits for one.

    The time in which nobody does, or there is no server at all, is left out: a fleet with little
    to do is not a slow one.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._running_since: float | None = None
        self._marks = deque([0.0], maxlen=RATE_OVER + 1)

    @property
    def running(self) -> bool:
        return self._running_since is not None

    def begin(self, now: float) -> None:
        """All servers are busy. Any number of times."""
        if self._running_since is None:
            self._running_since = now

    def end(self, now: float) -> None:
        """One is free and nobody wants it, or all are gone. Any number of times."""
        self._clock, self._running_since = self._time(now), None

    def freed(self, now: float) -> None:
        """A server has become free; one that comes back says nothing of the rate."""
        if self.running:
            self._marks.append(self._time(now))

    def _time(self, now: float) -> float:
        since = self._running_since
        return self._clock + (now - since if since is not None else 0.0)

    def per_second(self, now: float) -> float | None:
        """None as long as it cannot be told."""
        freed = len(self._marks) - 1
        elapsed = self._time(now) - self._marks[0]
        return freed / elapsed if freed >= RATE_FROM and elapsed > 0.0 else None


class Quickest:
    """The least time in which an answer was complete, of the last ones: whoever has less left
    cannot make it. What is slower on average may still be quick, so nobody is given up by a mean.
    """

    def __init__(self) -> None:
        self._took: deque[float] = deque(maxlen=RATE_OVER)

    def add(self, seconds: float) -> None:
        self._took.append(seconds)

    @property
    def seconds(self) -> float:
        """With a margin; 0 as long as it cannot be told."""
        return MARGIN * min(self._took) if len(self._took) >= RATE_FROM else 0.0


class _Line(Generic[P]):
    """Those of one priority. No empty queue is kept."""

    __slots__ = ("_by_key", "_returning")

    def __init__(self) -> None:
        self._returning: OrderedDict[P, None] = OrderedDict()
        self._by_key: OrderedDict[str, OrderedDict[P, None]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._returning or self._by_key)

    def add(self, place: P) -> None:
        if place.returning:
            self._returning[place] = None
        else:
            self._by_key.setdefault(place.key, OrderedDict())[place] = None

    def remove(self, place: P) -> None:
        if place.returning:
            del self._returning[place]
            return
        queue = self._by_key[place.key]
        del queue[place]
        if not queue:
            del self._by_key[place.key]

    def turn_over(self, place: P) -> None:
        """It has been served: the other keys are next."""
        self.remove(place)
        if not place.returning and place.key in self._by_key:
            self._by_key.move_to_end(place.key)

    def fronts(self) -> Iterator[P]:
        """Everybody who may be next: those who return, and the first of the others."""
        yield from self._returning
        for queue in self._by_key.values():
            yield next(iter(queue))
            return

    def before(self, key: str) -> int:
        """How many of them would go before one more of this key."""
        mine = len(self._by_key.get(key, ()))
        others = (min(len(queue), mine + 1) for name, queue in self._by_key.items() if name != key)
        return len(self._returning) + mine + sum(others)

    def __len__(self) -> int:
        return len(self._returning) + sum(map(len, self._by_key.values()))

    def __iter__(self) -> Iterator[P]:
        yield from self._returning
        for queue in self._by_key.values():
            yield from queue


class Room(Generic[P]):
    """Those who wait for one model."""

    def __init__(self, model: str | None) -> None:
        self.model = model
        self.rate = DrainRate()
        self.quickest = Quickest()
        self._size = 0
        self._lines: dict[int, _Line[P]] = {}
        self._priorities: list[int] = []

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[P]:
        for line in self._lines.values():
            yield from line

    def add(self, place: P) -> None:
        line = self._lines.get(place.priority)
        if line is None:
            line = self._lines[place.priority] = _Line()
            insort(self._priorities, place.priority)
        line.add(place)
        self._size += 1

    def remove(self, place: P, *, served: bool) -> None:
        line = self._lines[place.priority]
        if served:
            line.turn_over(place)
        else:
            line.remove(place)
        if not line:
            del self._lines[place.priority]
            self._priorities.remove(place.priority)
        self._size -= 1

    def fronts(self) -> Iterator[P]:
        """Everybody who may be next, the first one first. Nothing may change meanwhile."""
        for priority in self._priorities:
            yield from self._lines[priority].fronts()

    def before(self, priority: int, key: str) -> int:
        """How many would go before one more of this priority and key, if nobody came later."""
        found = 0
        for level in self._priorities:
            if level < priority:
                found += len(self._lines[level])
            elif level == priority:
                found += self._lines[level].before(key)
        return found

    @property
    def oldest(self) -> float | None:
        """Since when the one waits who has waited longest."""
        return min((place.since for place in self), default=None)


class WaitingRooms(Generic[P]):
    """All rooms. Whoever joins is handed out by `admit` once, or leaves."""

    def __init__(self) -> None:
        self.rooms: dict[str | None, Room[P]] = {}
        self._joined = 0

    def __len__(self) -> int:
        return sum(map(len, self.rooms.values()))

    def room(self, model: str | None) -> Room[P]:
        room = self.rooms.get(model)
        if room is None:
            room = self.rooms[model] = Room(model)
        return room

    def join(self, place: P) -> None:
        """Stand in line from now on."""
        self._joined += 1
        place.number = self._joined
        self.room(place.room).add(place)

    def leave(self, place: P) -> None:
        """Give up one's place."""
        self.rooms[place.room].remove(place, served=False)

    def admit(self, now: float, give: Callable[[P], bool]) -> list[P]:
        """Give everybody a server for whom there is one, in order; who has got one.

        `give` finds one and takes it, or says that there is none; it may let one go who need not
        wait any longer (`given_up`). O(rooms) calls of it beyond those that succeed, and one for
        each who returns.
        """
        admitted = []
        waiting = [room for room in self.rooms.values() if room]
        while waiting:
            waiting.sort(key=_turn)
            room = waiting[0]
            place = self._first(room, give)
            if place is None:
                del waiting[0]
                continue
            room.remove(place, served=not place.given_up)
            if not place.given_up:
                room.rate.freed(now)
            admitted.append(place)
            if not room:
                del waiting[0]
        return admitted

    @staticmethod
    def _first(room: Room[P], give: Callable[[P], bool]) -> P | None:
        """The first in a room for whom there is a server, which it has got."""
        for place in room.fronts():
            if give(place):
                return place
            if not place.returning:
                return None  # whoever comes after it may go to the same servers, or fewer
        return None

    def left_free(self, now: float, serves: Callable[[str | None], bool]) -> None:
        """A server is free, and `admit` has found nobody for it. `serves` tells whose it is."""
        for room in self.rooms.values():
            if room.rate.running and not room and serves(room.model):
                room.rate.freed(now)
                room.rate.end(now)

    def forget(self, known: Callable[[str], bool]) -> None:
        """Drop the empty rooms of models that nobody knows any more."""
        for model, room in list(self.rooms.items()):
            if model and not room and not known(model):
                del self.rooms[model]


def _turn(room: Room[P]) -> tuple[int, int]:
    first = next(room.fronts())
    return first.priority, first.number
