"""The figures of a worker, sent to the leader when they change."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from vllm_router.fleet.server import Server
from vllm_router.observability.metric_families import ROUTER_METRICS, SUMMED
from vllm_router.observability.process import cpu_seconds, rss_bytes
from vllm_router.observability.router_state import CONNECTIONS, CPU, IN_FLIGHT, LAG, MEMORY
from vllm_router.observability.slices import each, in_turns
from vllm_router.routing.server_estimate import PrefixStatistics
from vllm_router.runtime.supervisor import Supervisor
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.messages import WorkerStats, encode
from vllm_router.runtime.workers.reporter import Reporter

CHECK_INTERVAL = 0.1
"""Seconds between two comparisons with the figures sent last."""

IDLE_INTERVAL = 1.0
"""Seconds between two messages if only the cost of the process itself has changed."""


class StatsSender:
    """`serving` is True while the worker accepts connections; `connections` counts them."""

    def __init__(self, supervisor: Supervisor, channel: Channel, reporter: Reporter) -> None:
        self.serving = False
        self.connections: Callable[[], int] = int
        self._supervisor = supervisor
        self._channel = channel
        self._reporter = reporter

    async def run(self) -> None:
        """Send changed figures until cancelled, or until the leader has ended.

        It may end before a worker that still drains.
        """
        sent: WorkerStats | None = None
        sent_at = -math.inf
        while True:
            stats = await self.current()
            now = trio.current_time()
            if stats != sent and (now - sent_at > IDLE_INTERVAL or _differs(stats, sent)):
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
        prefixes: dict[str, PrefixStatistics] = {}
        heard: dict[str, float] = {}
        outputs: dict[str, float] = {}

        def read_server(server: Server) -> None:
            statistics = supervisor.prefix_statistics(server)
            if statistics is not None:
                prefixes[server.url] = statistics
            if server.last_byte_at > -math.inf:
                heard[server.url] = server.last_byte_at
            output = server.last_output()
            if output > -math.inf:
                outputs[server.url] = output

        await in_turns(each(supervisor.fleet.all_servers(), read_server))
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
        chunks: dict[str, int] = {}
        for record in supervisor.running():
            if record.chunks and record.server is not None:
                url = record.server.url
                chunks[url] = chunks.get(url, 0) + record.chunks
        return WorkerStats(self.serving, values, chunks, prefixes, heard, outputs)


def _differs(stats: WorkerStats, sent: WorkerStats | None) -> bool:
    """True if more than the process's own cost (CPU, memory) has changed."""
    return (
        sent is None
        or stats.serving != sent.serving
        or stats.chunks != sent.chunks
        or stats.values[CONNECTIONS] != sent.values[CONNECTIONS]
        or stats.values[IN_FLIGHT] != sent.values[IN_FLIGHT]
    )
