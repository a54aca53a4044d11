"""One waiting order for all processes of a router.

Each process keeps the queue entries of all processes in its own `WaitingQueue`: its own, and those
read from the others' pages. A server goes to the entry whose turn it is, in whatever process. If
that is another process, this one leaves the server alone, wakes the other process, and continues
with the remaining capacity: a free unit is *promised* to an entry of another process, unless that
entry was considered since the unit became free and has not used it.

No process depends on the health of another. A process whose turn it is loses the turn

* if it makes no pass over the queue for SILENCE seconds, as if it was stopped: its entries are
  passed over until its next pass;
* if it still makes passes PATIENCE seconds after the server became free, but does not take it: it
  knows something else of the server, or does not know it yet.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from vllm_router.config.schema import Config
from vllm_router.errors import ConfigError
from vllm_router.proxy.admission import AdmissionQueue
from vllm_router.proxy.waiter import Peers, Waiter
from vllm_router.routing.queue.entry import OfferResult, QueueEntry, Route
from vllm_router.routing.queue.waiting_queue import ANY_UNKNOWN
from vllm_router.runtime.workers.fleet import SharedFleet
from vllm_router.runtime.workers.queue_board import SLOTS, Entry, FreeSlots, QueueBoard, mark
from vllm_router.runtime.workers.queue_wakeup import Wakeups

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server

logger = logging.getLogger(__name__)

PATIENCE = 0.25
"""Seconds for which a free server is reserved for a process that makes passes, but leaves it."""

SILENCE = 2.0
"""Seconds for which a free server is reserved for a process that makes no pass. Long enough for a
process that merely waits for the processor.
"""

LONGEST_STEP = 0.1
"""Seconds that count at most between two passes of this process: if the whole machine stood still,
no process was silent.
"""

_FOREVER = float("inf")
_NO_MODEL = mark("\0no model")


@dataclass(slots=True, eq=False, kw_only=True)
class RemoteEntry(QueueEntry):
    """A queue entry of another process. `models` are the usable models in order of preference."""

    slot: int
    queue_mark: int
    public: int
    route_mark: int
    models: tuple[str | None, ...] = ()


class _Hold(NamedTuple):
    """A free server is reserved for an entry of another process.

    Since this time, in successive passes. `awake` is the same time on the clock that only runs
    while this process does.
    """

    since: float
    awake: float


class _Reader:
    """The read position in another process's page, and its signs of life."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.epoch = -1
        self.seen = 0
        self.entries: dict[int, RemoteEntry] = {}
        self.heartbeat = 0
        self.heard = 0.0
        """Time of the last change of its heartbeat, on this process's awake clock."""
        self.silent = False


