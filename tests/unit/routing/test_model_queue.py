"""The requests that wait for one model: their number, their order, and what a full queue drops."""

from __future__ import annotations

import itertools
from typing import Any

from vllm_router.routing.queue.entry import QueueEntry
from vllm_router.routing.queue.model_queue import ModelQueue

_numbers = itertools.count(1)


def entry(key: str = "k", priority: int = 0, **more: Any) -> QueueEntry:
    return QueueEntry("m", priority, key, 0.0, 9.0, number=next(_numbers), **more)


def queue_of(*entries: QueueEntry) -> ModelQueue[QueueEntry]:
    queue: ModelQueue[QueueEntry] = ModelQueue("m")
    for one in entries:
        queue.add(one)
    return queue


def test_model_queue_oldest_is_when_the_first_one_joined():
    assert queue_of().oldest is None
    first, second = entry(), entry(returning=True)
    first.since, second.since = 3.0, 1.0
    queue = queue_of(second, first)
    assert queue.oldest == 3.0
    queue.remove(first)
    assert (queue.oldest, len(queue), queue.waiting) == (1.0, 1, 0)


def test_model_queue_counts_what_is_served_before():
    queue = queue_of(entry(priority=-1), entry(), entry(), entry("other"), entry(priority=1))
    queue.add(back := entry(priority=0, returning=True))
    assert queue.before(0, "k") == 1 + 1 + 3
    assert queue.before(0, "new") == 1 + 1 + 2
    queue.remove(back)
    assert queue.before(0, "k") == 1 + 3
    for one in list(queue):
        queue.remove(one)
    assert [queue.before(priority, "k") for priority in (-1, 0, 1)] == [0, 0, 0]


def test_model_queue_emptied_keeps_nothing():
    queue = queue_of(*(ones := [entry(key, priority) for key in "ab" for priority in (0, 1, 0)]))
    newcomers = queue._newcomers[0]
    for one in ones[:3]:
        queue.remove(one)
    assert newcomers._having == {2: {"b": None}}
    for one in ones[3:]:
        queue.remove(one)
    assert (queue._newcomers, queue._new_priorities, len(queue)) == ({}, [], 0)
    assert not newcomers
    assert queue.shortest.seconds(0.0) == 0.0


def test_model_queue_full_drops_the_last_of_the_key_with_the_most():
    ones = [entry("b"), entry("b"), entry("a"), entry("a")]
    queue = queue_of(*ones)
    queue.remove(ones[3])
    assert queue.displaced_by(0, "c") is ones[1]
    assert queue.displaced_by(0, "a") is None
    queue.remove(ones[1])
    assert queue.displaced_by(0, "c") is None


def test_model_queue_full_drops_from_the_lowest_priority():
    queue = queue_of(entry(priority=0), entry(priority=5), low := entry(priority=9))
    assert queue.displaced_by(7, "k") is low
    assert queue.displaced_by(9, "k") is None
    assert queue.displaced_by(10, "k") is None
    assert queue_of(entry(returning=True)).displaced_by(-1, "k") is None
