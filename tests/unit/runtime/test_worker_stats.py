"""The figures that a worker sends to the leader."""

from __future__ import annotations

import socket
from typing import cast

import trio

from support.web_harness import Lab
from vllm_router.fleet.server import Server
from vllm_router.observability.slices import SERVERS_AT_ONCE
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.messages import WorkerStats
from vllm_router.runtime.workers.reporter import Reporter
from vllm_router.runtime.workers.worker_stats import WHOLE_INTERVAL, StatsSender


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


class Counted:
    """A StatsSender of a worker before ten servers, and the servers that it has read."""

    def __init__(self) -> None:
        servers = [{"url": f"http://s{n}.test:1", "name": f"s{n}"} for n in range(10)]
        self.lab = Lab(servers)
        self.servers = list(self.lab.router.fleet.servers.values())
        channel = cast("Channel", self)
        self.sender = StatsSender(self.lab.router, channel, Reporter(channel))
        self.sent: list[bytes] = []
        self.read: list[str] = []
        read = self.sender._read_server

        def counted(server: Server) -> None:
            self.read.append(server.name)
            read(server)

        self.sender._read_server = counted  # type: ignore[method-assign]

    async def send(self, message: bytes) -> None:
        self.sent.append(message)

    async def reads(self) -> list[str]:
        """The servers that the next message needs."""
        self.read.clear()
        self.stats = await self.sender.current()
        return sorted(self.read)


async def test_stats_sender_reads_servers_that_have_changed(autojump_clock):
    counted = Counted()
    assert len(await counted.reads()) == 10
    assert await counted.reads() == []
    server = counted.servers[3]
    lease = server.lease(trio.current_time())
    assert await counted.reads() == ["s3"]
    lease.committed, lease.last_byte_at = True, 7.0  # a chunk is noted nowhere else
    assert await counted.reads() == ["s3"]
    assert counted.stats.outputs == {server.url: 7.0}
    lease.release()
    server.answered(8.0, trial=False)
    assert await counted.reads() == ["s3"]
    assert counted.stats.heard == {server.url: 8.0}
    assert await counted.reads() == []
    assert counted.stats.heard == {server.url: 8.0}
    await trio.sleep(WHOLE_INTERVAL)
    assert len(await counted.reads()) == 10


async def test_stats_sender_forgets_removed_servers(autojump_clock):
    counted = Counted()
    counted.servers[3].answered(8.0, trial=False)
    counted.servers[4].answered(9.0, trial=False)
    await counted.reads()
    counted.lab.apply([{"url": f"http://s{n}.test:1", "name": f"s{n}"} for n in range(4)])
    counted.lab.router.fleet.gone()
    assert len(await counted.reads()) == 4
    assert counted.stats.heard == {counted.servers[3].url: 8.0}


async def test_stats_sender_reads_servers_for_its_messages_only(autojump_clock):
    """Without requests there is a message a second, for the cost of the process."""
    counted = Counted()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(counted.sender.run)
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
    assert len(counted.sent) <= 6
    assert len(counted.read) <= 10
    assert counted.servers[0].leases == set()
