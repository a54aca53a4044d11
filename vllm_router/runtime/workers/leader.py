"""The process that probes, decides, and answers for all; it accepts no inference connection.

Workers come and go, each at its end of a channel that outlives both sides. A worker's `Hello` is
answered with everything the leader knows; from then on it is told what changes.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import trio

from vllm_router.config.schema import Config
from vllm_router.config.source import ConfigSource
from vllm_router.fleet.server import Server
from vllm_router.http.hypercorn.bridge import HypercornSide
from vllm_router.http.server.listener import FULL_TOLD_EVERY, IDLE_WHEN_FULL
from vllm_router.observability.log_output import LogOutput
from vllm_router.observability.router_state import CPU, IN_FLIGHT, LAG
from vllm_router.observability.tracing import Telemetry
from vllm_router.proxy.record import Phase, Record
from vllm_router.proxy.retry import Outcome
from vllm_router.routing.server_estimate import PrefixStatistics
from vllm_router.runtime.supervisor import Supervisor
from vllm_router.runtime.workers.admit import admit
from vllm_router.runtime.workers.board import Sums
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.fleet import LeadingFleet, state_of
from vllm_router.runtime.workers.handover import take_over
from vllm_router.runtime.workers.in_force import InForce
from vllm_router.runtime.workers.messages import (
    Configured,
    Connection,
    Figures,
    Hello,
    ListsRead,
    LookAtLists,
    NamesKnown,
    Report,
    States,
    Verdict,
    Welcome,
    decode_from_worker,
    encode,
    parts_of,
)
from vllm_router.runtime.workers.peers import SharedQueue
from vllm_router.runtime.workers.reporter import unpack
from vllm_router.web.guard import OwnDoor

logger = logging.getLogger(__name__)

STATES = 25
"""Servers in one message; one with a thousand models takes some 30 KB."""

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
"""Figures that only rise: those of a worker that has ended still count."""


class Link:
    """The leader's side of one worker."""

    def __init__(self, number: int, channel: Channel) -> None:
        self.number = number
        self.channel = channel
        self.pid: int | None = None
        self.alive = False
        self.figures = Figures(False, {}, {})
        self.news: set[Server] = set()
        self.welcome: Welcome | None = Welcome(first=True)
        self.configured = 0
        self.lists_read = False
        self.wake = trio.Event()
        self.wake.set()


