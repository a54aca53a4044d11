"""Merges the batches of other processes into this process's view of the fleet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import msgspec

from vllm_router.routing.owners import Entry
from vllm_router.routing.sharing.messages import (
    MAX_ITEMS,
    About,
    Batch,
    Figures,
    KeyUse,
    ServerLevel,
    unpack_blocks,
)
from vllm_router.routing.sharing.outbox import CONTINUOUS, summed_levels

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.policy_set import PolicySet

GONE_AFTER = 1.0
"""Seconds of silence after which the requests of a process count for nothing."""

FORGOTTEN_AFTER = 60.0
"""Seconds of silence after which a process is not shown any more."""

MAX_PEERS = 128
"""Processes that are followed at a time. The longest silent one makes room for a new one."""

RATE_WEIGHT = 0.1
"""Weight of the time since the last batch in the rate of a router, per second."""


class Effects(Protocol):
    """Effects of other routers' batches, apart from the policies."""

    def spent(self, key: str, requests: int, at: float) -> None:
        """Requests of this API key were admitted elsewhere."""

    def spent_unheard(self, key: str, requests: int, at: float) -> None:
        """Requests were admitted elsewhere in an interruption that ended at `at`."""

    def running(self, requests: dict[str, int]) -> None:
        """The running requests of API keys elsewhere, of all keys that have any."""

    def ejected(self, server: Server, now: float) -> None:
        """Another router has just ejected the server: a hint, no order."""

    def quarantined(self, digest: bytes, age: float, now: float) -> None:
        """A request has crashed servers elsewhere, `age` seconds ago."""

    def owner(self, entry: Entry) -> None:
        """A server has stored a response."""

    def scraped(self, router: str, figures: Mapping[str, Figures], at: float, now: float) -> None:
        """Another router has announced the figures of servers at `at`."""


class Peer:
    """One other process.

    sibling: whether it is a process of the same router.
    heard_at: when its last batch was written, on this process's clock.
    rate: its finished attempts per second.
    """

    def __init__(self, router: str, *, sibling: bool) -> None:
        self.router = router
        self.sibling = sibling
        self.about = About("", "", "", 0.0, 0)
        self.number = 0
        self.heard_at = float("-inf")
        self.servers: dict[str, ServerLevel] = {}
        self.keys: dict[str, KeyUse] = {}
        self.rate = 0.0

    def follow(self, batch: Batch, at: float) -> None:
        """Take over the levels."""
        elapsed = at - self.heard_at
        if elapsed <= CONTINUOUS:
            weight = min(1.0, RATE_WEIGHT * elapsed)
            served = max(0, batch.about.served - self.about.served)
            if elapsed > 0:
                self.rate += weight * (served / elapsed - self.rate)
        self.about, self.number, self.heard_at = batch.about, batch.number, at
        self.servers = batch.servers


class RouterView(msgspec.Struct, frozen=True, kw_only=True):
    """Another router, for display.

    silent: seconds since its last batch was written.
    in_flight: its requests; 0 if it has been silent for GONE_AFTER.
    """

    router: str
    about: About
    silent: float
    in_flight: int
    rate: float
    live: bool


