"""The figures that a worker sends to the leader."""

from __future__ import annotations

import socket
from typing import cast

import trio

from support.web_harness import Lab
from vllm_router.observability.slices import SERVERS_AT_ONCE
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.messages import WorkerStats
from vllm_router.runtime.workers.reporter import Reporter
from vllm_router.runtime.workers.worker_stats import StatsSender


async def test_stats_sender_after_end_of_leader_returns():
    """The leader may end first when all processes stop: no error, and no traceback."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    channel = Channel(ours)
    sender = StatsSender(None, channel, None)  # type: ignore[arg-type]

    async def current() -> WorkerStats:
        return WorkerStats(True, {}, {})

    sender.current = current  # type: ignore[method-assign]
    try:
        with trio.fail_after(30):
            await sender.run()
    finally:
        channel.close()


async def test_stats_sender_reads_a_large_fleet_in_slices():
    """Requests and state are read last: figures that are sent later are not older."""
    servers = [{"url": f"http://s{n}.test:1", "name": f"s{n}"} for n in range(4 * SERVERS_AT_ONCE)]
    lab = Lab(servers)
    for server in lab.router.fleet.servers.values():
        server.last_byte_at = 5.0
    sender = StatsSender(lab.router, cast("Channel", None), Reporter(cast("Channel", None)))
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            sender.serving = turns > 2
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await trio.lowlevel.checkpoint()
        stats = await sender.current()
        nursery.cancel_scope.cancel()
    assert turns > 2
    assert stats.serving
    assert len(stats.heard) == len(servers)
