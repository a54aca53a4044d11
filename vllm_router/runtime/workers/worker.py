"""A worker: serves inference requests, and leaves everything else to the leader.

It has its own fleet, proxy and listener, but no probes, no control plane and no configuration file:
it takes over the servers' state from the leader.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import msgspec
import trio

from vllm_router.config.schema import Config
from vllm_router.fleet.server import Server
from vllm_router.http.asgi_types import Receive, Scope, Send
from vllm_router.observability.log_output import LogOutput
from vllm_router.observability.slices import each, in_turns
from vllm_router.observability.tracing import Telemetry
from vllm_router.runtime.model_lists import Reader
from vllm_router.runtime.parts import Parts, SignalSource
from vllm_router.runtime.probes import ProbeContext
from vllm_router.runtime.supervisor import Supervisor
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.config_snapshot import ConfigSnapshot
from vllm_router.runtime.workers.fleet import FollowingFleet
from vllm_router.runtime.workers.leader_client import LeaderClient, ModelListRequests
from vllm_router.runtime.workers.queue_peers import SharedQueue
from vllm_router.runtime.workers.queue_wakeup import serve_waiters
from vllm_router.runtime.workers.reporter import Reporter
from vllm_router.runtime.workers.shared_counters import CounterView
from vllm_router.runtime.workers.shared_prompts import WorkerPrompts
from vllm_router.runtime.workers.worker_stats import StatsSender

LISTS_GAP = 0.1
"""Seconds between two requests to read the model lists; the leader's own gap is longer."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A supervisor, and its connection to the leader."""

    supervisor: Supervisor
    leader: LeaderClient
    stats: StatsSender


class FollowedProbes:
    """The `ProbeSource` of a worker: the leader probes, this process only does the upkeep."""

    list_gap = LISTS_GAP

    def __init__(self, refresh_lists: Reader, context: ProbeContext) -> None:
        self._refresh_lists = refresh_lists
        self._context = context

    async def run(self) -> None:
        """Do what follows a scrape in the process that probes, at the same interval."""
        fleet = self._context.fleet
        while True:
            await trio.sleep(fleet.settings.metrics_interval)
            await in_turns(each(fleet.all_servers(), self._keep_up))
            fleet.settle(trio.current_time())

    def _keep_up(self, server: Server) -> None:
        now = trio.current_time()
        server.expire(now)
        self._context.upkeep(server, now)

    def start(self, server: Server) -> None:
        """The leader has the configuration, too, and starts the probe."""

    def stop(self, server: Server) -> None:
        """The leader stops the probe."""

    def read_list_soon(self, server: Server) -> None:
        """The fleet reports a wrong model list to the leader by itself."""

    def check_soon(self, server: Server) -> None:
        """The leader checks it."""

    def list_readers(self) -> list[Reader]:
        return [self._refresh_lists]


def build(
    config: Config,
    *,
    counters: CounterView,
    channel: Channel,
    reporter: Reporter,
    queue: SharedQueue,
    snapshot: ConfigSnapshot,
    workers: int,
    signals: SignalSource | None = None,
    output: LogOutput | None = None,
    telemetry: Telemetry | None = None,
    admin_port: int | None = None,
) -> Worker:
    """Put a worker together; the caller closes `channel`, which leads to the leader.

    The memory and retries that the configuration allows the router are divided by `workers`.
    """
    own_share = partial(_own_share, workers)
    config = own_share(config)
    fleet = FollowingFleet(config, counters, reporter.verdict)
    lists = ModelListRequests(channel, lambda: fleet.settings.health_check_timeout)
    supervisor = Supervisor(
        config,
        None,
        output=output,
        telemetry=telemetry,
        admin_port=admin_port,
        parts=Parts(
            fleet=fleet,
            key_limits=fleet.key_limits,
            make_peers=queue.make_peers,
            reports=reporter,
            make_probes=partial(FollowedProbes, lists.refresh),
            signals=signals,
        ),
    )
    reporter.gather = supervisor.proxy.context.recorder.flush
    supervisor.proxy.context.owners.on_new = reporter.stored
    supervisor.proxy.context.budget.floor /= workers
    supervisor.proxy.context.budget.depth = supervisor.proxy.context.budget.floor
    stats = StatsSender(supervisor, channel, reporter)
    prompts = WorkerPrompts(supervisor, channel)
    leader = LeaderClient(
        supervisor,
        fleet,
        channel,
        snapshot,
        lists,
        own_share=own_share,
        send_stats=stats.send,
        hear=prompts.hear,
    )
    supervisor.tasks += [
        ("leader", leader.run),
        ("reports", reporter.run),
        ("figures", stats.run),
        ("prompts", prompts.run),
        ("waiting", partial(serve_waiters, supervisor.proxy, queue.wakeups)),
    ]
    return Worker(supervisor, leader, stats)


def _own_share(workers: int, config: Config) -> Config:
    """One worker's share of the memory for bodies: at least one body of the largest size."""
    settings = config.settings
    bodies = max(settings.max_body_mb, settings.max_bodies_mb / workers)
    return msgspec.structs.replace(
        config, settings=msgspec.structs.replace(settings, max_bodies_mb=bodies)
    )


async def not_here(scope: Scope, receive: Receive, send: Send) -> None:
    """The control plane of a worker: its listener hands such connections to the leader."""
    raise RuntimeError(f"{scope['type']} {scope.get('path')} belongs to the leader")