class Peers:
    """All other processes. Times are arguments, in seconds.

    `server_at` finds a server of this process's fleet by its URL. Without `effects` only the
    policies follow the batches.

    outdated, unknown: batches and placements that were ignored: repeated or overtaken batches,
    and blocks of servers that this process does not have.
    in_flight: requests of live processes, by URL.
    """

    def __init__(
        self,
        own: str,
        policies: PolicySet,
        server_at: Callable[[str], Server | None],
        effects: Effects | None = None,
    ) -> None:
        self.outdated = 0
        self.unknown = 0
        self.in_flight: dict[str, int] = {}
        self._own = own
        self._policies = policies
        self._server_at = server_at
        self._effects = effects
        self._peers: dict[str, Peer] = {}
        self._queued: dict[str, float] = {}
        self._adapters: dict[str, dict[str, int]] = {}
        self._running: dict[str, int] = {}
        self._hears_routers = False

    def hear(
        self,
        batch: Batch,
        now: float,
        age: float = 0.0,
        *,
        past: bool = False,
        sibling: bool = False,
    ) -> None:
        """Apply a batch that was written `age` seconds ago.

        past: it was written before this router was listening, so only lasting facts count.
            After an interruption in which this router listened, too, its use of keys does not
            count: the caller clears `interrupted`.
        sibling: it is of a process of the same router, which shares the rest in other ways.
        Call `settle` after the last batch of a series.
        """
        if batch.router == self._own:
            return
        peer = self._peers.get(batch.router)
        if peer is None:
            peer = self._new(batch.router, sibling=sibling)
        elif batch.number <= peer.number:
            self.outdated += 1
            return
        at = now - age
        before, was_at = peer.number, peer.heard_at
        peer.follow(batch, at)
        self._place(batch, now)
        effects = self._effects
        if effects is None:
            return
        for digest in batch.quarantined:
            effects.quarantined(digest, age, now)
        if sibling:
            return
        for entry in batch.owners:
            effects.owner(entry)
        fresh = age <= GONE_AFTER
        if fresh:
            for url in batch.ejected:
                server = self._server_at(url)
                if server is not None:
                    effects.ejected(server, now)
            if batch.figures:
                effects.scraped(batch.router, batch.figures, at, now)
        continuous = bool(before) and at - was_at <= CONTINUOUS
        self._count_keys(peer, batch, at, continuous=continuous, counts=fresh or past)

    def _new(self, router: str, *, sibling: bool) -> Peer:
        if len(self._peers) >= MAX_PEERS:
            silent = min(self._peers.values(), key=lambda peer: peer.heard_at)
            del self._peers[silent.router]
        peer = self._peers[router] = Peer(router, sibling=sibling)
        return peer

    def _place(self, batch: Batch, now: float) -> None:
        for url, blocks in batch.placed:
            server = self._server_at(url)
            if server is None:
                self.unknown += 1
            elif blocks:
                self._policies.placed_elsewhere(server, unpack_blocks(blocks), now)
        for url, blocks in batch.withdrawn:
            server = self._server_at(url)
            if server is not None:
                self._policies.withdrawn_elsewhere(server, unpack_blocks(blocks))

    def _count_keys(
        self, peer: Peer, batch: Batch, at: float, *, continuous: bool, counts: bool
    ) -> None:
        """Report what keys have spent.

        After an interruption only the last period counts: while two routers did not hear each
        other, each had its own share of the limits. This router had none if it began to listen
        later.
        """
        effects = self._effects
        assert effects is not None
        for name, use in batch.keys.items():
            before = peer.keys.get(name)
            spent = use.recent
            # After an interruption of its own a router reports no recent requests, although its
            # total has grown: it had its own share of the limits.
            if use.recent and continuous and before is not None:
                spent = max(0, use.admitted - before.admitted)
            if counts and spent:
                effects.spent(name, spent, at)
            if counts and batch.interrupted and use.unheard:
                effects.spent_unheard(name, use.unheard, at)
            if before is not None or len(peer.keys) < MAX_ITEMS:
                peer.keys[name] = use

    # -- levels -------------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """Apply the levels of the processes that are not silent. O(servers and keys in use)."""
        for router, peer in list(self._peers.items()):
            if now - peer.heard_at > FORGOTTEN_AFTER:
                del self._peers[router]
        live = self.live(now)
        hears = any(not peer.sibling for peer in live)
        if hears is not self._hears_routers:
            self._hears_routers = hears
            self._policies.hear_routers(hears)
        levels = summed_levels(peer.servers for peer in live)
        before = self.in_flight
        self.in_flight = {url: level.in_flight for url, level in levels.items() if level.in_flight}
        for url in {**before, **self.in_flight}:
            server = self._server_at(url)
            if server is not None:
                server.elsewhere = self.in_flight.get(url, 0)
        queued = {url: level.queued for url, level in levels.items() if level.queued}
        if queued or self._queued:
            for url in {**queued, **self._queued}:
                server = self._server_at(url)
                if server is not None:
                    self._policies.queued_elsewhere(server, queued.get(url, 0.0))
        self._queued = queued
        adapters = {url: level.adapters for url, level in levels.items() if level.adapters}
        for url in {**adapters, **self._adapters} if adapters or self._adapters else ():
            server = self._server_at(url)
            if server is not None:
                self._policies.adapters_elsewhere(server, adapters.get(url, {}))
        self._adapters = adapters
        if self._effects is not None:
            self._settle_keys(self._effects, live)

    def _settle_keys(self, effects: Effects, live: list[Peer]) -> None:
        running: dict[str, int] = {}
        for peer in live:
            for name, use in peer.keys.items():
                if use.running:
                    running[name] = running.get(name, 0) + use.running
        if running != self._running:
            self._running = running
            effects.running(running)

    def live(self, now: float) -> list[Peer]:
        """The processes that have been heard in the last GONE_AFTER seconds."""
        return [peer for peer in self._peers.values() if now - peer.heard_at <= GONE_AFTER]

    def count(self, now: float) -> int:
        """The other routers that have been heard in the last GONE_AFTER seconds."""
        return sum(not peer.sibling for peer in self.live(now))

    def others(self, now: float) -> frozenset[str]:
        """The ids of the other routers that have been heard in the last GONE_AFTER seconds."""
        return frozenset(peer.router for peer in self.live(now) if not peer.sibling)

    def siblings(self, now: float) -> dict[str, ServerLevel]:
        """The levels of the other processes of this router, by URL."""
        return summed_levels(peer.servers for peer in self.live(now) if peer.sibling)

    def views(self, now: float) -> list[RouterView]:
        """All known routers, by name."""
        found = []
        for peer in self._peers.values():
            if peer.sibling:
                continue
            silent = now - peer.heard_at
            live = silent <= GONE_AFTER
            in_flight = sum(level.in_flight for level in peer.servers.values()) if live else 0
            found.append(
                RouterView(
                    router=peer.router,
                    about=peer.about,
                    silent=silent,
                    in_flight=in_flight,
                    rate=peer.rate if live else 0.0,
                    live=live,
                )
            )
        return sorted(found, key=lambda view: (view.about.name, view.router))
