"""The requests that wait for one model: how many, and which of them leaves first. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from vllm_router.routing.queue.drain_rate import DrainRate, Quickest
from vllm_router.routing.queue.place import Place, append

P = TypeVar("P", bound=Place)


class _Level(Generic[P]):
    """The newcomers of one priority, by key; finds the key with the most requests in O(1).

    `_at_least[n]` is how many keys have more than n requests, `_having[n]` are the keys with n.
    """

    __slots__ = ("_at_least", "_by_key", "_having")

    def __init__(self) -> None:
        self._by_key: dict[Hashable, OrderedDict[P, None]] = {}
        self._at_least: list[int] = []
        self._having: dict[int, OrderedDict[Hashable, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def add(self, place: P) -> None:
        queue = self._by_key.setdefault(place.key, OrderedDict())
        count = len(queue)
        append(queue, place)
        if count == len(self._at_least):
            self._at_least.append(0)
        self._at_least[count] += 1
        self._move(place.key, count, count + 1)

    def remove(self, place: P) -> None:
        queue = self._by_key[place.key]
        count = len(queue)
        del queue[place]
        if not queue:
            del self._by_key[place.key]
        self._at_least[count - 1] -= 1
        if not self._at_least[-1]:
            self._at_least.pop()
        self._move(place.key, count, count - 1)

    def _move(self, key: Hashable, before: int, after: int) -> None:
        if before:
            having = self._having[before]
            del having[key]
            if not having:
                del self._having[before]
        if after:
            self._having.setdefault(after, OrderedDict())[key] = None

    def count(self, key: Hashable) -> int:
        return len(self._by_key.get(key, ()))

    def before(self, key: Hashable) -> int:
        """How many would go before one more of this key: its own, and of each other key one more
        than that at most."""
        return sum(self._at_least[: self.count(key) + 1])

    @property
    def most(self) -> int:
        """The requests of the greediest key."""
        return len(self._at_least)

    def last(self) -> P:
        """The last request of the greediest key."""
        key = next(reversed(self._having[self.most]))
        return next(reversed(self._by_key[key]))


class Room(Generic[P]):
    """The requests that wait for one model.

    Those that return from a server count in `len` but not in `waiting`: they had been let in
    before, and need no place.
    """

    def __init__(self, model: str | None) -> None:
        self.model = model
        self.rate = DrainRate()
        self.quickest = Quickest()
        self._places: OrderedDict[P, None] = OrderedDict()
        self._levels: dict[int, _Level[P]] = {}
        self._priorities: list[int] = []
        self._returning: list[int] = []

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[P]:
        return iter(self._places)

    @property
    def waiting(self) -> int:
        """How many newcomers wait."""
        return len(self._priorities)

    @property
    def oldest(self) -> float | None:
        """When the request joined that has waited longest."""
        return next(iter(self._places)).since if self._places else None

    def add(self, place: P) -> None:
        append(self._places, place)
        if place.returning:
            insort(self._returning, place.priority)
            return
        insort(self._priorities, place.priority)
        level = self._levels.get(place.priority)
        if level is None:
            level = self._levels[place.priority] = _Level()
        level.add(place)

    def remove(self, place: P) -> None:
        del self._places[place]
        sorted_ones = self._returning if place.returning else self._priorities
        del sorted_ones[bisect_left(sorted_ones, place.priority)]
        if not place.returning:
            level = self._levels[place.priority]
            level.remove(place)
            if not level:
                del self._levels[place.priority]

    def before(self, priority: int, key: Hashable) -> int:
        """How many would go before one more of this priority and key, if none came later.
        O(log n + requests of the key)."""
        level = self._levels.get(priority)
        return (
            bisect_right(self._returning, priority)
            + bisect_left(self._priorities, priority)
            + (level.before(key) if level is not None else 0)
        )

    def displaced_by(self, priority: int, key: Hashable) -> P | None:
        """The request that has to leave if the room is full and one more comes of this priority
        and key; None if that one would be the last itself. O(1).

        It is the last request of the greediest key among those of the lowest priority. Keys with
        equal shares do not displace each other.
        """
        if not self._priorities:
            return None
        worst = self._priorities[-1]
        level = self._levels[worst]
        if priority < worst or (priority == worst and level.count(key) + 1 < level.most):
            return level.last()
        return None
