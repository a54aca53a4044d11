"""The parts of a supervisor that depend on the process: alone, leader or worker."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import trio

from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.proxy.admission import PeersMaker
from vllm_router.proxy.key_limits import KeyLimits
from vllm_router.proxy.record import Record, Recorder
from vllm_router.routing.server_estimate import PrefixStatistics
from vllm_router.runtime.background import Task
from vllm_router.runtime.early_signals import came
from vllm_router.runtime.probes import ActiveProbes, ProbeContext, ProbeSource


class ReportSink(Recorder, Protocol):
    """Takes the events that a worker reports instead of counting them itself."""

    def refused(self, code: str) -> None:
        """A request was rejected before an exchange began."""


class SignalSource(Protocol):
    """Asks for a reload of the configuration and for reopened log files."""

    def tasks(
        self, reload: Callable[[], None] | None, reopen: Callable[[], None] | None
    ) -> list[tuple[str, Task]]:
        """Named background tasks; a callback is None if the process has nothing to reload."""


class ProcessSignals:
    """SIGHUP reloads, SIGUSR1 reopens the log files."""

    def tasks(
        self, reload: Callable[[], None] | None, reopen: Callable[[], None] | None
    ) -> list[tuple[str, Task]]:
        tasks: list[tuple[str, Task]] = []
        if reload is not None:
            tasks.append(("reload signal", _on_signal(signal.SIGHUP, reload)))
        if reopen is not None:
            tasks.append(("log signal", _on_signal(signal.SIGUSR1, reopen)))
        return tasks


def _on_signal(number: signal.Signals, callback: Callable[[], None]) -> Task:
    async def follow() -> None:
        with trio.open_signal_receiver(number) as signals:
            if came(number):
                callback()
            async for _ in signals:
                callback()

    return follow


class OtherProcesses(Protocol):
    """The other processes of this router, and their share of the figures."""

    @property
    def ready(self) -> bool:
        """False while no other process accepts connections that this one does not accept."""

    @property
    def in_flight(self) -> int: ...

    def running(self) -> list[Record]:
        """One record per server, with the chunks of its running streams."""

    def workers(self) -> Mapping[str, Mapping[str, float]]:
        """The figures of each worker, by number."""

    def prefix_statistics(self, server: Server) -> list[PrefixStatistics]: ...

    def figure(self, name: str) -> float | None:
        """The other processes' part of a figure; None without other processes."""


class NoOtherProcesses:
    """A router of one process."""

    ready = True
    in_flight = 0

    def running(self) -> list[Record]:
        return []

    def workers(self) -> Mapping[str, Mapping[str, float]]:
        return {}

    def prefix_statistics(self, server: Server) -> list[PrefixStatistics]:
        return []

    def figure(self, name: str) -> float | None:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The defaults make a router of one process.

    `fleet`, `key_limits` and `make_peers` share leases, key limits and queues with other processes.
    With `reports`, events are reported to the leader: this process keeps no metrics and no feed.
    """

    fleet: Fleet | None = None
    key_limits: KeyLimits | None = None
    make_peers: PeersMaker | None = None
    reports: ReportSink | None = None
    make_probes: Callable[[ProbeContext], ProbeSource] = ActiveProbes
    signals: SignalSource | None = field(default_factory=ProcessSignals)
    others: OtherProcesses = field(default_factory=NoOtherProcesses)
