"""The processes of one router tell each other where they have sent prompts.

A worker sends a batch every PERIOD if it has something to tell. The leader passes it on to the
other workers and applies it, so that it can explain decisions, and tell a worker that starts all of
it. With `[shared]` it passes the batches on between the workers and the other routers, too.
Batches are soft state: a full channel drops one.
"""

from __future__ import annotations

from collections.abc import Iterator
from secrets import token_hex

import msgspec
import trio

from vllm_router.routing.sharing.messages import MAX_HASHES, Batch, Placed, pack_blocks
from vllm_router.routing.sharing.outbox import Outbox
from vllm_router.runtime.sharing.effects import ProcessEffects
from vllm_router.runtime.sharing.process import NOT_SHOWN, ProcessShare
from vllm_router.runtime.sharing.redis_connector import RedisConnector
from vllm_router.runtime.sharing.router_share import key_finder, router_effects, share_through
from vllm_router.runtime.sharing.store import OpenStore
from vllm_router.runtime.sharing.task import SharedState
from vllm_router.runtime.supervisor import Supervisor
from vllm_router.runtime.workers.channel import LARGEST, Channel
from vllm_router.runtime.workers.messages import KeyShare, PeerBatch, encode
from vllm_router.runtime.workers.worker_link import WorkerLink
from vllm_router.runtime.workers.worker_links import WorkerLinks

PERIOD = 0.1
"""Seconds between two batches of a process."""


class WorkerPrompts:
    """A worker's part. `run` sends; `hear` applies what the leader sends."""

    def __init__(self, supervisor: Supervisor, channel: Channel) -> None:
        context = supervisor.proxy.context
        effects = ProcessEffects(context, key_finder(supervisor))
        self.share = ProcessShare(context, "worker", effects)
        self._usage = context.key_limits
        self._channel = channel

    def hear(self, message: PeerBatch | KeyShare) -> None:
        if isinstance(message, KeyShare):
            self._usage.routers = message.routers
            return
        now, sibling = trio.current_time(), message.sibling
        self.share.peers.hear(message.batch, now, message.age, past=message.past, sibling=sibling)
        if not message.past:
            self.share.settle(now)

    async def run(self) -> None:
        """Send until cancelled, or until no process holds the other end."""
        while True:
            await trio.sleep(PERIOD)
            batch = self.share.due()
            if batch is None:
                continue
            message = encode(PeerBatch(batch))
            if len(message) <= LARGEST:
                self._channel.send_now(message)
                continue
            try:
                await self._channel.send(message)
            except trio.BrokenResourceError:
                return


class LeaderPrompts:
    """The leader's part. It serves requests, too: the ones over HTTP/2.

    `log` collects what the router has to tell other routers; None without `[shared]`.
    """

    def __init__(self, supervisor: Supervisor, workers: WorkerLinks) -> None:
        self._context = supervisor.proxy.context
        self.share = ProcessShare(
            self._context,
            "leader",
            router_effects(supervisor, supervisor.probes.check_soon, supervisor.scrapes),
        )
        self.log: Outbox | None = None
        self._workers = workers
        self._store = f"known-{token_hex(8)}"
        self._stored_batches = 0

    def share_fleet(
        self, supervisor: Supervisor, open_store: OpenStore | None = None
    ) -> SharedState:
        """The shared state of all routers, which all processes of this one follow."""
        self.log = log = Outbox(f"router-{token_hex(8)}")
        self._context.owners.on_new = log.owner
        shared = share_through(
            supervisor, self.share, log, supervisor.scrapes, open_store or RedisConnector().open
        )
        shared.heard = self._pass_on
        shared.on_routers = lambda routers: self._tell(encode(KeyShare(routers)))
        return shared

    def _pass_on(self, batch: Batch, age: float, past: bool) -> None:
        if batch.figures:
            # The leader follows the loads of the servers for all processes.
            batch = msgspec.structs.replace(batch, figures={})
        self._tell(encode(PeerBatch(batch, sibling=False, age=age, past=past)))

    def hear(self, source: WorkerLink, message: PeerBatch) -> None:
        """Apply the batch of a worker, and pass it on to the others."""
        now = trio.current_time()
        self.share.peers.hear(message.batch, now, sibling=True)
        self.share.settle(now)
        if self.log is not None:
            self.log.pass_on(message.batch)
        self._tell(encode(message), source)

    def _tell(self, message: bytes, source: WorkerLink | None = None) -> None:
        for link in self._workers.links:
            if link is not source:
                link.tell(message)

    async def run(self) -> None:
        """Send the leader's own batches to all workers, until cancelled."""
        while True:
            await trio.sleep(PERIOD)
            batch = self.share.due()
            if batch is not None:
                if self.log is not None:
                    self.log.pass_on(batch)
                self._tell(encode(PeerBatch(batch)))

    def known(self) -> Iterator[bytes]:
        """The messages for a worker that has just started: all blocks, its part of the limits."""
        placed: list[Placed] = []
        hashes = 0
        for server, blocks in self._context.policies.blocks(MAX_HASHES // 4):
            placed.append((server.url, pack_blocks(blocks)))
            hashes += len(blocks)
            if hashes >= MAX_HASHES:
                yield self._message(placed)
                placed, hashes = [], 0
        if placed:
            yield self._message(placed)
        yield encode(KeyShare(self._context.key_limits.routers))

    def _message(self, placed: list[Placed]) -> bytes:
        self._stored_batches += 1
        return encode(PeerBatch(Batch(self._store, self._stored_batches, NOT_SHOWN, placed=placed)))
