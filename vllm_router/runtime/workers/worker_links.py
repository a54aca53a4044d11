"""All workers as the leader sees them: liveness, and the sums of their figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from vllm_router.fleet.server import Server
from vllm_router.observability.router_state import CPU, IN_FLIGHT, LAG
from vllm_router.proxy.record import Phase, Record
from vllm_router.routing.owners import Entry
from vllm_router.routing.server_estimate import PrefixStatistics
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.messages import WorkerStats
from vllm_router.runtime.workers.worker_link import WorkerLink

TOTALS = frozenset(
    {
        CPU,
        "reports_dropped",
        "vllm_router_event_loop_stalls_total",
        "vllm_router_event_loop_stall_seconds_total",
        "vllm_router_task_restarts_total",
        "vllm_router_log_lines_dropped_total",
    }
)
"""Counters: the values of workers that have died are kept in the sums."""


class WorkerLinks:
    """The `OtherProcesses` of the leader.

    `server_of` finds a server of the leader's fleet by its URL; the fleet is made after this.
    """

    def __init__(self, channels: Sequence[Channel]) -> None:
        self.links = [WorkerLink(number, channel) for number, channel in enumerate(channels, 1)]
        self.restarts = 0
        self.server_of: Callable[[str], Server | None] = lambda url: None
        self._past: Counter[str] = Counter()

    def server_changed(self, server: Server) -> None:
        """Send the state of a server to all workers."""
        self.servers_changed((server,))

    def servers_changed(self, servers: Collection[Server]) -> None:
        """Send the state of these servers to all workers."""
        for link in self.links:
            link.servers_changed(servers)

    def stored(self, source: WorkerLink, entries: Sequence[Entry]) -> None:
        """Tell all workers but the source the servers of stored responses."""
        for link in self.links:
            if link is not source:
                link.stored(entries)

    # -- life of workers ----------------------------------------------------------------------

    def lost(self, number: int, pid: int) -> None:
        """The worker process with this id has died."""
        link = self.links[number - 1]
        self.restarts += 1
        if link.pid == pid:  # otherwise its successor has already said hello
            self.bury(link)

    def bury(self, link: WorkerLink) -> None:
        """Keep the counters of a dead worker and drop its gauges."""
        if not link.alive:
            return
        link.alive = False
        for name, value in link.stats.values.items():
            if name in TOTALS:
                self._past[name] += value  # type: ignore[assignment]  # seconds, too
        link.stats = WorkerStats(False, {}, {})

    # -- figures ------------------------------------------------------------------------------

    @property
    def serving(self) -> int:
        """The number of workers that accept connections."""
        return sum(link.stats.serving for link in self.links)

    @property
    def ready(self) -> bool:
        return self.serving > 0

    @property
    def in_flight(self) -> int:
        return int(self.figure(IN_FLIGHT) or 0)

    def running(self) -> list[Record]:
        return [
            _stream_record(self.server_of(url), chunks)
            for link in self.links
            for url, chunks in link.stats.chunks.items()
        ]

    def workers(self) -> Mapping[str, Mapping[str, float]]:
        return {str(link.number): link.stats.values for link in self.links if link.stats.values}

    def prefix_statistics(self, server: Server) -> list[PrefixStatistics]:
        found = (link.stats.prefixes.get(server.url) for link in self.links)
        return [statistics for statistics in found if statistics is not None]

    def figure(self, name: str) -> float | None:
        if name == "workers":
            return self.serving
        if name == "restarts":
            return self.restarts
        values = [link.stats.values.get(name, 0.0) for link in self.links]
        if name == LAG:
            return max(values)
        return sum(values) + self._past.get(name, 0)


def _stream_record(server: Server | None, chunks: int) -> Record:
    return Record(0.0, "", b"", "", b"", phase=Phase.STREAM, server=server, chunks=chunks)