class Leader(Supervisor):
    """A supervisor whose proxy serves hardly anything, and whose fleet all workers share.

    `channels` are the ends of the workers; the caller closes them. `side` serves what they hand
    over, `most_connections` at a time: if there were more, probes would get no descriptors.
    """

    def __init__(
        self,
        config: Config,
        source: ConfigSource | None,
        *,
        side: HypercornSide,
        sums: Sums,
        queue: SharedQueue,
        channels: Sequence[Channel],
        in_force: InForce,
        output: LogOutput | None = None,
        telemetry: Telemetry | None = None,
        admin_port: int | None = None,
        own_door: OwnDoor | None = None,
        most_connections: int | None = None,
    ) -> None:
        self._most = math.inf if most_connections is None else most_connections
        self._full_told_at = -math.inf
        self._handed_over = 0
        self._links = [Link(number, channel) for number, channel in enumerate(channels, 1)]
        self._in_force = in_force
        self._generation = 1
        self._past: Counter[str] = Counter()
        self.worker_restarts = 0
        self._side = side
        self._queue = queue
        fleet = LeadingFleet(config, sums, self._news_of)
        self.shared_fleet = fleet
        super().__init__(
            config,
            source,
            output=output,
            telemetry=telemetry,
            admin_port=admin_port,
            own_door=own_door,
            fleet=fleet,
            make_peers=queue.make_peers,
        )
        self.proxy.usage = fleet.usage
        self.before_apply.append(fleet.check_room)
        in_force.write(config)

    def _start_tasks(self, nursery: trio.Nursery) -> None:
        super()._start_tasks(nursery)
        nursery.start_soon(self._keep, "waiting", partial(admit, self.proxy, self._queue.bells))
        for link in self._links:
            nursery.start_soon(self._keep, f"worker {link.number}", self._listener(link, nursery))
            nursery.start_soon(self._keep, f"news for {link.number}", self._teller(link))

    def _follow_signals(self, nursery: trio.Nursery) -> None:
        """The parent gets them, and tells."""

    # -- what workers say ---------------------------------------------------------------------

    def _listener(self, link: Link, nursery: trio.Nursery) -> Callable[[], Any]:
        async def listen() -> None:
            while True:
                data, fileno = await link.channel.receive()
                if not data:
                    await trio.sleep_forever()  # the parent has gone, and we go, too
                try:
                    message = decode_from_worker(data)
                except msgspec.DecodeError:
                    logger.exception("worker %d said what nobody understands", link.number)
                    continue
                match message:
                    case Report():
                        await self._report(message)
                    case Figures():
                        self._take(link, message)
                    case Connection():
                        self._take_over(message, fileno, nursery)
                    case Hello():
                        self._hello(link, message)
                    case LookAtLists():
                        nursery.start_soon(self._look_for, link)

        return listen

    async def _look_for(self, link: Link) -> None:
        """A worker waits for a fresh look at the lists of models."""
        await self._look_at_lists(lambda: False)
        link.lists_read = True
        link.wake.set()

    def _take_over(self, message: Connection, fileno: int | None, nursery: trio.Nursery) -> None:
        if fileno is not None and self._handed_over < self._most:
            self._handed_over += 1
            nursery.start_soon(self._serve, message, fileno)
            return
        if fileno is not None:
            os.close(fileno)
        self._side.close_idle(IDLE_WHEN_FULL)
        now = trio.current_time()
        if now - self._full_told_at >= FULL_TOLD_EVERY:
            self._full_told_at = now
            logger.error(
                "%d connections are open that are not of the lane, as many as there are "
                "descriptors for: others are closed",
                self._handed_over,
            )

    async def _serve(self, message: Connection, fileno: int) -> None:
        try:
            await take_over(self._side, message, fileno)
        finally:
            self._handed_over -= 1

    def _take(self, link: Link, figures: Figures) -> None:
        if not link.alive:
            return  # the last words of one whose death is known
        link.figures = figures
        for url, moment in figures.heard.items():
            server = self.shared_fleet.by_url(url)
            if server is not None:
                server.last_byte_at = max(server.last_byte_at, moment)
        for url, moment in figures.outputs.items():
            server = self.shared_fleet.by_url(url)
            if server is not None:
                server.output_at = max(server.output_at, moment)

    def lost(self, number: int, pid: int) -> None:
        """A worker has died, which had this process id."""
        link = self._links[number - 1]
        self.worker_restarts += 1
        if link.pid == pid:  # else its successor has been heard of before
            self._bury(link)

    def _bury(self, link: Link) -> None:
        if not link.alive:
            return
        link.alive = False
        for name, value in link.figures.values.items():
            if name in TOTALS:
                self._past[name] += value  # type: ignore[assignment]  # seconds, too
        link.figures = Figures(False, {}, {})

    def pid_of(self, number: int) -> int | None:
        """The process id of a worker, once it has said hello."""
        return self._links[number - 1].pid

    def _hello(self, link: Link, hello: Hello) -> None:
        if link.pid != hello.pid:
            self._bury(link)
        link.pid, link.alive = hello.pid, True
        self.resolver.take_over(hello.addresses)
        for url in hello.draining:
            server = self.shared_fleet.by_url(url)
            if server is not None and not server.draining:
                server.drain(on=True)
        link.news = set(self.fleet.all_servers())
        link.welcome = Welcome(first=False)
        link.configured = 0
        link.wake.set()

    async def _report(self, report: Report) -> None:
        fleet = self.shared_fleet
        for verdict in report.verdicts:
            server = fleet.by_url(verdict.url)
            if server is not None:
                self._judge(server, verdict)
        if report.verdicts:
            fleet.settle(trio.current_time())
        for url, outcome in report.attempts:
            server = fleet.by_url(url)
            if server is not None:
                server.served += 1
                self.proxy.attempt_ended(server, Outcome(outcome))
        for ended in report.ended:
            record = unpack(ended, fleet)
            self.metrics.exchange_ended(record)
            self.feed.exchange_ended(record)
        for code in report.refusals:
            self.refused(code)
        await trio.lowlevel.checkpoint()

    def _judge(self, server: Server, verdict: Verdict) -> None:
        """What an attempt in a worker has shown, as if it had been made here."""
        now, jitter, body = verdict.at, verdict.jitter, verdict.body
        match verdict.what:
            case "answered":
                server.answered(now, trial=verdict.trial)
            case "failed":
                self.fleet.failed(
                    server, now, trial=verdict.trial, jitter=jitter, body=body, odd=verdict.odd
                )
            case "not_its_fault" if body is not None:
                self.fleet.not_its_fault(server, now, jitter=jitter, body=body)
            case "refused":
                server.refused(now, verdict.retry_after)
            case "timed_out":
                self.fleet.timed_out(
                    server,
                    now,
                    verdict.since,
                    trial=verdict.trial,
                    jitter=jitter,
                    stream=verdict.sure,
                )
            case "waited_in_vain":
                self.fleet.waited_in_vain(server, now, verdict.since)
            case "others_take" if body is not None:
                self.fleet.others_take(
                    server,
                    verdict.name,
                    verdict.size,
                    verdict.words,
                    now,
                    body=body,
                    sure=verdict.sure,
                )
            case "refused_again":
                self.fleet.refused_again(server, verdict.name, now)
            case "takes_again" if verdict.asked is not None:
                self.fleet.takes_again(server, verdict.asked)
            case "unlist":
                self.fleet.unlist(server, verdict.name)

    # -- what workers are told ----------------------------------------------------------------

    def _news_of(self, server: Server) -> None:
        for link in self._links:
            link.news.add(server)
            link.wake.set()

    def _teller(self, link: Link) -> Callable[[], Any]:
        async def tell() -> None:
            while True:
                await link.wake.wait()
                link.wake = trio.Event()
                welcome, link.welcome = link.welcome, None
                if welcome is not None and welcome.first:
                    await link.channel.send(encode(welcome))
                if link.pid is None:
                    continue
                if link.configured != self._generation:
                    link.configured = self._generation
                    await link.channel.send(encode(Configured(self._generation)))
                while link.news:
                    told = [link.news.pop() for _ in range(min(STATES, len(link.news)))]
                    # A leader that has just begun knows less than its workers.
                    known = [state_of(one) for one in told if one.probe_health.up is not None]
                    await link.channel.send(encode(States(known)))
                if link.lists_read:
                    link.lists_read = False
                    await link.channel.send(encode(ListsRead()))
                if welcome is not None and not welcome.first:
                    for some in parts_of(self.resolver.known()):
                        await link.channel.send(encode(NamesKnown(some)))
                    # Last, for it is the sign to serve: whoever does must know the servers.
                    await link.channel.send(encode(welcome))

        return tell

    def _apply(self, old: Config, new: Config) -> None:
        super()._apply(old, new)
        self._in_force.write(new)
        self._generation += 1
        for link in self._links:
            link.news.update(self.fleet.all_servers())
            link.wake.set()

    # -- one router ---------------------------------------------------------------------------

    @property
    def serving(self) -> int:
        """How many workers accept connections."""
        return sum(link.figures.serving for link in self._links)

    @property
    def ready(self) -> bool:
        return super().ready and self.serving > 0

    @property
    def in_flight(self) -> int:
        return super().in_flight + int(self.elsewhere(IN_FLIGHT) or 0)

    def running(self) -> list[Record]:
        running = super().running()
        for link in self._links:
            for url, chunks in link.figures.chunks.items():
                running.append(
                    Record(
                        0.0,
                        "",
                        b"",
                        "",
                        b"",
                        phase=Phase.STREAM,
                        server=self.shared_fleet.by_url(url),
                        chunks=chunks,
                    )
                )
        return running

    def workers(self) -> Mapping[str, Mapping[str, float]]:
        return {
            str(link.number): link.figures.values for link in self._links if link.figures.values
        }

    def prefix_statistics(self, server: Server) -> PrefixStatistics | None:
        own = super().prefix_statistics(server)
        told = [link.figures.prefixes.get(server.url) for link in self._links]
        known = [one for one in (own, *told) if one is not None]
        return PrefixStatistics(*map(sum, zip(*known, strict=True))) if known else None

    def elsewhere(self, figure: str) -> float | None:
        if figure == "workers":
            return self.serving
        if figure == "restarts":
            return self.worker_restarts
        values = [link.figures.values.get(figure, 0.0) for link in self._links]
        if figure == LAG:
            return max(values)
        return sum(values) + self._past.get(figure, 0)
