"""The order of service among requests that may use the same servers. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from vllm_router.routing.queue.entry import QueueEntry, Route, insert

E = TypeVar("E", bound=QueueEntry)

_SPARE_ITEMS = 16
"""Outdated heap items that are always tolerated before the heap is rebuilt."""


class Rank(NamedTuple):
    """The position of an entry among all queues; the smallest is served first.

    `is_new` is 0 for requests that return from a server; `turn` is the stamp of the key's last
    turn, or of its first waiting request if that is later.
    """

    priority: int
    is_new: int
    turn: int
    number: int


HeapItem = tuple[int, int, int, E]
"""Turn, entry number, serial number of the item, and entry."""


class _PriorityLevel(Generic[E]):
    """The entries of one priority; keys take turns.

    The heap has an item for the first entry of each key. An item is outdated once its entry is
    not the first any more or the key has had another turn.
    """

    __slots__ = ("_by_key", "_heap", "_items", "_returning", "_turns")

    def __init__(self) -> None:
        self._returning: OrderedDict[E, None] = OrderedDict()
        self._by_key: dict[Hashable, OrderedDict[E, None]] = {}
        self._turns: dict[Hashable, int] = {}
        self._heap: list[HeapItem[E]] = []
        self._items = 0

    def __bool__(self) -> bool:
        return bool(self._returning or self._by_key)

    def add(self, entry: E) -> None:
        if entry.returning:
            insert(self._returning, entry)
            return
        queue = self._by_key.get(entry.key)
        if queue is None:
            queue = self._by_key[entry.key] = OrderedDict()
        insert(queue, entry)
        if next(iter(queue)) is entry:
            self._push(entry)

    def remove(self, entry: E) -> None:
        if entry.returning:
            del self._returning[entry]
            return
        queue = self._by_key[entry.key]
        first = next(iter(queue))
        del queue[entry]
        if not queue:
            del self._by_key[entry.key]
            self._turns.pop(entry.key, None)
        elif first is entry:
            self._push(next(iter(queue)))

    def record_turn(self, key: Hashable, stamp: int) -> None:
        """A request of the key was given a server. Ignored unless others of the key wait."""
        queue = self._by_key.get(key)
        if queue is not None and stamp > self._turns.get(key, 0):
            self._turns[key] = stamp
            self._push(next(iter(queue)))

    def _push(self, first: E) -> None:
        heap = self._heap
        if len(heap) > 2 * len(self._by_key) + _SPARE_ITEMS:
            heap[:] = [self._item(next(iter(queue))) for queue in self._by_key.values()]
            heapify(heap)
        else:
            heappush(heap, self._item(first))

    def _item(self, first: E) -> HeapItem[E]:
        self._items += 1  # serial number: entries themselves are never compared
        return self._turn(first), first.number, self._items, first

    def _turn(self, first: E) -> int:
        return max(first.number, self._turns.get(first.key, 0))

    def _is_current(self, item: HeapItem[E]) -> bool:
        turn, _, _, entry = item
        queue = self._by_key.get(entry.key)
        return queue is not None and next(iter(queue)) is entry and turn == self._turn(entry)

    def first(self) -> tuple[int, int, E]:
        """`is_new`, turn and entry of the next one; the level must not be empty."""
        if self._returning:
            entry = next(iter(self._returning))
            return 0, entry.number, entry
        heap = self._heap
        while not self._is_current(heap[0]):
            heappop(heap)
        turn, _, _, entry = heap[0]
        return 1, turn, entry

    def last_turn(self, key: Hashable) -> int:
        """The stamp of the key's last turn while requests of it wait here; 0 for none."""
        return self._turns.get(key, 0)

    def restore_turn(self, key: Hashable, stamp: int, before: int) -> None:
        """Undo the turn with this stamp, unless the key has had a later one."""
        queue = self._by_key.get(key)
        if queue is not None and self._turns.get(key, stamp) == stamp:
            self._turns[key] = before
            self._push(next(iter(queue)))

    def __iter__(self) -> Iterator[E]:
        yield from self._returning
        for queue in self._by_key.values():
            yield from queue


class RouteQueue(Generic[E]):
    """The entries of one route."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self._levels: dict[int, _PriorityLevel[E]] = {}
        self._priorities: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._levels)

    def add(self, entry: E) -> None:
        level = self._levels.get(entry.priority)
        if level is None:
            level = self._levels[entry.priority] = _PriorityLevel()
            insort(self._priorities, entry.priority)
        level.add(entry)

    def remove(self, entry: E) -> None:
        level = self._levels[entry.priority]
        level.remove(entry)
        if not level:
            del self._levels[entry.priority]
            del self._priorities[bisect_left(self._priorities, entry.priority)]

    def record_turn(self, priority: int, key: Hashable, stamp: int) -> None:
        """A request of the key was given a server of this route."""
        level = self._levels.get(priority)
        if level is not None:
            level.record_turn(key, stamp)

    def first(self) -> tuple[Rank, E]:
        """The next entry; the queue must not be empty. O(log n)."""
        priority = self._priorities[0]
        is_new, turn, entry = self._levels[priority].first()
        return Rank(priority, is_new, turn, entry.number), entry

    def __iter__(self) -> Iterator[E]:
        """All entries, in no particular order."""
        for level in self._levels.values():
            yield from level

    def last_turn(self, priority: int, key: Hashable) -> int:
        """The stamp of the key's last turn while requests of it wait here; 0 for none."""
        level = self._levels.get(priority)
        return level.last_turn(key) if level is not None else 0

    def restore_turn(self, priority: int, key: Hashable, stamp: int, before: int) -> None:
        """Undo the turn with this stamp, unless the key has had a later one."""
        level = self._levels.get(priority)
        if level is not None:
            level.restore_turn(key, stamp, before)
