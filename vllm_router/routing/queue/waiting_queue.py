"""All requests that wait for a server, and the order in which they are served. Pure.

A lower priority is served first, as in vLLM. Within a priority the clients' keys take turns, and
the requests of a key are served in order of arrival. Requests that return from a failed server
precede newcomers of the same priority.

Every entry is in two queues:

* a *route queue* (`route_queue.py`) with all entries that may use the same servers, whatever model
  they name: if its first entry is blocked, all of it is, and other route queues go on;
* a *model queue* (`model_queue.py`) with all entries of one model: their number, their drain rate,
  and the entry that leaves when a newcomer with an earlier turn finds the queue full.

Entries are ordered by stamps: unique numbers that rise with time, see `WaitingQueue.stamp`.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from vllm_router.routing.queue.entry import OfferResult, QueueEntry, Route
from vllm_router.routing.queue.model_queue import ModelQueue
from vllm_router.routing.queue.route_queue import RouteQueue

OWNER_BITS = 10
"""Low bits of a stamp: the number of the process, so that stamps of processes never collide."""

ANY_UNKNOWN = ""
"""The queue of all models that no server lists: clients may invent any number of names."""


E = TypeVar("E", bound=QueueEntry)


class _Held(NamedTuple, Generic[E]):
    """An entry that is held during a pass, with the previous turns of its key."""

    entry: E
    stamp: int
    turns: list[tuple[RouteQueue[E], int]]


class WaitingQueue(Generic[E]):
    """The requests that wait. An entry joins once, and is returned by `admit` once or leaves.

    `owner` is the number of this process, below 2 ** OWNER_BITS.
    """

    def __init__(self, owner: int = 0) -> None:
        self.model_queues: dict[str | None, ModelQueue[E]] = {}
        self.route_queues: dict[Route, RouteQueue[E]] = {}
        self._owner = owner
        self._latest = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def model_queue(self, model: str | None) -> ModelQueue[E]:
        queue = self.model_queues.get(model)
        if queue is None:
            queue = self.model_queues[model] = ModelQueue(model)
        return queue

    # -- stamps -------------------------------------------------------------------------------

    def stamp(self, now: float) -> int:
        """A number greater than all stamps made or observed by this process.

        Microseconds of `now`, or one more than the last stamp if the clock has not advanced.
        """
        self._latest = max(int(now * 1e6), self._latest + 1)
        return self._latest << OWNER_BITS | self._owner

    def observe_stamp(self, stamp: int) -> None:
        """Another process has made this stamp; ours will be greater."""
        self._latest = max(self._latest, stamp >> OWNER_BITS)

    # -- entries ------------------------------------------------------------------------------

    def join(self, entry: E) -> None:
        """Add an entry. O(log n)."""
        if not entry.number:
            entry.number = self.stamp(entry.since)
        queue = self.route_queues.get(entry.route)
        if queue is None:
            queue = self.route_queues[entry.route] = RouteQueue(entry.route)
        queue.add(entry)
        self.model_queue(entry.model).add(entry)
        self._size += 1

    def move(self, entry: E, model: str | None, route: Route, now: float) -> None:
        """Move an entry to another model and route; it keeps its number."""
        number = entry.number
        self.leave(entry, now)
        entry.model, entry.route, entry.number = model, route, number
        self.join(entry)

    def leave(self, entry: E, now: float) -> None:
        """Remove an entry. O(log n)."""
        route_queue = self.route_queues[entry.route]
        route_queue.remove(entry)
        if not route_queue:
            del self.route_queues[entry.route]
        model_queue = self.model_queues[entry.model]
        model_queue.remove(entry)
        self._size -= 1
        if not model_queue:
            model_queue.rate.end(now)

    def served(self, entry: E, now: float) -> None:
        """The entry was given `entry.server`, with the stamp `entry.served_at`."""
        self.model_queues[entry.model].rate.freed(now)
        self.leave(entry, now)
        self.record_turn(entry)

    def record_turn(self, entry: E) -> None:
        """The entry's key has had a turn on `entry.server`.

        On every route to that server the other keys go first.
        """
        if not entry.returning:
            for queue in self.route_queues.values():
                if entry.server in queue.route.servers:
                    queue.record_turn(entry.priority, entry.key, entry.served_at)

    # -- servers ------------------------------------------------------------------------------

    def admit(self, now: float, give: Callable[[E], OfferResult]) -> list[E]:
        """Offer servers to the waiting requests, in order; returns the entries that have left.

        `give` finds and takes a server for an entry. It is called once for every entry that leaves
        and O(route queues) times beyond.
        """
        heads = [(queue.first()[0], queue) for queue in self.route_queues.values()]
        heapify(heads)
        gone: list[E] = []
        held: list[_Held[E]] = []
        while heads:
            rank, queue = heappop(heads)
            current, entry = queue.first()
            if current > rank:
                heappush(heads, (current, queue))  # the key had a turn in another route queue
                continue
            result = give(entry)
            if result is OfferResult.BLOCKED:
                continue
            if result is OfferResult.HELD:
                held.append(self._hold(entry, now))
            else:
                gone.append(entry)
                if result is OfferResult.SERVED:
                    entry.served_at = self.stamp(now)
                    self.served(entry, now)
                else:
                    self.leave(entry, now)
            if queue:
                heappush(heads, (queue.first()[0], queue))
        for one in reversed(held):
            self._put_back(one)
        return gone

    def _hold(self, entry: E, now: float) -> _Held[E]:
        """Take the entry out of its route queue and use its key's turn, as if it were served."""
        stamp = self.stamp(now)
        turns = []
        if not entry.returning:
            for queue in self.route_queues.values():
                if entry.server in queue.route.servers:
                    turns.append((queue, queue.last_turn(entry.priority, entry.key)))
                    queue.record_turn(entry.priority, entry.key, stamp)
        self.route_queues[entry.route].remove(entry)
        return _Held(entry, stamp, turns)

    def _put_back(self, held: _Held[E]) -> None:
        entry = held.entry
        self.route_queues[entry.route].add(entry)
        for queue, before in held.turns:
            queue.restore_turn(entry.priority, entry.key, held.stamp, before)

    def server_left_free(self, now: float, serves: Callable[[str | None], bool]) -> None:
        """A server is free and no waiting request can use it. `serves` tests its models."""
        for queue in self.model_queues.values():
            if queue.rate.running and not queue and serves(queue.model):
                queue.rate.freed(now)
                queue.rate.end(now)

    def drop_unknown_models(self, known: Callable[[str], bool]) -> None:
        """Drop the empty queues of models that no server lists any more."""
        for model, queue in list(self.model_queues.items()):
            if model and not queue and not known(model):
                del self.model_queues[model]

    def reset_rates(self, now: float, concerned: Callable[[str | None], bool]) -> None:
        """The servers of these models have changed: measure their drain rates anew."""
        for queue in self.model_queues.values():
            if concerned(queue.model):
                queue.rate.forget(now)
