"""The order of service among requests that may go to the same servers. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from vllm_router.routing.queue.place import Place, Route, append

P = TypeVar("P", bound=Place)

_SPARE_ENTRIES = 16
"""Outdated heap entries that are kept at least, before the heap is built anew."""


class Rank(NamedTuple):
    """Where a place stands among all; the smallest goes first.

    `is_new` is 0 for requests that return from a server; `turn` is the stamp of the key's last
    turn, or of its first request if that is later.
    """

    priority: int
    is_new: int
    turn: int
    number: int


Entry = tuple[int, int, int, P]
"""Turn, number, serial number of the entry, and place."""


class _Line(Generic[P]):
    """The places of one priority.

    The heap has an entry for the first place of each key. An entry is outdated once its place is
    not the first any more or its key has had another turn.
    """

    __slots__ = ("_by_key", "_entries", "_heap", "_returning", "_turns")

    def __init__(self) -> None:
        self._returning: OrderedDict[P, None] = OrderedDict()
        self._by_key: dict[Hashable, OrderedDict[P, None]] = {}
        self._turns: dict[Hashable, int] = {}
        self._heap: list[Entry[P]] = []
        self._entries = 0

    def __bool__(self) -> bool:
        return bool(self._returning or self._by_key)

    def add(self, place: P) -> None:
        if place.returning:
            append(self._returning, place)
            return
        queue = self._by_key.get(place.key)
        if queue is None:
            queue = self._by_key[place.key] = OrderedDict()
        append(queue, place)
        if next(iter(queue)) is place:
            self._push(place)

    def remove(self, place: P) -> None:
        if place.returning:
            del self._returning[place]
            return
        queue = self._by_key[place.key]
        first = next(iter(queue))
        del queue[place]
        if not queue:
            del self._by_key[place.key]
            self._turns.pop(place.key, None)
        elif first is place:
            self._push(next(iter(queue)))

    def turned(self, key: Hashable, stamp: int) -> None:
        """A request of the key has got a server; only of interest while others of it wait."""
        queue = self._by_key.get(key)
        if queue is not None and stamp > self._turns.get(key, 0):
            self._turns[key] = stamp
            self._push(next(iter(queue)))

    def _push(self, first: P) -> None:
        heap = self._heap
        if len(heap) > 2 * len(self._by_key) + _SPARE_ENTRIES:
            heap[:] = [self._entry(next(iter(queue))) for queue in self._by_key.values()]
            heapify(heap)
        else:
            heappush(heap, self._entry(first))

    def _entry(self, first: P) -> Entry[P]:
        self._entries += 1  # so that two entries never compare their places
        return self._turn(first), first.number, self._entries, first

    def _turn(self, first: P) -> int:
        return max(first.number, self._turns.get(first.key, 0))

    def _is_current(self, entry: Entry[P]) -> bool:
        turn, _, _, place = entry
        queue = self._by_key.get(place.key)
        return queue is not None and next(iter(queue)) is place and turn == self._turn(place)

    def first(self) -> tuple[int, int, P]:
        """`is_new`, turn and place of the next one; the line is not empty."""
        if self._returning:
            place = next(iter(self._returning))
            return 0, place.number, place
        heap = self._heap
        while not self._is_current(heap[0]):
            heappop(heap)
        turn, _, _, place = heap[0]
        return 1, turn, place

    def turn(self, key: Hashable) -> int:
        """The stamp of its last turn while requests of it wait here; 0 if none."""
        return self._turns.get(key, 0)

    def restore(self, key: Hashable, stamp: int, before: int) -> None:
        """Take a turn back, unless the key has had a later one."""
        queue = self._by_key.get(key)
        if queue is not None and self._turns.get(key, stamp) == stamp:
            self._turns[key] = before
            self._push(next(iter(queue)))

    def __iter__(self) -> Iterator[P]:
        yield from self._returning
        for queue in self._by_key.values():
            yield from queue


class Pool(Generic[P]):
    """The places of one route."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self._lines: dict[int, _Line[P]] = {}
        self._priorities: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, place: P) -> None:
        line = self._lines.get(place.priority)
        if line is None:
            line = self._lines[place.priority] = _Line()
            insort(self._priorities, place.priority)
        line.add(place)

    def remove(self, place: P) -> None:
        line = self._lines[place.priority]
        line.remove(place)
        if not line:
            del self._lines[place.priority]
            del self._priorities[bisect_left(self._priorities, place.priority)]

    def turned(self, priority: int, key: Hashable, stamp: int) -> None:
        line = self._lines.get(priority)
        if line is not None:
            line.turned(key, stamp)

    def first(self) -> tuple[Rank, P]:
        """The next one; the pool is not empty. O(log n)."""
        priority = self._priorities[0]
        is_new, turn, place = self._lines[priority].first()
        return Rank(priority, is_new, turn, place.number), place

    def __iter__(self) -> Iterator[P]:
        """All places, in no order."""
        for line in self._lines.values():
            yield from line

    def turn(self, priority: int, key: Hashable) -> int:
        """The stamp of a key's last turn while requests of it wait here; 0 if none."""
        line = self._lines.get(priority)
        return line.turn(key) if line is not None else 0

    def restore(self, priority: int, key: Hashable, stamp: int, before: int) -> None:
        """Take the turn with this stamp back, unless the key has had a later one."""
        line = self._lines.get(priority)
        if line is not None:
            line.restore(key, stamp, before)
