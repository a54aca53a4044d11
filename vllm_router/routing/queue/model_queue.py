"""The requests that wait for one model: their number, and which of them leaves first. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from vllm_router.routing.queue.drain_rate import DrainRate, ShortestResponse
from vllm_router.routing.queue.entry import QueueEntry, insert

E = TypeVar("E", bound=QueueEntry)


class _Newcomers(Generic[E]):
    """The newcomers of one priority, by key; finds the key with the most requests in O(1).

    `_at_least[n]` is the number of keys with more than n requests, `_having[n]` are the keys with
    exactly n.
    """

    __slots__ = ("_at_least", "_by_key", "_having")

    def __init__(self) -> None:
        self._by_key: dict[Hashable, OrderedDict[E, None]] = {}
        self._at_least: list[int] = []
        self._having: dict[int, OrderedDict[Hashable, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def add(self, entry: E) -> None:
        queue = self._by_key.setdefault(entry.key, OrderedDict())
        count = len(queue)
        insert(queue, entry)
        if count == len(self._at_least):
            self._at_least.append(0)
        self._at_least[count] += 1
        self._move(entry.key, count, count + 1)

    def remove(self, entry: E) -> None:
        queue = self._by_key[entry.key]
        count = len(queue)
        del queue[entry]
        if not queue:
            del self._by_key[entry.key]
        self._at_least[count - 1] -= 1
        if not self._at_least[-1]:
            self._at_least.pop()
        self._move(entry.key, count, count - 1)

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
        """Requests served before one more of this key.

        All of its own, and of each other key at most one more than that.
        """
        return sum(self._at_least[: self.count(key) + 1])

    @property
    def most(self) -> int:
        """The number of requests of the key with the most."""
        return len(self._at_least)

    def last(self) -> E:
        """The last request of the key with the most."""
        key = next(reversed(self._having[self.most]))
        return next(reversed(self._by_key[key]))


class ModelQueue(Generic[E]):
    """The requests that wait for one model.

    Requests that return from a server count in `len` but not in `waiting`: they were admitted
    before and need no queue place.
    """

    def __init__(self, model: str | None) -> None:
        self.model = model
        self.rate = DrainRate()
        self.shortest = ShortestResponse()
        self._entries: OrderedDict[E, None] = OrderedDict()
        self._newcomers: dict[int, _Newcomers[E]] = {}
        self._new_priorities: list[int] = []
        self._returning_priorities: list[int] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[E]:
        return iter(self._entries)

    @property
    def waiting(self) -> int:
        """The number of newcomers."""
        return len(self._new_priorities)

    @property
    def oldest(self) -> float | None:
        """Time at which the longest waiting request joined; None if none waits."""
        return next(iter(self._entries)).since if self._entries else None

    def add(self, entry: E) -> None:
        insert(self._entries, entry)
        if entry.returning:
            insort(self._returning_priorities, entry.priority)
            return
        insort(self._new_priorities, entry.priority)
        newcomers = self._newcomers.get(entry.priority)
        if newcomers is None:
            newcomers = self._newcomers[entry.priority] = _Newcomers()
        newcomers.add(entry)

    def remove(self, entry: E) -> None:
        del self._entries[entry]
        priorities = self._returning_priorities if entry.returning else self._new_priorities
        del priorities[bisect_left(priorities, entry.priority)]
        if not entry.returning:
            newcomers = self._newcomers[entry.priority]
            newcomers.remove(entry)
            if not newcomers:
                del self._newcomers[entry.priority]

    def before(self, priority: int, key: Hashable) -> int:
        """Requests that would be served before a new one of this priority and key.

        It is assumed that no other arrives later. O(log n + requests of the key).
        """
        newcomers = self._newcomers.get(priority)
        return (
            bisect_right(self._returning_priorities, priority)
            + bisect_left(self._new_priorities, priority)
            + (newcomers.before(key) if newcomers is not None else 0)
        )

    def displaced_by(self, priority: int, key: Hashable) -> E | None:
        """The request that a new one of this priority and key displaces from a full queue.

        None if the new one itself would be the last. Else, within the lowest priority, the last
        request of the key with the most requests; keys with equal shares do not displace each
        other. O(1).
        """
        if not self._new_priorities:
            return None
        worst = self._new_priorities[-1]
        newcomers = self._newcomers[worst]
        if priority < worst or (priority == worst and newcomers.count(key) + 1 < newcomers.most):
            return newcomers.last()
        return None
