"""The leader: probes servers, runs the control plane, and keeps the workers up to date.

It accepts no inference connections. Each worker is at the other end of a channel that outlives both
processes; the leader answers a worker's `Hello` with its whole state and then sends changes.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import trio

from vllm_router.config.schema import Config
from vllm_router.config.source import ConfigSource
from vllm_router.observability.log_output import LogOutput
from vllm_router.observability.tracing import Telemetry
from vllm_router.routing.owners import Entry
from vllm_router.runtime.parts import Parts, SignalSource
from vllm_router.runtime.supervisor import Supervisor
from vllm_router.runtime.workers.adopted import AdoptedConnections
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.config_snapshot import ConfigSnapshot
from vllm_router.runtime.workers.fleet import LeadingFleet
from vllm_router.runtime.workers.messages import (
    Connection,
    Hello,
    PeerBatch,
    RefreshModelLists,
    Report,
    StoredResponses,
    WorkerStats,
    decode_from_worker,
)
from vllm_router.runtime.workers.queue_peers import SharedQueue, check_limits
from vllm_router.runtime.workers.queue_wakeup import serve_waiters
from vllm_router.runtime.workers.report_reader import ReportReader
from vllm_router.runtime.workers.shared_counters import CounterView
from vllm_router.runtime.workers.shared_prompts import LeaderPrompts
from vllm_router.runtime.workers.worker_link import WorkerLink
from vllm_router.runtime.workers.worker_links import WorkerLinks
from vllm_router.web.guard import MonitorListener

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Leader:
    """A supervisor, and the workers that share its fleet."""

    supervisor: Supervisor
    workers: WorkerLinks


def build(
    config: Config,
    source: ConfigSource | None,
    *,
    nursery: trio.Nursery,
    adopted: AdoptedConnections,
    counters: CounterView,
    queue: SharedQueue,
    channels: Sequence[Channel],
    snapshot: ConfigSnapshot,
    signals: SignalSource | None = None,
    output: LogOutput | None = None,
    telemetry: Telemetry | None = None,
    admin_port: int | None = None,
    monitor_listener: MonitorListener | None = None,
) -> Leader:
    """Put a leader together. `channels` lead to the workers; the caller closes them.

    Model lists that workers ask for are read in `nursery`.
    """
    workers = WorkerLinks(channels)
    fleet = LeadingFleet(config, counters, workers.server_changed)
    workers.server_of = fleet.by_url
    supervisor = Supervisor(
        config,
        source,
        output=output,
        telemetry=telemetry,
        admin_port=admin_port,
        monitor_listener=monitor_listener,
        parts=Parts(
            fleet=fleet,
            key_limits=fleet.key_limits,
            make_peers=queue.make_peers,
            signals=signals,
            others=workers,
        ),
    )
    snapshot.write(config)
    prompts = LeaderPrompts(supervisor, workers)
    supervisor.share_with(partial(prompts.share_fleet, supervisor))
    inbox = _Inbox(supervisor, fleet, workers, adopted, nursery, prompts)
    publisher = _Publisher(supervisor, workers, snapshot)
    supervisor.before_apply += [fleet.check_room, check_limits]
    supervisor.after_apply.append(publisher.publish)
    supervisor.tasks += [
        ("waiting", partial(serve_waiters, supervisor.proxy, queue.wakeups)),
        ("prompts", prompts.run),
    ]
    for link in workers.links:
        supervisor.tasks += [
            (f"messages of worker {link.number}", partial(inbox.receive, link)),
            (f"updates for worker {link.number}", partial(publisher.send, link)),
        ]
    return Leader(supervisor, workers)


class _Publisher:
    """Sends the configuration and the servers' state to the workers."""

    def __init__(
        self, supervisor: Supervisor, workers: WorkerLinks, snapshot: ConfigSnapshot
    ) -> None:
        self._supervisor = supervisor
        self._workers = workers
        self._snapshot = snapshot
        self._generation = 1

    def publish(self, new: Config) -> None:
        """A new configuration is in force."""
        self._snapshot.write(new)
        self._generation += 1
        self._workers.servers_changed(self._supervisor.fleet.all_servers())

    async def send(self, link: WorkerLink) -> None:
        # The successor of a worker gets everything again.
        with contextlib.suppress(trio.BrokenResourceError):
            await link.run(lambda: self._generation, self._supervisor.resolver.known)


class _Inbox:
    """Handles the messages of workers."""

    def __init__(
        self,
        supervisor: Supervisor,
        fleet: LeadingFleet,
        workers: WorkerLinks,
        adopted: AdoptedConnections,
        nursery: trio.Nursery,
        prompts: LeaderPrompts,
    ) -> None:
        self._prompts = prompts
        self._supervisor = supervisor
        self._fleet = fleet
        self._workers = workers
        self._adopted = adopted
        self._nursery = nursery
        self._reports = ReportReader(fleet, supervisor.proxy, supervisor.metrics, supervisor.feed)

    async def receive(self, link: WorkerLink) -> None:
        """Handle messages until cancelled."""
        while True:
            data, fileno = await link.channel.receive()
            if not data:
                await trio.sleep_forever()  # the parent has ended, and this process drains
            try:
                message = decode_from_worker(data)
            except msgspec.DecodeError:
                logger.exception("worker %d: dropping an undecodable message", link.number)
                if fileno is not None:
                    os.close(fileno)
                continue
            match message:
                case Report():
                    await self._reports.apply(message)
                    if message.stored:
                        self._take_stored(message.stored)
                        if self._prompts.log is not None:
                            for entry in message.stored:
                                self._prompts.log.owner(entry)
                        self._workers.stored(link, message.stored)
                case StoredResponses(entries):
                    self._take_stored(entries)
                case WorkerStats():
                    self._take_stats(link, message)
                case PeerBatch():
                    self._prompts.hear(link, message)
                case Connection():
                    self._adopted.adopt(message, fileno)
                case Hello():
                    self._hello(link, message)
                case RefreshModelLists():
                    self._nursery.start_soon(self._refresh_lists, link)

    def _take_stored(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._supervisor.proxy.context.owners.take(entry)

    async def _refresh_lists(self, link: WorkerLink) -> None:
        await self._supervisor.refresh_model_lists(lambda: False)
        link.lists_refreshed()

    def _take_stats(self, link: WorkerLink, stats: WorkerStats) -> None:
        if not link.alive:
            return  # sent by a worker that has died since
        link.stats = stats
        for url, moment in stats.heard.items():
            server = self._fleet.by_url(url)
            if server is not None:
                server.last_byte_at = max(server.last_byte_at, moment)
        for url, moment in stats.outputs.items():
            server = self._fleet.by_url(url)
            if server is not None:
                server.activity.output_at = max(server.activity.output_at, moment)

    def _hello(self, link: WorkerLink, hello: Hello) -> None:
        if link.pid != hello.pid:
            self._workers.bury(link)
        self._supervisor.resolver.take_over(hello.addresses)
        for url in hello.draining:
            server = self._fleet.by_url(url)
            if server is not None and not server.draining:
                server.drain(on=True)
        owners = self._supervisor.proxy.context.owners
        link.hello(hello, self._fleet.all_servers(), owners.entries(), self._prompts.known())