class QueuePeers:
    """`Peers` on a `QueueBoard`. `notify` wakes the process with a number."""

    def __init__(
        self,
        admission: AdmissionQueue,
        board: QueueBoard,
        number: int,
        notify: Callable[[int], None],
    ) -> None:
        self.number = number
        self.promised: Counter[Server] = Counter()
        self._admission = admission
        self._notify = notify
        self._page = board.pages[number]
        self._pages = board.pages
        self._readers = [_Reader(n) for n in range(len(board.pages)) if n != number]
        self._by_number = {reader.number: reader for reader in self._readers}
        self._free = FreeSlots()
        self._slots: dict[Waiter, int] = {}
        self._numbers: dict[int, QueueEntry] = {}
        self._routes: dict[Route, int] = {}
        self._route_marks = count(1)
        self._held: dict[RemoteEntry, _Hold] = {}
        self._holding: dict[RemoteEntry, _Hold] = {}
        self._awake = self._began = 0.0
        self._to_notify: set[int] = set()
        self._changed_at = 0
        self._names: dict[int, tuple[str | None, ...]] = {}
        self._names_of = -1
        self._page.reset()
        if isinstance(admission.fleet, SharedFleet):
            admission.fleet.counters.queue_page = self._page

    @property
    def waiting(self) -> int:
        """The number of this process's entries that are published."""
        return len(self._slots)

    # -- names --------------------------------------------------------------------------------

    def key(self, name: str) -> Hashable:
        return mark(name)

    def model_and_route(self, entry: QueueEntry) -> tuple[str | None, Route]:
        assert isinstance(entry, RemoteEntry)
        models = self._models(entry.public or entry.queue_mark)
        entry.models = models
        (model,) = self._models(entry.queue_mark)[:1]
        servers = frozenset[Hashable]().union(*(self._admission.serving(model) for model in models))
        return model, Route(servers, (entry.owner, entry.route_mark))

    def _models(self, name: int) -> tuple[str | None, ...]:
        """The models whose servers may serve a request for this model or public name."""
        if self._names_of != self._admission.generation:
            self._names_of = self._admission.generation
            self._names = self._all_names()
        return self._names.get(name, (ANY_UNKNOWN,))

    def _all_names(self) -> dict[int, tuple[str | None, ...]]:
        fleet = self._admission.fleet
        names: dict[int, tuple[str | None, ...]] = {_NO_MODEL: (None,)}
        for server in fleet.servers.values():
            for model in server.models or ():
                names[mark(model)] = (model,)
        for public, rule in fleet.names.rules.items():
            if rule.fallback is not None:
                chain = (public, *fleet.names.fallbacks(public))
                names[_public_mark(public)] = tuple(map(fleet.names.served, chain))
        return names

    # -- our entries --------------------------------------------------------------------------

    def is_full(self) -> bool:
        return not self._free

    def publish(self, waiter: Waiter, displaced: QueueEntry | None) -> None:
        if not self._free:
            return  # a retried request: keeps this process's own order
        slot = self._slots[waiter] = self._free.take()
        self._numbers[waiter.number] = waiter
        public = waiter.ticket.public_model
        entry = Entry(
            waiter.number,
            _NO_MODEL if waiter.model is None else mark(waiter.model),
            _public_mark(public) if public is not None else 0,
            mark(waiter.ticket.key),
            waiter.priority,
            waiter.returning,
            self._route_mark(waiter.route),
            displaced.number if displaced is not None else 0,
            0,
            0,
            0,
            int(waiter.since * 1e6),
        )
        self._page.write(slot, entry)
        if displaced is not None and displaced.owner != self.number:
            self._notify(displaced.owner)

    def _route_mark(self, route: Route) -> int:
        if len(self._routes) > len(self._slots) + 64:
            self._routes.clear()  # numbers are not reused, so that no number means two routes
        found = self._routes.get(route)
        if found is None:
            found = self._routes[route] = next(self._route_marks)
        return found

    def withdraw(self, waiter: Waiter) -> None:
        slot = self._slots.pop(waiter, None)
        if slot is None:
            return
        del self._numbers[waiter.number]
        server = waiter.grant[1].server if waiter.grant is not None else None
        self._page.end(slot, waiter.served_at, mark(server.url) if server is not None else 0)
        self._free.give_back(slot)

    def moved(self, waiter: Waiter) -> None:
        if waiter in self._slots:
            self.withdraw(waiter)
            self.publish(waiter, None)

    def displaced(self, entry: QueueEntry) -> None:
        self._numbers.pop(entry.number, None)

    # -- entries of the others ----------------------------------------------------------------

    def read_entries(self, now: float) -> None:
        for reader in self._readers:
            page = self._pages[reader.number]
            epoch = page.epoch
            if epoch != reader.epoch:
                self._forget(reader, now)
                reader.epoch, reader.seen = epoch, -1
            if page.changes == reader.seen:
                continue
            changes = page.changes
            slots = page.changed_since(reader.seen) if reader.seen >= 0 else None
            for slot in slots if slots is not None else page.used():
                self._read(reader, slot, page.read(slot), now)
            reader.seen = changes

    def _forget(self, reader: _Reader, now: float) -> None:
        """The process has died, and may have been replaced."""
        for remote in list(reader.entries.values()):
            self._drop(reader, remote, now)
        reader.silent = False

    def _drop(self, reader: _Reader, remote: RemoteEntry, now: float) -> None:
        """The entry has stopped waiting."""
        del reader.entries[remote.slot]
        if self._numbers.pop(remote.number, None) is not None:
            self._admission.queue.leave(remote, now)

    def _read(self, reader: _Reader, slot: int, entry: Entry, now: float) -> None:
        known = reader.entries.get(slot)
        if known is not None and known.number == entry.number:
            return
        if known is not None and known.number != -entry.number:
            self._drop(reader, known, now)  # its end was overwritten by a new entry
            known = None
        if entry.number == 0 or entry.epoch != reader.epoch:
            return
        queue = self._admission.queue
        queue.observe_stamp(abs(entry.number))
        if entry.number > 0:
            self._join(reader, slot, entry, now)
            return
        remote = known if known is not None else self._remote_entry(reader, slot, entry)
        served = self._server(entry) if entry.served else None
        if served is not None:
            queue.observe_stamp(entry.served)
            remote.server, remote.served_at = served, entry.served
        if known is not None:
            if served is not None and remote.number in self._numbers:
                queue.model_queue(remote.model).rate.freed(now)
            self._drop(reader, known, now)
        if served is not None:
            queue.record_turn(remote)

    def _remote_entry(self, reader: _Reader, slot: int, entry: Entry) -> RemoteEntry:
        remote = RemoteEntry(
            None,
            entry.priority,
            entry.key,
            entry.since / 1e6,
            _FOREVER,
            entry.returning,
            owner=reader.number,
            number=abs(entry.number),
            slot=slot,
            queue_mark=entry.queue,
            public=entry.public,
            route_mark=entry.route,
        )
        remote.model, remote.route = self.model_and_route(remote)
        return remote

    def _join(self, reader: _Reader, slot: int, entry: Entry, now: float) -> None:
        remote = self._remote_entry(reader, slot, entry)
        reader.entries[slot] = self._numbers[remote.number] = remote
        queue = self._admission.queue
        if not remote.returning and self._admission.fleet.candidates(remote.model, now):
            queue.model_queue(remote.model).rate.begin(now)
        queue.join(remote)
        displaced = self._numbers.get(entry.displaced) if entry.displaced else None
        if displaced is not None:
            self._admission.displace(displaced, now)

    def _server(self, entry: Entry) -> Server | None:
        for server in self._admission.fleet.servers.values():
            if mark(server.url) == entry.server:
                return server
        return None

    # -- handing out servers ------------------------------------------------------------------

    def changed(self, now: float) -> None:
        self._changed_at = int(now * 1e6)

    def begin(self, now: float) -> None:
        self.promised.clear()
        self._to_notify.clear()
        self._holding.clear()
        self._awake += min(now - self._began, LONGEST_STEP)
        self._began = now
        for reader in self._readers:
            heartbeat = self._pages[reader.number].heartbeat
            if heartbeat != reader.heartbeat:
                reader.heartbeat, reader.heard, reader.silent = heartbeat, self._awake, False

    def reserve(self, entry: QueueEntry, now: float) -> OfferResult:
        assert isinstance(entry, RemoteEntry)
        server = self._server_for(entry, now)
        if server is None:
            return OfferResult.BLOCKED
        hold = self._held.get(entry) or _Hold(now, self._awake)
        self._holding[entry] = hold
        if self._loses_turn(self._by_number[entry.owner], hold):
            return OfferResult.BLOCKED
        entry.server = server
        self.promised[server] += 1
        self._to_notify.add(entry.owner)
        return OfferResult.HELD

    def _loses_turn(self, reader: _Reader, hold: _Hold) -> bool:
        """Whether a process has had enough time for a server that is reserved for it."""
        if not reader.silent and self._awake - max(hold.awake, reader.heard) > SILENCE:
            reader.silent = True
            logger.warning(
                "%s has not served its waiting requests for %g s: "
                "other processes go first until it does",
                f"worker {reader.number}" if reader.number else "the leader",
                SILENCE,
            )
        return reader.silent or reader.heartbeat > (hold.since + PATIENCE) * 1e6

    def _server_for(self, remote: RemoteEntry, now: float) -> Server | None:
        """A server with a free unit that the entry's process has not passed over."""
        considered = self._pages[remote.owner].considered(remote.slot)
        for model in remote.models:
            candidates = self._admission.fleet.candidates(model, now)
            for server in candidates:
                free = server.in_flight + self.promised[server] < server.cap
                if free and considered <= self._available_since(server):
                    return server
            if candidates:
                return None
        return None

    def _available_since(self, server: Server) -> int:
        released = max([page.released(mark(server.url)) for page in self._pages])
        return max(released, self._changed_at)

    def passed_over(self, waiter: Waiter, now: float) -> None:
        slot = self._slots.get(waiter)
        if slot is not None:
            self._page.consider(slot, int(now * 1e6))

    def end(self, now: float) -> None:
        self._page.beat(int(now * 1e6))
        self._held, self._holding = self._holding, self._held
        for number in self._to_notify:
            self._notify(number)

    def freed(self, server: Server, now: float) -> None:
        self._page.release(mark(server.url), int(now * 1e6))


class SharedQueue:
    """Access of the process with this `number` to the common waiting order."""

    def __init__(self, board: QueueBoard, number: int, wakeups: Wakeups) -> None:
        self._board = board
        self._number = number
        self.wakeups = wakeups

    def make_peers(self, admission: AdmissionQueue) -> Peers:
        """The peers of a new queue; the previous queue has refused its requests."""
        return QueuePeers(admission, self._board, self._number, self.wakeups.notify)


def check_limits(config: Config) -> None:
    """Raises ConfigError if `queue_size` exceeds the size of the shared queue."""
    if config.limits is not None and config.limits.queue_size > SLOTS:
        size = config.limits.queue_size
        raise ConfigError(
            [f"limits.queue_size: expected at most {SLOTS} with --workers, got {size}"]
        )


def _public_mark(name: str) -> int:
    return mark(f"\0public {name}")
