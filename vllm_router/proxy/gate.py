"""The way to the servers where `[limits]` are set: no server beyond its cap, the rest waits.

Servers are handed out here and nowhere else, in one synchronous step: whatever may make one free
(an attempt has ended, the probes have news, the configuration has changed) looks who is next, takes
the lease in that one's name and wakes that one alone. So no task stands by, nobody is woken for
nothing, and nobody overtakes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import trio

from vllm_router.errors import Refused
from vllm_router.limits_config import LimitsConfig
from vllm_router.routing.retry import RULES, Outcome
from vllm_router.routing.waiting import ANY_UNKNOWN, MARGIN, Place, Room, WaitingRooms

if TYPE_CHECKING:
    from vllm_router.fleet.server import Lease, Server
    from vllm_router.proxy.exchange import Exchange
    from vllm_router.proxy.proxy import Proxy
    from vllm_router.routing.policies import Policy

Grant = tuple["Policy", "Lease"]
"""A server that was leased, and the policy that chose it."""


class Queue(NamedTuple):
    """One room as others see it: how many wait, for how many seconds the first of them has, and
    how many servers become free per second, if that is known."""

    model: str | None
    waiting: int
    longest: float
    freed_per_s: float | None


@dataclass(slots=True, eq=False, kw_only=True)
class Waiter(Place):
    """An exchange that waits. It is woken with a grant, or with what it is to be told."""

    exchange: Exchange
    woken: trio.Event = field(default_factory=trio.Event)
    grant: Grant | None = None
    refused: Refused | None = None


class Gate:
    """Lets requests through to the servers. `limits` are those in force."""

    def __init__(self, proxy: Proxy, limits: LimitsConfig) -> None:
        self.limits = limits
        self._proxy = proxy
        self._fleet = proxy.fleet
        self._rooms: WaitingRooms[Waiter] = WaitingRooms()
        self._admitting = self._missed = False
        self._fleet.on_settled.append(self.look)

    @property
    def rooms(self) -> list[Room[Waiter]]:
        """In which somebody waits or has waited; ANY_UNKNOWN is one of them."""
        return list(self._rooms.rooms.values())

    def queues(self, now: float) -> list[Queue]:
        """The rooms in figures. O(all who wait)."""
        return [
            Queue(
                room.model,
                len(room),
                now - room.oldest if room.oldest is not None else 0.0,
                room.rate.per_second(now),
            )
            for room in self.rooms
        ]

    @property
    def waiting(self) -> int:
        """How many wait, for whatever model."""
        return len(self._rooms)

    def ahead(self, model: str | None, priority: int = 0) -> tuple[int, bool]:
        """How many would go before one more request, and whether there is a place for it."""
        room = self._rooms.rooms.get(self._key(model))
        if room is None:
            return 0, self.limits.queue_size > 0
        return room.before(priority, ""), len(room) < self.limits.queue_size

    # -- one request --------------------------------------------------------------------------

    async def pass_through(
        self, exchange: Exchange, candidates: Sequence[Server], now: float
    ) -> Grant:
        """A server for an exchange, perhaps after a wait. The lease is the caller's to release.

        Raises Refused if there is no place to wait, or if it has waited too long.
        """
        grant = self._grant(exchange, candidates, now)
        if grant is not None:
            return grant
        waiter = self._place(exchange, bool(candidates), now)
        self._rooms.join(waiter)
        try:
            with trio.move_on_at(waiter.until):
                await waiter.woken.wait()
        except trio.Cancelled:
            if waiter.grant is not None:
                lease = waiter.grant[1]
                lease.release()
                waiter.grant[0].ended(lease, trio.current_time(), failed=False)
                self.freed(lease.server)
            raise
        finally:
            exchange.record.waited += trio.current_time() - now
            if waiter.grant is None and waiter.refused is None:
                self._rooms.leave(waiter)
        if waiter.grant is None:
            raise waiter.refused or self._too_late(waiter)
        return waiter.grant

    def _grant(self, exchange: Exchange, candidates: Sequence[Server], now: float) -> Grant | None:
        """Pick and lease a server in one step, if there is one below its cap."""
        free = [server for server in candidates if not server.at_cap]
        if not free:
            return None
        policy, facts = exchange.request.policy, exchange.request.facts
        # A policy that remembers candidates knows them by the tuple, and one needs no choice.
        among = candidates if len(free) == len(candidates) else free
        server = policy.pick(among, facts, now) if len(free) > 1 else free[0]
        lease = server.lease(now)
        policy.leased(lease, facts, now)
        return policy, lease

    def _place(self, exchange: Exchange, any_server: bool, now: float) -> Waiter:
        """Where it may wait, and how long; raises Refused if it may not."""
        limits, model = self.limits, exchange.request.facts.model
        returning = exchange.record.attempts > 0
        waiter = Waiter(
            self._key(model),
            exchange.priority if limits.client_priority else 0,
            exchange.record.key_name,
            now,
            min(now + limits.queue_timeout, exchange.deadline),
            returning,
            exchange=exchange,
        )
        if returning:
            return waiter  # it had been let in: whoever is new has to stand back
        room = self._rooms.room(waiter.room)
        if any_server:
            room.rate.begin(now)
        else:
            room.rate.end(now)
        if len(room) >= limits.queue_size:
            raise self._full(waiter, any_server, now)
        ahead, rate = room.before(waiter.priority, waiter.key), room.rate.per_second(now)
        if ahead and rate is not None and any_server:
            wait = (ahead + 1) / rate
            left = (exchange.deadline - now - room.quickest.seconds) / MARGIN
            most = min(limits.queue_timeout, left)
            if wait > most:
                raise Refused(
                    503,
                    "queue_too_long",
                    f"It would wait about {_shown(wait)} s for a server, and may for "
                    f"{_shown(max(0.0, most))} s.",
                    retry_after=self._bounded(wait - most),
                )
        return waiter

    def _full(self, waiter: Waiter, any_server: bool, now: float) -> Refused:
        """429 if the servers have too much to do, 503 if there is none."""
        if not any_server:
            return waiter.exchange.nobody()
        size = self.limits.queue_size
        what = f"{size} requests wait already" if size else "No request may wait"
        return Refused(
            429,
            "queue_full",
            f"Every server of the model has as many requests as it may. {what}.",
            retry_after=self._drained_in(waiter.room, now),
        )

    def _too_late(self, waiter: Waiter) -> Refused:
        """Why it is sent away after a wait."""
        exchange, now = waiter.exchange, trio.current_time()
        if now >= exchange.deadline:
            return _time_is_over()
        if not exchange.choices(now):
            return exchange.nobody()
        return Refused(
            503,
            "queue_timeout",
            f"No server has become free for {_shown(now - waiter.since)} s.",
            retry_after=self._drained_in(waiter.room, now),
        )

    def _drained_in(self, room: str | None, now: float) -> float:
        """Seconds until all have been served who wait now; they wait no longer than they may."""
        found = self._rooms.room(room)
        rate = found.rate.per_second(now)
        return self._bounded((len(found) + 1) / rate if rate is not None else math.inf)

    def _bounded(self, seconds: float) -> float:
        return max(1.0, min(seconds, self.limits.queue_timeout))

    def _key(self, model: str | None) -> str | None:
        return model if model is None or self._fleet.knows(model) else ANY_UNKNOWN

    # -- servers that become free -------------------------------------------------------------

    def freed(self, server: Server) -> None:
        """A lease on a server has been released."""
        now = trio.current_time()
        self._admit(now)
        if not server.at_cap:
            self._rooms.left_free(now, lambda room: not room or server.serves(room))

    def served(self, model: str | None, seconds: float) -> None:
        """A server has answered a request for the model completely, in so many seconds."""
        self._rooms.room(self._key(model)).quickest.add(seconds)

    def look(self, now: float) -> None:
        """Who may be asked may have changed."""
        if self._admitting:
            self._missed = True  # asking the fleet for candidates has brought us here again
            return
        self._admit(now)
        self._rooms.forget(self._fleet.knows)
        self._admitting = True
        try:
            self._dismiss(now)
        finally:
            self._admitting = False
        self._look_again(now)

    def _dismiss(self, now: float) -> None:
        """Send those away whose model nobody has any more, nor one that stands in for it."""
        knows = self._fleet.knows
        rooms = [
            room for room in self.rooms if room and not (room.model is None or knows(room.model))
        ]
        if not rooms or self._fleet.unheard:
            return  # a server that has not told its models yet may have these
        for room in rooms:
            for waiter in list(room):
                exchange = waiter.exchange
                model = exchange.request.facts.model
                if not (model is None or knows(model) or exchange.choices(now)):
                    self._send_away(waiter, exchange.nobody())

    def _look_again(self, now: float) -> None:
        if self._missed:
            self._missed = False
            self.look(now)

    def _admit(self, now: float) -> None:
        if not self._rooms:
            return
        self._admitting = True
        try:
            self._rooms.admit(now, lambda waiter: self._give(waiter, now))
        finally:
            self._admitting = False
        self._look_again(now)

    def _give(self, waiter: Waiter, now: float) -> bool:
        """Let it go on, if it can: with a server, or because it is to have none."""
        exchange = waiter.exchange
        if now + self._rooms.room(waiter.room).quickest.seconds > exchange.deadline:
            waiter.refused = _time_is_over()
        else:
            # of a request like this servers may have died since it came
            waiter.refused = exchange.poisonous(now)
        if waiter.refused is None:
            waiter.grant = self._grant(exchange, exchange.choices(now), now)
            if waiter.grant is None:
                return False
        waiter.given_up = waiter.grant is None
        waiter.woken.set()
        return True

    def _empty(self, room: Room[Waiter], refused: Callable[[], Refused] | None = None) -> None:
        """Send everybody away, with that there is no server if with nothing else."""
        for waiter in list(room):
            self._send_away(waiter, refused() if refused else waiter.exchange.nobody())

    def _send_away(self, waiter: Waiter, refused: Refused) -> None:
        self._rooms.leave(waiter)
        waiter.refused = refused
        waiter.woken.set()

    # -- configuration and end ----------------------------------------------------------------

    def apply(self, limits: LimitsConfig) -> None:
        """New limits: whoever may go on does at once; those who wait keep their places."""
        self.limits = limits
        self.look(trio.current_time())

    def close(self) -> None:
        """There are no limits any more: everybody goes on, or is told that there is no server."""
        self.look(trio.current_time())
        self._fleet.on_settled.remove(self.look)
        for room in self.rooms:
            self._empty(room)

    def stop(self, refused: Callable[[], Refused]) -> None:
        """The router is about to end: tell everybody who waits."""
        for room in self.rooms:
            self._empty(room, refused)


def _time_is_over() -> Refused:
    rule = RULES[Outcome.TOTAL_TIMEOUT]
    return Refused(rule.status, rule.code, rule.message)


def _shown(seconds: float) -> str:
    return f"{seconds:.3g}"
