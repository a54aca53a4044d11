"""A process that serves inference, and leaves everything else to the leader.

It has a fleet, a proxy and a lane of its own, and no probes, no pages and no file to follow: what
it knows of the servers it has been told. While there is no leader it goes on with what it knows.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from functools import partial

import msgspec
import trio

from vllm_router.config.schema import Config
from vllm_router.errors import ConfigError
from vllm_router.fleet.server import Transition
from vllm_router.http.asgi_types import Receive, Scope, Send
from vllm_router.observability.log_output import LogOutput
from vllm_router.observability.metric_families import ROUTER_METRICS, SUMMED
from vllm_router.observability.process import cpu_seconds, rss_bytes
from vllm_router.observability.router_state import CONNECTIONS, CPU, IN_FLIGHT, LAG, MEMORY
from vllm_router.observability.tracing import Telemetry
from vllm_router.runtime.model_lists import LOOK_GAP, ModelLists
from vllm_router.runtime.supervisor import END_TIME, Supervisor
from vllm_router.runtime.workers.admit import admit
from vllm_router.runtime.workers.board import Sums
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.fleet import FollowingFleet
from vllm_router.runtime.workers.in_force import InForce
from vllm_router.runtime.workers.messages import (
    Configured,
    Figures,
    Hello,
    ListsRead,
    LookAtLists,
    NamesKnown,
    States,
    Welcome,
    decode_from_leader,
    encode,
    parts_of,
)
from vllm_router.runtime.workers.peers import SharedQueue
from vllm_router.runtime.workers.reporter import Reporter

logger = logging.getLogger(__name__)

FIGURES_EVERY = 0.1
"""Seconds between two looks at what there is to be told."""


LISTS_GAP = 0.1
"""Seconds between two times that the leader is asked to read the lists; its own gap is longer."""


class Worker(Supervisor):
    """A supervisor that follows the leader at the other end of `channel`.

    `workers` is how many there are: what the configuration allows the router in memory and
    retries is divided by it. `serving` says whether connections are accepted, `connections` how
    many there are, `relays` how many of them the leader serves through us.
    """

    def __init__(
        self,
        config: Config,
        *,
        sums: Sums,
        channel: Channel,
        reporter: Reporter,
        queue: SharedQueue,
        in_force: InForce,
        workers: int,
        output: LogOutput | None = None,
        telemetry: Telemetry | None = None,
        admin_port: int | None = None,
    ) -> None:
        self._workers = workers
        self._channel = channel
        self._in_force = in_force
        self._reporter = reporter
        self.serving = False
        self.connections: Callable[[], int] = int
        self.relays: Callable[[], int] = int
        self.welcomed = trio.Event()
        self._queue = queue
        config = self._share_of(config)
        fleet = FollowingFleet(config, sums, reporter.verdict)
        self.shared_fleet = fleet
        super().__init__(
            config,
            None,
            output=output,
            telemetry=telemetry,
            admin_port=admin_port,
            fleet=fleet,
            recorder=reporter,
            make_peers=queue.make_peers,
        )
        self.proxy.usage = fleet.usage
        self.lists = ModelLists(lambda: [self._leader_reads_lists], LISTS_GAP)
        self._lists_read = trio.Event()
        reporter.gather = self.proxy.tell
        self.proxy.budget.floor /= workers
        self.proxy.budget.depth = self.proxy.budget.floor

    def _share_of(self, config: Config) -> Config:
        """The configuration as one of the workers has it; a body of the largest size fits in."""
        settings = config.settings
        bodies = max(settings.max_body_mb, settings.max_bodies_mb / self._workers)
        return msgspec.structs.replace(
            config, settings=msgspec.structs.replace(settings, max_bodies_mb=bodies)
        )

    def _start_tasks(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._keep, "leavers", self._dismiss_leavers)
        nursery.start_soon(self._keep, "leader", self._listen)
        nursery.start_soon(self._keep, "lists", self.lists.run)
        nursery.start_soon(self._keep, "reports", self._reporter.run)
        nursery.start_soon(self._keep, "figures", self._keep_telling)
        nursery.start_soon(self._keep, "upkeep", self._look_after)
        nursery.start_soon(self._keep, "stalls", self.stalls.run)
        nursery.start_soon(self._keep, "waiting", partial(admit, self.proxy, self._queue.bells))

    def _start_probe(self, server: object) -> None:
        """The leader does."""

    def _log_transition(self, change: Transition) -> None:
        """The leader does."""

    def refused(self, code: str) -> None:
        self._reporter.refused(code)

    # -- the leader ---------------------------------------------------------------------------

    def _hello(self) -> bytes:
        draining = [server.url for server in self.fleet.servers.values() if server.draining]
        # One message has room for so many; a new leader soon finds the others itself.
        addresses = next(parts_of(self.resolver.known()), {})
        return encode(Hello(os.getpid(), draining, addresses))

    async def _listen(self) -> None:
        await self._channel.send(self._hello())
        while True:
            data, _ = await self._channel.receive()
            if not data:
                await trio.sleep_forever()  # the parent has gone, and we go, too
            match decode_from_leader(data):
                case States(servers):
                    now = trio.current_time()
                    for state in servers:
                        down = self.shared_fleet.follow(state, now)
                        if down is not None:
                            self._server_down(down)
                    self.fleet.settle(now)
                case Configured():
                    await self._read_configuration()
                case NamesKnown(addresses):
                    self.resolver.take_over(addresses)
                case ListsRead():
                    self._lists_read.set()
                case Welcome(first):
                    if first:
                        await self._channel.send(self._hello())
                        await self.tell_figures()
                    else:
                        self.welcomed.set()

    async def _leader_reads_lists(self) -> None:
        """Have the leader read the servers' lists of models; what it finds comes first."""
        self._lists_read = trio.Event()
        with trio.move_on_after(LOOK_GAP + self.fleet.settings.health_check_timeout + 1.0):
            await self._channel.send(encode(LookAtLists()))
            await self._lists_read.wait()

    async def _read_configuration(self) -> None:
        new = self._in_force.read()
        if new is None:
            return  # being written again, of which we shall be told
        new = self._share_of(new)
        old = self.config
        if new == old:
            self.shared_fleet.take_places()
            return
        try:
            await self._prepare(new)
            self._apply(old, new)
        except ConfigError as error:
            logger.error("configuration not taken over: %s", "; ".join(error.problems))

    async def _look_after(self) -> None:
        """What the probes do in a router of one process, besides asking."""
        while True:
            await trio.sleep(self.fleet.settings.metrics_interval)
            now = trio.current_time()
            for server in self.fleet.all_servers():
                server.age_metrics(now)
                self.proxy.tick(server, now)
            self.fleet.settle(now)

    async def tell_figures(self) -> None:
        """Tell how much of what there is now."""
        await self._channel.send(encode(self._figures()))

    async def _keep_telling(self) -> None:
        told: Figures | None = None
        last = -float("inf")
        while True:
            figures = self._figures()
            now = trio.current_time()
            if figures != told and (now - last > 1 or _changed(figures, told)):
                told, last = figures, now
                await self._channel.send(encode(figures))
            await trio.sleep(FIGURES_EVERY)

    def _figures(self) -> Figures:
        values: dict[str, float] = {
            CONNECTIONS: self.connections(),
            IN_FLIGHT: self.in_flight,
            CPU: round(cpu_seconds(), 2),
            MEMORY: rss_bytes(),
            LAG: round(self.stalls.lag.worst(trio.current_time()), 4),
            "reports_dropped": self._reporter.dropped,
        }
        for family, read in ROUTER_METRICS:
            if family.name in SUMMED:
                values[family.name] = read(self) or 0.0
        chunks: dict[str, int] = {}
        for record in self.running():
            if record.chunks and record.server is not None:
                url = record.server.url
                chunks[url] = chunks.get(url, 0) + record.chunks
        servers = self.fleet.all_servers()
        prefixes = {}
        for server in servers:
            statistics = self.prefix_statistics(server)
            if statistics is not None:
                prefixes[server.url] = statistics
        heard = {one.url: one.last_byte_at for one in servers if one.last_byte_at > -math.inf}
        outputs = {one.url: moment for one in servers if (moment := one.last_output()) > -math.inf}
        return Figures(self.serving, values, chunks, prefixes, heard, outputs)

    async def wind_down(self, *, still_listening: bool = False) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait_for_relays)
            await super().wind_down(still_listening=still_listening)

    async def _wait_for_relays(self) -> None:
        """The leader, which drains at the same time, ends them when they have been answered."""
        with trio.move_on_after(self.config.settings.drain_timeout + END_TIME):
            while self.relays():  # noqa: ASYNC110 (nobody is told, and it is soon)
                await trio.sleep(0.02)

    @property
    def ready(self) -> bool:
        return self.serving and super().ready


def _changed(figures: Figures, told: Figures | None) -> bool:
    """Whether more has changed than what the process itself costs."""
    return (
        told is None
        or figures.serving != told.serving
        or figures.chunks != told.chunks
        or figures.values[CONNECTIONS] != told.values[CONNECTIONS]
        or figures.values[IN_FLIGHT] != told.values[IN_FLIGHT]
    )


async def not_here(scope: Scope, receive: Receive, send: Send) -> None:
    """The control plane of a worker: the lane hands everything else over before it comes here."""
    raise RuntimeError(f"{scope['type']} {scope.get('path')} belongs to the leader")
