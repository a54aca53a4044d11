"""Requests that wait for a server, and the order in which they get one. Pure.

A lower priority goes first, as in vLLM; among equals the clients' keys take turns, and each key's
requests go in the order in which they came. Requests that had a server already, which failed them,
go before their equals.

Two views of the same places:

* A *pool* (`pools.py`) holds the requests that may go to the same servers, whatever model they
  name. If the first of a pool cannot go, none of it can; requests of other pools can.
* A *room* (`rooms.py`) holds the requests for one model: how many there are, how fast they drain,
  and which of them has to leave when a newcomer with an earlier turn finds the room full.

Orders are numbers that rise with time and are unique, see `WaitingRooms.stamp`.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from vllm_router.routing.queue.place import Place, Route, Verdict
from vllm_router.routing.queue.pools import Pool
from vllm_router.routing.queue.rooms import Room

OWNER_BITS = 10
"""Low bits of a stamp: the process that made it, so that two processes never make the same."""

ANY_UNKNOWN = ""
"""The room of all models that no server lists: clients invent names, and rooms must be bounded."""


P = TypeVar("P", bound=Place)


class _Held(NamedTuple, Generic[P]):
    """A place that is held during a pass, with the turns that its key had before."""

    place: P
    stamp: int
    turns: list[tuple[Pool[P], int]]


class WaitingRooms(Generic[P]):
    """All requests that wait. A place that joins is handed out by `admit` once, or leaves.

    `owner` is the number of this process, less than 2 ** OWNER_BITS.
    """

    def __init__(self, owner: int = 0) -> None:
        self.rooms: dict[str | None, Room[P]] = {}
        self.pools: dict[Route, Pool[P]] = {}
        self._owner = owner
        self._latest = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def room(self, model: str | None) -> Room[P]:
        room = self.rooms.get(model)
        if room is None:
            room = self.rooms[model] = Room(model)
        return room

    # -- order --------------------------------------------------------------------------------

    def stamp(self, now: float) -> int:
        """A number greater than all that this process has made or `seen`: microseconds, or one
        more than the last if the clock has not moved."""
        self._latest = max(int(now * 1e6), self._latest + 1)
        return self._latest << OWNER_BITS | self._owner

    def seen(self, stamp: int) -> None:
        """Another process has made this stamp; ours will be greater."""
        self._latest = max(self._latest, stamp >> OWNER_BITS)

    # -- places -------------------------------------------------------------------------------

    def join(self, place: P) -> None:
        """Wait from now on. O(log n)."""
        if not place.number:
            place.number = self.stamp(place.since)
        pool = self.pools.get(place.route)
        if pool is None:
            pool = self.pools[place.route] = Pool(place.route)
        pool.add(place)
        self.room(place.room).add(place)
        self._size += 1

    def move(self, place: P, room: str | None, route: Route, now: float) -> None:
        """Wait for something else from now on, with the same number."""
        number = place.number
        self.leave(place, now)
        place.room, place.route, place.number = room, route, number
        self.join(place)

    def leave(self, place: P, now: float) -> None:
        """Wait no longer. O(log n)."""
        pool = self.pools[place.route]
        pool.remove(place)
        if not pool:
            del self.pools[place.route]
        room = self.rooms[place.room]
        room.remove(place)
        self._size -= 1
        if not room:
            room.rate.end(now)

    def served(self, place: P, now: float) -> None:
        """A waiting request has got `place.server`, with the stamp `place.served_at`."""
        self.rooms[place.room].rate.freed(now)
        self.leave(place, now)
        self.turned(place)

    def turned(self, place: P) -> None:
        """Its key has had a turn on `place.server`: the other keys go first where they may go
        there, too."""
        if not place.returning:
            for pool in self.pools.values():
                if place.server in pool.route.servers:
                    pool.turned(place.priority, place.key, place.served_at)

    # -- servers ------------------------------------------------------------------------------

    def admit(self, now: float, give: Callable[[P], Verdict]) -> list[P]:
        """Offer servers to the waiting requests, in order; the places that have left.

        `give` finds a server for a place and takes it. O(pools) calls of it beyond those that let
        a place go.
        """
        heads = [(pool.first()[0], pool) for pool in self.pools.values()]
        heapify(heads)
        gone: list[P] = []
        held: list[_Held[P]] = []
        while heads:
            rank, pool = heappop(heads)
            current, place = pool.first()
            if current > rank:
                heappush(heads, (current, pool))  # another pool has used its key's turn
                continue
            verdict = give(place)
            if verdict is Verdict.BLOCKED:
                continue
            if verdict is Verdict.HELD:
                held.append(self._hold(place, now))
            else:
                gone.append(place)
                if verdict is Verdict.SERVED:
                    place.served_at = self.stamp(now)
                    self.served(place, now)
                else:
                    self.leave(place, now)
            if pool:
                heappush(heads, (pool.first()[0], pool))
        for one in reversed(held):
            self._put_back(one)
        return gone

    def _hold(self, place: P, now: float) -> _Held[P]:
        """Take the place out of its pool, and its key's turn, as if it had been served."""
        stamp = self.stamp(now)
        turns = []
        if not place.returning:
            for pool in self.pools.values():
                if place.server in pool.route.servers:
                    turns.append((pool, pool.turn(place.priority, place.key)))
                    pool.turned(place.priority, place.key, stamp)
        self.pools[place.route].remove(place)
        return _Held(place, stamp, turns)

    def _put_back(self, held: _Held[P]) -> None:
        place = held.place
        self.pools[place.route].add(place)
        for pool, before in held.turns:
            pool.restore(place.priority, place.key, held.stamp, before)

    def left_free(self, now: float, serves: Callable[[str | None], bool]) -> None:
        """A server is free, and no waiting request can use it. `serves` says for which models."""
        for room in self.rooms.values():
            if room.rate.running and not room and serves(room.model):
                room.rate.freed(now)
                room.rate.end(now)

    def forget(self, known: Callable[[str], bool]) -> None:
        """Drop the empty rooms of models that no server lists any more."""
        for model, room in list(self.rooms.items()):
            if model and not room and not known(model):
                del self.rooms[model]

    def change_rates(self, now: float, concerned: Callable[[str | None], bool]) -> None:
        """The servers of these models have changed: measure their drain rates anew."""
        for room in self.rooms.values():
            if concerned(room.model):
                room.rate.forget(now)
