"""When the drain rate of a model's queue is measured."""

from __future__ import annotations

from vllm_router.routing.queue.entry import QueueEntry, Route
from vllm_router.routing.queue.route_queue import RouteQueue
from vllm_router.routing.queue.waiting_queue import WaitingQueue

ROUTE = Route(frozenset({"server"}), "m")


def entry() -> QueueEntry:
    return QueueEntry("m", 0, "key", 0.0, 1e9, route=ROUTE)


def test_queue_last_entry_leaves_ends_the_measurement():
    """Time without a waiting request must not make the fleet look slow."""
    queue: WaitingQueue[QueueEntry] = WaitingQueue()
    first, second = entry(), entry()
    queue.join(first)
    queue.join(second)
    rate = queue.model_queue("m").rate
    rate.begin(0.0)
    queue.leave(first, 1.0)
    assert rate.running
    queue.leave(second, 2.0)
    assert not rate.running
    assert (len(queue), queue.route_queues) == (0, {})


def test_route_queue_turn_of_an_earlier_stamp_changes_nothing():
    """Processes report turns in any order: the latest one of a key counts."""
    queue: RouteQueue[QueueEntry] = RouteQueue(ROUTE)
    first, second = entry(), entry()
    first.number, second.number = 1, 2
    queue.add(first)
    queue.add(second)
    for stamp in (100, 50, 100):
        queue.record_turn(0, "key", stamp)
        assert queue.last_turn(0, "key") == 100
    assert queue.last_turn(1, "key") == 0
