"""The figures that a worker sends to the leader."""

from __future__ import annotations

import socket

import trio

from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.messages import WorkerStats
from vllm_router.runtime.workers.worker_stats import StatsSender


async def test_stats_sender_after_end_of_leader_returns():
    """The leader may end first when all processes stop: no error, and no traceback."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    channel = Channel(ours)
    sender = StatsSender(None, channel, None)  # type: ignore[arg-type]
    sender.current = lambda: WorkerStats(True, {}, {})  # type: ignore[method-assign]
    try:
        with trio.fail_after(30):
            await sender.run()
    finally:
        channel.close()
