"""The figures of a worker, sent to the leader when they change."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from vllm_router.fleet.server import Server
from vllm_router.observability.process import cpu_seconds, rss_bytes
from vllm_router.observability.router_families import ROUTER_METRICS, SUMMED
from vllm_router.observability.router_state import CONNECTIONS, CPU, IN_FLIGHT, LAG, MEMORY
from vllm_router.observability.slices import each, in_turns
from vllm_router.routing.server_estimate import PrefixStatistics
from vllm_router.runtime.supervisor import Supervisor
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.messages import WorkerStats, encode
from vllm_router.runtime.workers.reporter import Reporter
from vllm_router.steps import Steps

CHECK_INTERVAL = 0.1
"""Seconds between two comparisons with the figures sent last."""

IDLE_INTERVAL = 1.0
"""Seconds between two messages if only the cost of the process itself has changed."""


WHOLE_INTERVAL = 10.0
"""Seconds between two readings of all servers. In between only the ones are read whose load has
changed: all of a thousand take 5 ms."""


class StatsSender:
    """`serving` is True while the worker accepts connections; `connections` counts them."""

    def __init__(self, supervisor: Supervisor, channel: Channel, reporter: Reporter) -> None:
        self.serving = False
        self.connections: Callable[[], int] = int
        self._supervisor = supervisor
        self._channel = channel
        self._reporter = reporter
        self._prefixes: dict[str, PrefixStatistics] = {}
        self._heard: dict[str, float] = {}
        self._outputs: dict[str, float] = {}
        self._members: object = None
        self._log: list[Server] = []
        self._read = 0
        """The set of servers, and how much of their change log has been read."""
        self._busy: set[Server] = set()
        """The servers that had requests of this worker when they were read."""
        self._whole_at = -math.inf

    async def run(self) -> None:
        """Send changed figures until cancelled, or until the leader has ended.

        It may end before a worker that still drains.
        """
        sent: WorkerStats | None = None
        sent_at = -math.inf
        while True:
            now = trio.current_time()
            if sent is None or now - sent_at > IDLE_INTERVAL or self._differs(sent):
                stats = await self.current()
                if stats != sent:
                    sent, sent_at = stats, now
                    try:
                        await self._channel.send(encode(stats))
                    except trio.BrokenResourceError:
                        return
            await trio.sleep(CHECK_INTERVAL)

    async def send(self) -> None:
        """Send the current figures now."""
        await self._channel.send(encode(await self.current()))

    async def current(self) -> WorkerStats:
        """The figures of now. The servers of a large fleet are read in slices."""
        supervisor = self._supervisor
        await in_turns(self._read_servers())
        # Read last, in one step: a message that is sent later must not have older values.
        values: dict[str, float] = {
            CONNECTIONS: self.connections(),
            IN_FLIGHT: supervisor.in_flight,
            CPU: round(cpu_seconds(), 2),
            MEMORY: rss_bytes(),
            LAG: round(supervisor.stalls.lag.worst(trio.current_time()), 4),
            "reports_dropped": self._reporter.dropped,
        }
        for family, read in ROUTER_METRICS:
            if family.name in SUMMED:
                values[family.name] = read(supervisor) or 0.0
        return WorkerStats(
            self.serving,
            values,
            self._chunks(),
            self._prefixes.copy(),
            self._heard.copy(),
            self._outputs.copy(),
        )

    def _read_servers(self) -> Steps[None]:
        """Read what has changed since the last reading; from time to time all servers."""
        fleet, now = self._supervisor.fleet, trio.current_time()
        log, read = fleet.change_log.servers, self._read
        whole = (
            log is not self._log
            or fleet.servers is not self._members
            or now - self._whole_at >= WHOLE_INTERVAL
        )
        # Changes while other tasks run are read the next time.
        self._log, self._read, self._members = log, len(log), fleet.servers
        if whole:
            self._whole_at = now
            servers = list(fleet.all_servers())
            urls = {server.url for server in servers}
            for figures in (self._prefixes, self._heard, self._outputs):
                for url in figures.keys() - urls:
                    del figures[url]
        else:
            servers = list(self._busy.union(log[read:]))
        self._busy = set()
        yield from each(servers, self._read_server)

    def _read_server(self, server: Server) -> None:
        statistics = self._supervisor.prefix_statistics(server)
        if statistics is not None:
            self._prefixes[server.url] = statistics
        if server.last_byte_at > -math.inf:
            self._heard[server.url] = server.last_byte_at
        output = server.last_output()
        if output > -math.inf:
            self._outputs[server.url] = output
        if server.leases:
            self._busy.add(server)

    def _chunks(self) -> dict[str, int]:
        """The chunks of running exchanges by server."""
        chunks: dict[str, int] = {}
        for record in self._supervisor.running():
            if record.chunks and record.server is not None:
                url = record.server.url
                chunks[url] = chunks.get(url, 0) + record.chunks
        return chunks

    def _differs(self, sent: WorkerStats) -> bool:
        """True if more than the process's own cost (CPU, memory) has changed."""
        return (
            self.serving != sent.serving
            or self.connections() != sent.values[CONNECTIONS]
            or self._supervisor.in_flight != sent.values[IN_FLIGHT]
            or self._chunks() != sent.chunks
        )
