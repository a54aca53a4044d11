"""The view of the router for metrics, feed and control plane; the supervisor implements it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

import trio

from vllm_router.config.reload import Reload, Reloader
from vllm_router.config.schema import Config
from vllm_router.config.ssl_contexts import ServerContexts
from vllm_router.discovery.source import SourceStatus
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.http.client.resolver import Resolver
from vllm_router.observability.stalls import StallMonitor
from vllm_router.proxy.admission import Queue
from vllm_router.proxy.handler import Proxy
from vllm_router.proxy.record import Record
from vllm_router.routing.server_estimate import PrefixStatistics
from vllm_router.routing.sharing.status import SharedStatus

CONNECTIONS, IN_FLIGHT, CPU, MEMORY, LAG = (
    "connections",
    "in_flight",
    "cpu_seconds",
    "rss_bytes",
    "lag",
)
"""Names of the figures that worker processes report."""


class RouterState(Protocol):
    """`started_at` is on Trio's clock; `tls` and `resolver` are used for servers."""

    fleet: Fleet
    proxy: Proxy
    reloader: Reloader | None
    config: Config
    draining: bool
    started_at: float
    tls: ServerContexts
    resolver: Resolver
    stalls: StallMonitor

    @property
    def task_restarts(self) -> int: ...

    @property
    def source_statuses(self) -> list[SourceStatus]: ...

    @property
    def shared_status(self) -> SharedStatus | None: ...

    @property
    def log_lines_dropped(self) -> int: ...

    @property
    def in_flight(self) -> int: ...

    def queues(self, now: float) -> list[Queue]: ...

    def prefix_statistics(self, server: Server) -> PrefixStatistics | None: ...

    def running(self) -> list[Record]: ...

    def elsewhere(self, figure: str) -> float | None: ...

    def workers(self) -> Mapping[str, Mapping[str, float]]: ...

    @property
    def ready(self) -> bool: ...

    async def reload(self) -> Reload: ...

    def drain_server(self, name: str, on: bool) -> Server | None: ...


def wall_offset() -> float:
    """The offset from Trio's clock to Unix time, in seconds."""
    return time.time() - trio.current_time()
