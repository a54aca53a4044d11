"""The processes of one router tell each other where they have sent prompts.

A worker sends a batch every PERIOD if it has something to tell. The leader passes it on to the
other workers and applies it, so that it can explain decisions, and tell a worker that starts all of
it. Batches are soft state: a full channel drops one.
"""

from __future__ import annotations

from collections.abc import Iterator
from secrets import token_hex

import trio

from vllm_router.proxy.context import ProxyContext
from vllm_router.routing.sharing.messages import (
    MAX_HASHES,
    About,
    Batch,
    Placed,
    ServerLevel,
    pack_blocks,
)
from vllm_router.routing.sharing.outbox import Outbox
from vllm_router.routing.sharing.peers import Peers
from vllm_router.runtime.workers.channel import LARGEST, Channel
from vllm_router.runtime.workers.messages import PeerBatch, encode
from vllm_router.runtime.workers.worker_link import WorkerLink
from vllm_router.runtime.workers.worker_links import WorkerLinks

PERIOD = 0.1
"""Seconds between two batches of a worker."""

NOT_SHOWN = About("", "", "", 0.0, 0)
"""Workers are not shown as routers."""


def queued_levels(context: ProxyContext) -> dict[str, ServerLevel]:
    """The prompt tokens of this process that wait on servers, by URL."""
    queued = context.policies.queued_tokens()
    return {server.url: ServerLevel(round(tokens), 0) for server, tokens in queued.items()}


class _Teller:
    """Common part: collects what this process has to tell, and follows the others."""

    def __init__(self, context: ProxyContext, kind: str) -> None:
        self._context = context
        self.outbox = Outbox(f"{kind}-{token_hex(8)}")
        self.peers = Peers(self.outbox.router, context.policies, context.fleet.by_url)
        self._had_levels = False
        context.policies.tell(self.outbox)

    def due(self) -> Batch | None:
        """The batch of this period; None if there is nothing to tell."""
        now = trio.current_time()
        self.peers.settle(now)
        levels = queued_levels(self._context)
        if not (levels or self._had_levels or self.outbox.waiting):
            return None
        self._had_levels = bool(levels)
        return self.outbox.batch(NOT_SHOWN, levels, {}, now)


class WorkerPrompts(_Teller):
    """A worker's part. `run` sends; `hear` applies what the leader sends."""

    def __init__(self, context: ProxyContext, channel: Channel) -> None:
        super().__init__(context, "worker")
        self._channel = channel

    def hear(self, message: PeerBatch) -> None:
        now = trio.current_time()
        self.peers.hear(message.batch, now, sibling=message.sibling)
        self.peers.settle(now)

    async def run(self) -> None:
        """Send until cancelled, or until no process holds the other end."""
        while True:
            await trio.sleep(PERIOD)
            batch = self.due()
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


class LeaderPrompts(_Teller):
    """The leader's part. It serves requests, too: those over HTTP/2."""

    def __init__(self, context: ProxyContext, workers: WorkerLinks) -> None:
        super().__init__(context, "leader")
        self._workers = workers
        self._store = f"known-{token_hex(8)}"
        self._stored_batches = 0

    def hear(self, source: WorkerLink, message: PeerBatch) -> None:
        """Apply the batch of a worker, and pass it on to the others."""
        now = trio.current_time()
        self.peers.hear(message.batch, now, sibling=True)
        self.peers.settle(now)
        self._tell(message, source)

    def _tell(self, message: PeerBatch, source: WorkerLink | None = None) -> None:
        others = [link for link in self._workers.links if link is not source]
        if others:
            encoded = encode(message)
            for link in others:
                link.tell(encoded)

    async def run(self) -> None:
        """Send the leader's own batches to all workers, until cancelled."""
        while True:
            await trio.sleep(PERIOD)
            batch = self.due()
            if batch is not None:
                self._tell(PeerBatch(batch))

    def known(self) -> Iterator[bytes]:
        """Messages with all known blocks, for a worker that has just started."""
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

    def _message(self, placed: list[Placed]) -> bytes:
        self._stored_batches += 1
        return encode(PeerBatch(Batch(self._store, self._stored_batches, NOT_SHOWN, placed=placed)))
