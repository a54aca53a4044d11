"""Admission control where `[limits]` are set: no server above its cap, further requests queue.

Only this module gives servers to requests then, in one synchronous step: every event that may free
a server (an attempt ends, the probes report, the configuration changes) finds the request whose
turn it is, takes the lease for it and wakes its task alone. No task polls or is woken in vain, and
no request overtakes another.

In a router of several processes the requests of all processes are in one order; `Peers` shares it.
The process of the next request takes the server, the others leave it free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import trio

from vllm_router.config.limits import LimitsConfig
from vllm_router.errors import Refused
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State, Transition
from vllm_router.proxy import admission_refusals as refusals
from vllm_router.proxy.session_admission import CHECK_EVERY, SessionAdmission
from vllm_router.proxy.waiter import Grant, Peers, Ticket, Waiter
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.routing.queue.drain_rate import MARGIN
from vllm_router.routing.queue.entry import OfferResult, QueueEntry, Route
from vllm_router.routing.queue.model_queue import ModelQueue
from vllm_router.routing.queue.waiting_queue import ANY_UNKNOWN, WaitingQueue

PeersMaker = Callable[["AdmissionQueue"], Peers]

_IN_SERVICE = (State.UP, State.FULL)
_NONE: Mapping[Server, int] = {}


class Queue(NamedTuple):
    """The state of one model's queue.

    The number of requests, the wait of the first in seconds, and how many servers become free per
    second, if known.
    """

    model: str | None
    waiting: int
    longest: float
    freed_per_s: float | None


class AdmissionQueue:
    """Admits requests to servers. `limits` are the current ones.

    `make_peers` connects the queue with the queues of the router's other processes.
    """

    def __init__(
        self, fleet: Fleet, limits: LimitsConfig, make_peers: PeersMaker | None = None
    ) -> None:
        self.limits = limits
        self.fleet = fleet
        self.generation = 0
        """Incremented when servers join, leave or change what they accept."""
        self._waiters = 0
        self._sessions = SessionAdmission(limits)
        self._admitting = self._missed_change = False
        self._seen_servers: list[tuple[object, ...]] = []
        self._serving: dict[str | None, frozenset[Server]] = {}
        self._peers = make_peers(self) if make_peers is not None else None
        self.queue: WaitingQueue[QueueEntry] = WaitingQueue(
            self._peers.number if self._peers is not None else 0
        )
        self.fleet.on_settled.append(self.candidates_changed)
        self.fleet.on_transition.append(self._server_changed)

    @property
    def model_queues(self) -> list[ModelQueue[QueueEntry]]:
        """The queues in which a request waits or has waited, with the one for ANY_UNKNOWN."""
        return list(self.queue.model_queues.values())

    def queues(self, now: float) -> list[Queue]:
        """The state of all queues, with the requests of all processes. O(queues)."""
        self._read_peers(now)
        return [
            Queue(
                queue.model,
                len(queue),
                now - queue.oldest if queue.oldest is not None else 0.0,
                queue.rate.per_second(now),
            )
            for queue in self.model_queues
        ]

    @property
    def holds_waiters(self) -> bool:
        """Whether requests of this process wait."""
        return self._waiters > 0

    @property
    def waiting(self) -> int:
        """The number of waiting requests, of all models and processes."""
        return len(self.queue)

    def ahead(self, model: str | None, priority: int = 0) -> tuple[int, bool]:
        """The number of requests before a new one without a key, and whether that may wait."""
        queue = self.queue.model_queues.get(self.queue_name(model))
        size = self.limits.queue_size
        if queue is None:
            return 0, size > 0
        key = self._key("")
        may_wait = queue.waiting < size or queue.displaced_by(priority, key) is not None
        return queue.before(priority, key), may_wait

    # -- one request --------------------------------------------------------------------------

    async def pass_through(self, ticket: Ticket, candidates: Sequence[Server], now: float) -> Grant:
        """Lease a server for a request, perhaps after a wait. The caller releases the lease.

        Raises Refused if the queue is full, or the request has waited too long.
        """
        if self._peers is not None:
            self._read_peers(now)
            self._repeat_if_missed(now)
            # After the queue: a request that has left it may have got a server.
            self.fleet.refresh_leases()
        waiter = None
        if self._sessions.must_queue(ticket, self.queue_name(ticket.info.model)):
            grant = None
        elif self._peers is None or not self.queue:
            # A free server cannot be of use to waiting requests: they would have it.
            grant = self._grant(ticket, candidates, now)
        else:
            waiter = self._waiter(ticket, now)
            grant = self._at_once(waiter, now)
        if grant is not None:
            return grant
        if waiter is None:
            waiter = self._waiter(ticket, now)
        displaced = self._check_room(waiter, bool(candidates), now)
        self.queue.join(waiter)
        if self._peers is not None:
            self._peers.publish(waiter, displaced)
        return await self._wait(waiter, now)

    def _at_once(self, waiter: Waiter, now: float) -> Grant | None:
        """Lease a server at once, if this request is next in order. Raises Refused."""
        self.queue.join(waiter)
        self._admit(now)
        if waiter.refused is not None:
            raise waiter.take_refusal()
        if waiter.grant is None:
            self.queue.leave(waiter, now)
        return waiter.grant

    async def _wait(self, waiter: Waiter, now: float) -> Grant:
        self._waiters += 1
        sessions, is_new, queue = self._sessions, self._sessions.is_new(waiter.ticket), waiter.model
        sessions.waits(queue, is_new)
        try:
            with trio.move_on_at(waiter.until):
                while is_new and not waiter.woken.is_set():
                    with trio.move_on_after(CHECK_EVERY):
                        await waiter.woken.wait()
                    if sessions.check_is_due(trio.current_time()):
                        self._admit(trio.current_time())
                await waiter.woken.wait()
        except trio.Cancelled:
            if waiter.grant is not None:
                policy, lease = waiter.grant
                lease.release()
                policy.ended(lease, trio.current_time(), failed=False)
                self.attempt_ended(waiter.ticket.info, trio.current_time())
                self.freed(lease.server)
            raise
        finally:
            self._waiters -= 1
            sessions.waits(queue, -is_new)
            then = trio.current_time()
            waiter.ticket.waited(then - now)
            if waiter.grant is None and waiter.refused is None:
                self._leave(waiter, then)
        if waiter.grant is None:
            raise waiter.take_refusal() if waiter.refused is not None else self._timed_out(waiter)
        return waiter.grant

    def _grant(
        self,
        ticket: Ticket,
        candidates: Sequence[Server],
        now: float,
        promised: Mapping[Server, int] = _NONE,
    ) -> Grant | None:
        """Choose and lease a server in one step, if one is below its cap.

        `promised`: slots of servers that are reserved for other requests.
        """
        policy, info, sessions = ticket.policy, ticket.info, self._sessions
        begins = sessions.is_new(ticket)
        choice = None
        if not (promised or begins) and policy.skips_full(candidates):
            # In a large fleet a list of the free servers would cost more than the choice.
            if all(server.at_cap for server in candidates):
                return None
            choice = policy.pick(candidates, info, now)
        if choice is None or choice[0].at_cap:
            free: Sequence[Server] = [server for server in candidates if not server.at_cap]
            if promised:
                free = [one for one in free if one.in_flight + promised.get(one, 0) < one.cap]
            free = sessions.fitting(ticket, free, now)
            if not free:
                return None
            # Policies recognise unchanged candidates by the identity of the tuple.
            among = candidates if len(free) == len(candidates) else free
            choice = policy.pick(among, info, now) if len(free) > 1 else (free[0], None)
        server, note = choice
        lease = server.lease(now)
        try:
            policy.leased(lease, note, info, now)
        except BaseException:
            lease.release()
            raise
        sessions.begin(info, server, now)
        return policy, lease

    def attempt_ended(self, info: RoutingInfo, now: float) -> None:
        """An attempt of an admitted request has ended."""
        self._sessions.end(info, now)

    def _route(self, ticket: Ticket, now: float) -> Route:
        return self._sessions.route(ticket, ticket.route(self.serving, now))

    def _waiter(self, ticket: Ticket, now: float) -> Waiter:
        limits = self.limits
        return Waiter(
            self.queue_name(ticket.info.model),
            ticket.priority if limits.client_priority else 0,
            self._key(ticket.key),
            now,
            min(now + limits.queue_timeout, ticket.deadline),
            ticket.returning,
            self._route(ticket, now),
            self._peers.number if self._peers is not None else 0,
            ticket=ticket,
        )

    def _key(self, name: str) -> object:
        return name if self._peers is None else self._peers.key(name)

    def _check_room(self, waiter: Waiter, any_server: bool, now: float) -> QueueEntry | None:
        """Check that a new request may wait. Returns the request that it displaces, if any.

        Raises Refused if the queue is full, or the wait would be too long.
        """
        if waiter.returning:
            return None  # it was admitted before: it precedes new requests
        limits, queue = self.limits, self.queue.model_queue(waiter.model)
        if any_server:
            queue.rate.begin(now)
        else:
            queue.rate.end(now)
        if self._peers is not None and self._peers.is_full():
            raise refusals.process_full(self.waiting, self._drained_in(queue, now))
        displaced = None
        if queue.waiting >= limits.queue_size:
            displaced = queue.displaced_by(waiter.priority, waiter.key)
            if displaced is None:
                raise self._full(waiter, queue, any_server, now)
        ahead, rate = queue.before(waiter.priority, waiter.key), queue.rate.per_second(now)
        if ahead and any_server and rate is not None and queue.rate.is_current:
            wait = (ahead + 1) / rate
            left = waiter.ticket.deadline - now - queue.shortest.seconds(now)
            most = min(limits.queue_timeout, left / MARGIN)
            if wait > most:
                raise refusals.too_long(wait, most, self._bounded(wait - most))
        if displaced is not None:
            self.displace(displaced, now)
        return displaced

    def _full(
        self, waiter: Waiter, queue: ModelQueue[QueueEntry], any_server: bool, now: float
    ) -> Refused:
        """429 if the servers are at their caps, 503 if there is no server."""
        if not any_server:
            return waiter.ticket.no_server()
        return refusals.full(self.limits.queue_size, self._drained_in(queue, now))

    def displace(self, entry: QueueEntry, now: float) -> None:
        """Remove a request in favour of one that precedes it."""
        if not isinstance(entry, Waiter):
            self.queue.leave(entry, now)
            if self._peers is not None:
                self._peers.displaced(entry)
            return
        queue = self.queue.model_queue(entry.model)
        some = entry.ticket.candidates(now)
        refused = refusals.displaced(self._drained_in(queue, now))
        self._refuse(entry, refused if some else entry.ticket.no_server(), now)

    def _timed_out(self, waiter: Waiter) -> Refused:
        """The refusal of a request that has waited as long as it may."""
        ticket, now = waiter.ticket, trio.current_time()
        if now >= ticket.deadline:
            return refusals.past_deadline()
        if not ticket.candidates(now):
            return ticket.no_server()
        drained_in = self._drained_in(self.queue.model_queue(waiter.model), now)
        return refusals.timed_out(now - waiter.since, drained_in)

    def _drained_in(self, queue: ModelQueue[QueueEntry], now: float) -> float:
        """Seconds until the queue is empty, at most the time that requests may wait."""
        rate = queue.rate.per_second(now)
        return self._bounded((len(queue) + 1) / rate if rate is not None else math.inf)

    def _bounded(self, seconds: float) -> float:
        return max(1.0, min(seconds, self.limits.queue_timeout))

    # -- models -------------------------------------------------------------------------------

    def queue_name(self, model: str | None) -> str | None:
        """The queue of a model: its own if a server lists it, else the one for unknown models."""
        return model if model is None or self.fleet.knows(model) else ANY_UNKNOWN

    def serving(self, model: str | None) -> frozenset[Server]:
        """All servers that have the model, or may have it, in any state."""
        found = self._serving.get(model)
        if found is None:
            servers = self.fleet.servers.values()
            found = frozenset(s for s in servers if model is None or s.serves(model))
            if model is None or self.fleet.knows(model):
                self._serving[model] = found
        return found

    def _follow_servers(self, now: float) -> None:
        """Renew the routes of waiting requests after a change of the servers.

        They have joined, left or changed what they accept. O(servers), and O(waiting) after a
        change.
        """
        lists: list[tuple[object, ...]] = [
            (server, server.models, server.lengths, server.refusals.active(now))
            for server in self.fleet.servers.values()
        ]
        lists.append((self.fleet.names,))
        if lists == self._seen_servers:
            return
        self._seen_servers = lists
        self.generation += 1
        self._serving.clear()
        for queue in self.model_queues:
            for entry in list(queue):
                if isinstance(entry, Waiter):
                    ticket = entry.ticket
                    new_name = self.queue_name(ticket.info.model)
                    new_route = self._route(ticket, now)
                else:
                    assert self._peers is not None
                    new_name, new_route = self._peers.model_and_route(entry)
                if (new_name, new_route) != (entry.model, entry.route):
                    self.queue.move(entry, new_name, new_route, now)
                    if self._peers is not None and isinstance(entry, Waiter):
                        self._peers.moved(entry)

    # -- servers that become free -------------------------------------------------------------

    def freed(self, server: Server) -> None:
        """A lease on a server has been released."""
        now = trio.current_time()
        if self._peers is not None:
            self._peers.freed(server, now)
            self._read_peers(now)
        self._admit(now)
        if not server.at_cap:
            self.queue.server_left_free(now, lambda model: not model or server.serves(model))

    def served(self, model: str | None, seconds: float) -> None:
        """A server has completed a response for the model, after `seconds`."""
        queue = self.queue.model_queue(self.queue_name(model))
        queue.shortest.add(seconds, trio.current_time())

    def follow_peers(self, now: float) -> None:
        """Take over changes of the other processes, and admit requests."""
        self._read_peers(now)
        self._admit(now)
        self._repeat_if_missed(now)

    def _read_peers(self, now: float) -> None:
        """Take over the waiting requests of the other processes."""
        if self._peers is not None:
            admitting, self._admitting = self._admitting, True
            try:
                self._peers.read_entries(now)
            finally:
                self._admitting = admitting

    def candidates_changed(self, now: float) -> None:
        """The candidates may have changed: admit and dismiss waiting requests."""
        if self._admitting:
            self._missed_change = True  # called by the fleet, which was asked for candidates
            return
        if self._peers is not None:
            self._peers.changed(now)
            self._read_peers(now)
        self._follow_servers(now)
        self._admit(now)
        self.queue.drop_unknown_models(self.fleet.knows)
        self._admitting = True
        try:
            self._dismiss(now)
        finally:
            self._admitting = False
        self._repeat_if_missed(now)

    def _dismiss(self, now: float) -> None:
        """Refuse requests whose model, and fallback models, no server has any more."""
        knows = self.fleet.knows
        queues = [
            queue
            for queue in self.model_queues
            if queue and not (queue.model is None or knows(queue.model))
        ]
        if not queues or self.fleet.without_models:
            return  # a server whose models are unknown yet may have them
        for waiter in [entry for queue in queues for entry in queue if isinstance(entry, Waiter)]:
            ticket = waiter.ticket
            model = ticket.info.model
            if not (model is None or knows(model) or ticket.candidates(now)):
                self._refuse(waiter, ticket.no_server(), now)

    def _repeat_if_missed(self, now: float) -> None:
        """Handle a change that came while requests were being admitted."""
        if self._missed_change:
            self._missed_change = False
            self.candidates_changed(now)

    def _admit(self, now: float) -> None:
        if not self.queue:
            return
        peers = self._peers
        self._admitting = True
        try:
            if peers is None:
                self.queue.admit(now, lambda entry: self._serve(entry, now))
            else:
                # One state for the whole pass, read after the queue: a server that is released
                # meanwhile is not for the requests in the rest of the pass alone.
                self.fleet.refresh_leases()
                self.fleet.frozen = True
                peers.begin(now)
                for entry in self.queue.admit(now, lambda entry: self._serve(entry, now)):
                    if isinstance(entry, Waiter):
                        peers.withdraw(entry)
                peers.end(now)
        finally:
            self._admitting = self.fleet.frozen = False
        self._repeat_if_missed(now)

    def _serve(self, entry: QueueEntry, now: float) -> OfferResult:
        """Give a waiting request a server, or a refusal, if possible."""
        peers = self._peers
        if not isinstance(entry, Waiter):
            assert peers is not None
            return peers.reserve(entry, now)
        ticket = entry.ticket
        if now + self.queue.model_queue(entry.model).shortest.seconds(now) > ticket.deadline:
            entry.refused = refusals.past_deadline()
        else:
            # An equal request may have crashed servers since this one arrived.
            entry.refused = ticket.rejection(now)
        if entry.refused is not None:
            entry.woken.set()
            return OfferResult.DISMISSED
        candidates = ticket.candidates(now)
        try:
            entry.grant = self._grant(ticket, candidates, now, peers.promised if peers else _NONE)
        except Exception as error:  # noqa: BLE001 (raised in the task of the request)
            # Not in the task of the request whose end has freed the server.
            entry.refused = error
            entry.woken.set()
            return OfferResult.DISMISSED
        if entry.grant is None:
            if peers is not None and all(server.at_cap for server in candidates):
                peers.passed_over(entry, now)
            return OfferResult.BLOCKED
        entry.server = entry.grant[1].server
        entry.woken.set()
        return OfferResult.SERVED

    def _refuse(self, waiter: Waiter, refused: Refused, now: float) -> None:
        self._leave(waiter, now)
        waiter.refused = refused
        waiter.woken.set()

    def _leave(self, waiter: Waiter, now: float) -> None:
        self.queue.leave(waiter, now)
        if self._peers is not None:
            self._peers.withdraw(waiter)

    # -- configuration and end ----------------------------------------------------------------

    def _server_changed(self, change: Transition) -> None:
        """Reset the measured rates when a server enters or leaves service."""
        if change.old in _IN_SERVICE and change.new in _IN_SERVICE:
            return
        server = self.fleet.servers.get(change.server)
        self.queue.reset_rates(
            trio.current_time(), lambda model: not model or server is None or server.serves(model)
        )

    def apply(self, limits: LimitsConfig) -> None:
        """Apply new limits. Requests that are admitted go on at once, the others stay in order."""
        self.limits = limits
        self._sessions.apply(limits)
        now = trio.current_time()
        self.queue.reset_rates(now, lambda model: True)
        self.candidates_changed(now)

    def close(self) -> None:
        """Limits were removed: admit all requests, or refuse them if there is no server."""
        self.candidates_changed(trio.current_time())
        self.fleet.on_settled.remove(self.candidates_changed)
        self.fleet.on_transition.remove(self._server_changed)
        self._empty(lambda waiter: waiter.ticket.no_server())

    def stop(self, refused: Callable[[], Refused]) -> None:
        """The router shuts down: refuse all waiting requests."""
        self._empty(lambda waiter: refused())

    def _empty(self, refused: Callable[[Waiter], Refused]) -> None:
        now = trio.current_time()
        for queue in self.model_queues:
            for entry in list(queue):
                if isinstance(entry, Waiter):
                    self._refuse(entry, refused(entry), now)
