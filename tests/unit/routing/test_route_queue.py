"""The order of one route's requests, against a queue that is searched as a whole."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from vllm_router.routing.queue.entry import NOWHERE, QueueEntry
from vllm_router.routing.queue.route_queue import Rank, RouteQueue


class Searched:
    """What `RouteQueue` must give, by looking at every entry."""

    def __init__(self) -> None:
        self.entries: list[QueueEntry] = []
        self.turns: dict[tuple[int, object], int] = {}

    def of_key(self, priority: int, key: object) -> list[QueueEntry]:
        return [
            one
            for one in self.entries
            if not one.returning and (one.priority, one.key) == (priority, key)
        ]

    def remove(self, entry: QueueEntry) -> None:
        self.entries.remove(entry)
        if not entry.returning and not self.of_key(entry.priority, entry.key):
            self.turns.pop((entry.priority, entry.key), None)

    def record_turn(self, priority: int, key: object, stamp: int) -> None:
        if self.of_key(priority, key) and stamp > self.turns.get((priority, key), 0):
            self.turns[priority, key] = stamp

    def restore_turn(self, priority: int, key: object, stamp: int, before: int) -> None:
        place = (priority, key)
        if self.of_key(priority, key) and self.turns.get(place, stamp) == stamp:
            self.turns[place] = before

    def first(self) -> tuple[Rank, QueueEntry]:
        firsts = []
        for one in self.entries:
            alike = self.of_key(one.priority, one.key)
            if one.returning:
                firsts.append((Rank(one.priority, 0, one.number, one.number), one))
            elif one.number == min(other.number for other in alike):
                turn = max(one.number, self.turns.get((one.priority, one.key), 0))
                firsts.append((Rank(one.priority, 1, turn, one.number), one))
        return min(firsts, key=lambda found: found[0])


@pytest.mark.parametrize("seed", range(6))
def test_route_queue_order_equals_a_search(seed: int):
    rng = Random(seed)
    stamps = itertools.count(1)
    queue: RouteQueue[QueueEntry] = RouteQueue(NOWHERE)
    searched = Searched()
    taken: list[tuple[int, str, int, int]] = []
    for _ in range(400):
        priority, key = rng.choice((0, 0, 5)), rng.choice("abc")
        act = rng.random()
        if act < 0.4 or not searched.entries:
            number = next(stamps) if rng.random() < 0.8 else rng.randrange(1, 50)
            if number in {one.number for one in searched.entries}:
                continue
            entry = QueueEntry("m", priority, key, 0.0, 1.0, rng.random() < 0.2, number=number)
            queue.add(entry)
            searched.entries.append(entry)
        elif act < 0.7:
            gone = rng.choice([searched.first()[1], rng.choice(searched.entries)])
            queue.remove(gone)
            searched.remove(gone)
        elif act < 0.9 or not taken:
            stamp, before = next(stamps), queue.last_turn(priority, key)
            assert before == searched.turns.get((priority, key), 0)
            for both in (queue, searched):
                both.record_turn(priority, key, stamp)
            taken.append((priority, key, stamp, before))
        else:
            turn = taken.pop()
            for both in (queue, searched):
                both.restore_turn(*turn)
        assert bool(queue) is bool(searched.entries)
        assert sorted(one.number for one in queue) == sorted(one.number for one in searched.entries)
        if searched.entries:
            assert queue.first() == searched.first()


def test_route_queue_turns_take_a_bounded_memory():
    queue: RouteQueue[QueueEntry] = RouteQueue(NOWHERE)
    queue.add(QueueEntry("m", 0, "a", 0.0, 1.0, number=1))
    queue.add(QueueEntry("m", 0, "b", 0.0, 1.0, number=2))
    level = queue._levels[0]
    for stamp in range(3, 100):
        queue.record_turn(0, "a", stamp)
        assert len(level._heap) <= 2 * 2 + 16 + 1
    assert len(level._heap) > 2
    assert queue.first()[1].key == "b"
