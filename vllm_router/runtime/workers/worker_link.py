"""The leader's side of one worker: the state that is still to be sent, and the worker's figures."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import trio

from vllm_router.fleet.server import Server
from vllm_router.routing.owners import KEPT, Entry
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.messages import (
    Addresses,
    Configured,
    Hello,
    ModelListsRefreshed,
    ResolvedNames,
    ServerStates,
    StoredResponses,
    Welcome,
    WorkerStats,
    encode,
    parts_of,
    stored_in_parts,
)
from vllm_router.runtime.workers.shared_server import state_of

MAX_BATCHES = 100
"""Batches of other processes that wait for a worker that does not read; the oldest is dropped."""

SERVERS_PER_MESSAGE = 25
"""A server with a thousand models takes some 30 KB."""


class WorkerLink:
    """`run` sends what has changed; the other methods note what is to be sent."""

    def __init__(self, number: int, channel: Channel) -> None:
        self.number = number
        self.channel = channel
        self.pid: int | None = None
        """The process at the other end, once it has said hello."""
        self.alive = False
        self.stats = WorkerStats(False, {}, {})
        self._changed_servers: set[Server] = set()
        self._welcome: Welcome | None = Welcome(first=True)
        self._generation_sent = 0
        self._lists_refreshed = False
        self._stored: list[Entry] = []
        self._known_batches: Iterator[bytes] = iter(())
        self._batches: deque[bytes] = deque(maxlen=MAX_BATCHES)
        self._work = trio.Event()
        self._work.set()

    def hello(
        self,
        hello: Hello,
        servers: Iterable[Server],
        stored: Iterable[Entry],
        batches: Iterator[bytes] = iter(()),  # noqa: B008 (empty, so it has no state)
    ) -> None:
        """A worker has connected: send it the whole state. `batches` are encoded messages."""
        self._known_batches = batches
        self._stored = list(stored)
        self.pid, self.alive = hello.pid, True
        self._batches.clear()
        self._changed_servers = set(servers)
        self._welcome = Welcome(first=False)
        self._generation_sent = 0
        self._work.set()

    def servers_changed(self, servers: Iterable[Server]) -> None:
        self._changed_servers.update(servers)
        self._work.set()

    def stored(self, entries: Iterable[Entry]) -> None:
        """Servers of stored responses have become known."""
        if self.alive:
            self._stored += entries
            del self._stored[: -2 * KEPT]  # a worker that does not read
            self._work.set()

    def tell(self, message: bytes) -> None:
        """Send an encoded `PeerBatch`."""
        if self.alive:
            self._batches.append(message)
            self._work.set()

    def lists_refreshed(self) -> None:
        """Answer the worker's `RefreshModelLists`, after the states that it has changed."""
        self._lists_refreshed = True
        self._work.set()

    async def run(self, generation: Callable[[], int], names: Callable[[], Addresses]) -> None:
        """Send until cancelled.

        `generation` returns the number of the configuration in force, `names` the resolved names.
        """
        while True:
            await self._work.wait()
            self._work = trio.Event()
            await self._send_changes(generation(), names)

    async def _send_changes(self, generation: int, names: Callable[[], Addresses]) -> None:
        welcome, self._welcome = self._welcome, None
        if welcome is not None and welcome.first:
            await self.channel.send(encode(welcome))
        if self.pid is None:
            return
        if self._generation_sent != generation:
            self._generation_sent = generation
            await self.channel.send(encode(Configured(generation)))
        await self._send_states()
        stored, self._stored = self._stored, []
        for entries in stored_in_parts(stored):
            await self.channel.send(encode(StoredResponses(entries)))
        for message in self._known_batches:
            await self.channel.send(message)
        while self._batches:
            await self.channel.send(self._batches.popleft())
        if self._lists_refreshed:
            self._lists_refreshed = False
            await self.channel.send(encode(ModelListsRefreshed()))
        if welcome is not None and not welcome.first:
            for part in parts_of(names()):
                await self.channel.send(encode(ResolvedNames(part)))
            # Last: the worker begins to serve when it receives this, and must know the servers.
            await self.channel.send(encode(welcome))

    async def _send_states(self) -> None:
        changed = self._changed_servers
        while changed:
            batch = [changed.pop() for _ in range(min(SERVERS_PER_MESSAGE, len(changed)))]
            # A leader that has just started knows less than its workers: send no unprobed server.
            known = [state_of(server) for server in batch if server.active_health.up is not None]
            await self.channel.send(encode(ServerStates(known)))
