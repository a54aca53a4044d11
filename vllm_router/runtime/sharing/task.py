"""The task that connects a router with the store of its fleet.

A turn every PERIOD: one round trip writes the batch of this router and reads the others'. A store
that is gone, frozen, slow, full, restarted or lying ends or delays turns; no request notices. What
the others write meanwhile is read when the store is back, from the last entry that was read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from secrets import token_bytes

import msgspec
import trio

from vllm_router.config.shared import SharedConfig
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.proxy.key_limits import KeyLimits
from vllm_router.routing.sharing.drains import Drains
from vllm_router.routing.sharing.messages import (
    About,
    BadBatch,
    Batch,
    ServerLevel,
    decode,
    encode,
)
from vllm_router.routing.sharing.outbox import Outbox
from vllm_router.routing.sharing.peers import Peers
from vllm_router.routing.sharing.scrapes import SharedScrapes
from vllm_router.routing.sharing.status import SharedStatus
from vllm_router.runtime.sharing.store import (
    BEGINNING,
    ENTRIES_PER_TURN,
    LATEST,
    EntryId,
    OpenStore,
    Store,
    StoreError,
    TooMuchToRead,
    Turn,
)

logger = logging.getLogger(__name__)

PERIOD = 0.2
"""Seconds between two turns."""

RETRY_AFTER = 0.5
"""Seconds after a failure before the store is tried again."""

WARM_UP = 300.0
"""Seconds of the past that a router reads when it starts."""

LATE = 1.0
"""Seconds without a turn after which sharing counts as down."""

MAX_READS = 200
"""Reads in a row until all of the past has been read; the log has half as many."""

NOT_CONNECTED = "not connected yet"

STEPS, STEP_BYTES = 10, 2048
"""Batches that are applied in one turn of the event loop; a large one counts as several: a full one
takes 4 ms."""

Levels = Callable[[], Mapping[str, ServerLevel]]
Heard = Callable[[Batch, float, bool], None]


def _ignore(*_: object) -> None:
    """The callback until one is set."""


class SharedState:
    """Implements the router's part of `[shared]`; `run` is the task.

    `about` describes this router, `levels` returns its requests by server URL. `open_store`
    connects to the store.

    problem: why nothing is shared now; empty while all is well.
    heard: called with each batch of another router, its age in seconds, and whether it is of the
        time before this router listened.
    on_routers: called when the number changes among which the limits of keys are divided.
    """

    def __init__(
        self,
        fleet: Fleet,
        usage: KeyLimits,
        peers: Peers,
        settle: Callable[[float], None],
        outbox: Outbox,
        about: Callable[[], About],
        levels: Levels,
        scrapes: SharedScrapes,
        open_store: OpenStore,
    ) -> None:
        self.problem = NOT_CONNECTED
        self.heard: Heard = _ignore
        self.on_routers: Callable[[int], None] = _ignore
        self.dropped_batches = 0
        self.failures = 0
        self.config: SharedConfig | None = None
        self._fleet = fleet
        self._usage = usage
        self._peers = peers
        self._settle = settle
        self._outbox = outbox
        self._about = about
        self._levels = levels
        self._scrapes = scrapes
        self._open = open_store
        self._drains = Drains()
        self._applied: dict[Server, bytes] = {}
        self._read: EntryId = BEGINNING
        self._unsent: tuple[Batch, float] | None = None
        self._turn_at = trio.current_time()
        self._answered = False
        self._warm_until: int | None = None
        self._listens_since: float | None = None
        self._behind = True
        self._warm_up = WARM_UP
        self._clock = 0.0
        self._routers = 1
        self._changed = trio.Event()
        self._scope = trio.CancelScope()
        self._reported = False
        scrapes.connect(outbox.router, lambda: self.up)

    # -- configuration and orders -------------------------------------------------------------

    def use(self, config: SharedConfig | None) -> None:
        """Follow a configuration; another store is connected to at once.

        Until it answers, the limits of keys are divided among as many routers as before.
        """
        if config == self.config:
            return
        self.config = config
        self.problem = NOT_CONNECTED
        if config is None:
            self._routers = 1
        self._divide()
        self._read, self._warm_until, self._unsent = BEGINNING, None, None
        self._listens_since = None
        self._answered, self._reported, self._behind = False, False, True
        self._changed.set()
        self._scope.cancel(reason="another configuration")

    def drain(self, server: Server, *, on: bool) -> None:
        """An operator drains a server of this router, or takes it back."""
        self._applied[server] = self._drains.order(
            server.url, token_bytes(8), trio.current_time(), on=on
        )

    # -- figures ------------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        """Whether this router exchanges state with the others."""
        return not self.problem and trio.current_time() - self._turn_at <= LATE

    @property
    def routers(self) -> int:
        """The routers of the fleet, this one included; the last known number while not `up`."""
        return self._routers

    @property
    def peers(self) -> Peers:
        return self._peers

    def status(self) -> SharedStatus | None:
        """For display; None without `[shared]` in the configuration."""
        config, now = self.config, trio.current_time()
        if config is None:
            return None
        up = self.up
        return SharedStatus(
            store=str(config.address),
            fleet=config.fleet,
            own=self._about(),
            up=up,
            problem="" if up else self.problem or f"no answer for {now - self._turn_at:.1f} s",
            age=now - self._turn_at if self._answered else None,
            routers=self._peers.views(now),
            in_flight=self._peers.in_flight,
            count=self._routers,
            failures=self.failures,
            dropped=self.dropped_batches,
            unsent=self._outbox.dropped,
            spared=self._scrapes.spared,
        )

    # -- the task -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Share until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            while True:
                config = self.config
                if config is None:
                    self._changed = trio.Event()
                    await self._changed.wait()
                    continue
                with trio.CancelScope() as self._scope:
                    try:
                        await self._open(config, self._talk)
                    except TooMuchToRead as error:
                        # It would be as long next time: go on with what comes from now on.
                        self._read = BEGINNING
                        self._warm_up = 0.0
                        self._failed(str(error))
                    except StoreError as error:
                        self._failed(str(error))
                    await trio.sleep(RETRY_AFTER)

    async def _watch(self) -> None:
        """Notice a turn that takes too long, and forget routers that are silent."""
        while True:
            await trio.sleep(LATE / 2)
            now = trio.current_time()
            if self.config is not None and now - self._turn_at > LATE and not self.problem:
                self._failed(f"no answer for {now - self._turn_at:.1f} s")
            if not self.up:
                self._settle(now)

    def _failed(self, problem: str) -> None:
        self.failures += 1
        self.problem, self._behind = problem, True
        self._divide()
        # One line until it is up again; a store that is gone fails twice a second.
        if not self._reported:
            self._reported = True
            logger.warning(
                "shared state is down: %s: %s; requests go on, key limits are divided by %d",
                self.config.address if self.config is not None else "",
                problem,
                self._routers,
            )

    def _divide(self) -> None:
        routers = 1 if self.up else self._routers
        if routers != self._usage.routers:
            self._usage.routers = routers
            self.on_routers(routers)

    async def _talk(self, store: Store) -> None:
        """Take turns until one fails. Raises StoreError."""
        while True:
            began = trio.current_time()
            more, reads = await self._take_turn(store), 0
            while more and reads < MAX_READS:
                more, reads = await self._take_turn(store, only_read=True), reads + 1
            self._behind = bool(self.problem)
            now = trio.current_time()
            self._settle(now)
            if self.up:
                self._routers = 1 + self._peers.count(now)
            self._scrapes.follow(self._peers.others(now))
            self._divide()
            await trio.sleep(max(0.01, began + PERIOD - trio.current_time()))

    async def _take_turn(self, store: Store, *, only_read: bool = False) -> bool:
        """One round trip; True if there is more to read."""
        batch, records = None, {}
        if not only_read:
            batch = encode(self._next_batch())
            # After an outage the store is read first: it may have later orders.
            records = {} if self._behind else self._drains.unsent(self._clock)
        if self._read == BEGINNING:
            turn = await store.turn(None, {}, LATEST)
            self._begin(turn)
            return True
        turn = await store.turn(batch, records, self._read)
        now = self._turn_at = trio.current_time()
        self._answered, self._clock = True, turn.now / 1000 - now
        if self._behind:
            self._drains.drop_outdated(turn.drains, self._clock, now)
        # The map was read before the records were written: they do not count as written yet.
        self._follow_drains(turn.drains)
        if batch is not None:
            self._wrote(turn, records)
        return await self._apply(turn)

    def _begin(self, turn: Turn) -> None:
        """The first answer has the store's clock: read from some minutes ago on."""
        self._warm_until = turn.now
        if self._listens_since is None:
            self._listens_since = trio.current_time()
        self._read = (max(1, turn.now - int(self._warm_up * 1000)), 0)
        self._warm_up = WARM_UP

    def _next_batch(self) -> Batch:
        """The batch that could not be sent, else a new one.

        One that has waited has lasting facts only. It keeps its number: the store may have taken it
        after all.
        """
        now = trio.current_time()
        if self._unsent is not None:
            batch, made_at = self._unsent
            if now - made_at <= LATE:
                return batch
            return msgspec.structs.replace(batch, servers={}, keys={}, ejected=[], figures={})
        keys = {name: (admitted, running) for name, admitted, running in self._usage.own()}
        figures = self._scrapes.take(now)
        batch = self._outbox.batch(self._about(), self._levels(), keys, now, figures)
        self._unsent = batch, now
        return batch

    def _wrote(self, turn: Turn, records: Mapping[str, bytes]) -> None:
        if turn.written is None:
            self._failed(f"the store takes no entries: {turn.problem}")
            return
        self._unsent = None
        if turn.written < self._read:
            # The log is younger than what was read: the store was emptied, or its clock set back.
            self._read = (0, 1)
        if not turn.problem:
            self._drains.written(records)
        if self.problem:
            logger.info("shared state is up: %s", self.config.address if self.config else "")
            self.problem = ""
        self._reported = False

    def _follow_drains(self, stored: Mapping[bytes, bytes]) -> None:
        self._drains.read(stored)
        changed = False
        for url, record, on in self._drains.records():
            server = self._fleet.by_url(url)
            if server is None or self._applied.get(server) == record:
                continue
            self._applied[server] = record
            if server.draining is not on:
                logger.info(
                    "server %s: %s, by another router",
                    server.name,
                    "drained" if on else "undrained",
                )
                server.drain(on)
                changed = True
        if changed:
            self._fleet.settle(trio.current_time())
        if len(self._applied) > 2 * len(self._fleet.servers) + 100:
            known = set(self._fleet.servers.values())
            self._applied = {one: record for one, record in self._applied.items() if one in known}

    async def _apply(self, turn: Turn) -> bool:
        now = trio.current_time()
        steps = 0
        for identifier, content in turn.entries:
            self._read = max(self._read, identifier)
            steps += 1 + len(content) // STEP_BYTES
            if content:
                self._hear(identifier, content, turn, now)
            if steps >= STEPS:
                steps = 0
                await trio.lowlevel.checkpoint()
        return len(turn.entries) >= ENTRIES_PER_TURN

    def _hear(self, identifier: EntryId, content: bytes, turn: Turn, now: float) -> None:
        try:
            batch = decode(content)
        except BadBatch as error:
            self.dropped_batches += 1
            if self.dropped_batches == 1:
                logger.warning(
                    "shared state: dropped a batch: %s (further ones are counted)", error
                )
            return
        if batch.router == self._outbox.router:
            return
        age = (turn.now - identifier[0]) / 1000
        past = self._warm_until is not None and identifier[0] < self._warm_until
        if self._behind and age < -LATE:
            # The store's clock was set back: among what waited, an entry does not tell its age.
            age, past = WARM_UP, True
        age = max(0.0, age)
        if batch.interrupted and self._listened_before(now - age - batch.interrupted):
            batch = msgspec.structs.replace(batch, interrupted=0.0)
        self._peers.hear(batch, now, age, past=past)
        self.heard(batch, age, past)

    def _listened_before(self, moment: float) -> bool:
        """Whether this router was one of the fleet then, and has had its part of the limits."""
        return self._listens_since is not None and self._listens_since < moment
