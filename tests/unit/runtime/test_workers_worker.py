"""A worker that follows its leader, over a real channel, without processes."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from support.fleet_makers import come_up, gauges, go_down, make_config
from vllm_router.config.schema import Config
from vllm_router.errors import ConfigError
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.observability.slices import SERVERS_AT_ONCE
from vllm_router.proxy.retry import RetryBudget
from vllm_router.routing.owners import Entry
from vllm_router.runtime.model_lists import LOOK_GAP
from vllm_router.runtime.probes import ProbeContext
from vllm_router.runtime.workers.channel import Channel, pair
from vllm_router.runtime.workers.config_snapshot import ConfigSnapshot
from vllm_router.runtime.workers.fleet import LeadingFleet
from vllm_router.runtime.workers.leader_client import ModelListRequests
from vllm_router.runtime.workers.messages import (
    Configured,
    FromWorker,
    Hello,
    KeyShare,
    ModelListsRefreshed,
    RefreshModelLists,
    Report,
    ResolvedNames,
    ServerStates,
    StoredResponses,
    Welcome,
    WorkerStats,
    decode_from_worker,
    encode,
)
from vllm_router.runtime.workers.queue_board import QueueBoard
from vllm_router.runtime.workers.queue_peers import SharedQueue
from vllm_router.runtime.workers.queue_wakeup import Wakeups
from vllm_router.runtime.workers.reporter import Reporter
from vllm_router.runtime.workers.shared_counters import CounterView, SharedCounters
from vllm_router.runtime.workers.shared_server import state_of
from vllm_router.runtime.workers.worker import FollowedProbes, Worker, build, not_here

ENTRY: Entry = (b"0123456789abcdef", "http://a.test:1", "ann")


@dataclass
class Following:
    """A running worker, the leader's end of its channel, and the leader's fleet."""

    worker: Worker
    channel: Channel
    fleet: LeadingFleet
    snapshot: ConfigSnapshot

    @property
    def servers(self) -> dict[str, Server]:
        return self.worker.supervisor.fleet.servers

    async def sent(self, kind: type[Any]) -> Any:
        """The worker's next message of this kind."""
        while True:
            message: FromWorker = decode_from_worker((await self.channel.receive())[0])
            if isinstance(message, kind):
                return message

    async def tell_state(self, server: Server) -> None:
        await self.channel.send(encode(ServerStates([state_of(server)])))

    async def configure(self, config: Config) -> None:
        self.snapshot.write(config)
        await self.channel.send(encode(Configured(2)))

    async def has_read_all(self) -> None:
        """Return when the worker has handled all messages: it answers the last one."""
        await self.channel.send(encode(Welcome(first=True)))
        await self.sent(StoredResponses)


@asynccontextmanager
async def following(
    config: Config | None = None, prepare: Callable[[Worker], None] = lambda worker: None
) -> AsyncIterator[Following]:
    config = config or make_config(2)
    ours, theirs = map(Channel, pair())
    board, snapshot, queue = (
        SharedCounters.create(3),
        ConfigSnapshot.create(config),
        QueueBoard.create(3),
    )
    wakeups = [Wakeups.create() for _ in range(3)]
    try:
        leading = LeadingFleet(config, CounterView(SharedCounters(board, 3), 0), lambda _: None)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                worker = build(
                    config,
                    counters=CounterView(SharedCounters(board, 3), 1),
                    channel=ours,
                    reporter=Reporter(ours),
                    queue=SharedQueue(QueueBoard(queue, 3), 1, Wakeups(wakeups, 1)),
                    snapshot=ConfigSnapshot(snapshot),
                    workers=2,
                )
                worker.supervisor.proxy.context.owners.take(ENTRY)
                prepare(worker)
                await nursery.start(worker.supervisor.run)
                yield Following(worker, theirs, leading, ConfigSnapshot(snapshot))
                nursery.cancel_scope.cancel()
    finally:
        ours.close()
        theirs.close()
        for fileno in (board, snapshot, queue, *wakeups):
            os.close(fileno)


# -- state ----------------------------------------------------------------------------------------


async def test_worker_start_says_hello_with_drained_servers_and_addresses():
    def prepare(worker: Worker) -> None:
        worker.supervisor.fleet.servers["b"].drain(on=True)
        name = worker.supervisor.resolver.name("a.test")
        name.seed([(socket.AF_INET, "10.0.0.1", 0, 0)])

    async with following(prepare=prepare) as rig:
        hello = await rig.sent(Hello)
        assert hello.pid == os.getpid()
        assert hello.draining == ["http://b.test:1"]
        assert hello.addresses["a.test"] == [(socket.AF_INET, "10.0.0.1", 0, 0)]


async def test_worker_new_leader_gets_hello_figures_and_stored_responses():
    async with following() as rig:
        await rig.sent(Hello)
        await rig.channel.send(encode(Welcome(first=True)))
        assert (await rig.sent(Hello)).pid == os.getpid()
        assert not (await rig.sent(WorkerStats)).serving
        assert (await rig.sent(StoredResponses)).entries == [ENTRY]
        assert not rig.worker.leader.welcomed.is_set()


async def test_worker_is_welcomed_once_the_whole_state_has_arrived():
    async with following() as rig:
        come_up(rig.fleet.servers["a"], 0.0, "m")
        await rig.tell_state(rig.fleet.servers["a"])
        await rig.channel.send(encode(Welcome(first=False)))
        await rig.worker.leader.welcomed.wait()
        assert rig.servers["a"].models == ("m",)
        assert [server.active_health.up for server in rig.servers.values()] == [True, None]


async def test_worker_server_that_goes_down_loses_its_silent_requests_once(
    monkeypatch: pytest.MonkeyPatch,
):
    async with following() as rig:
        down: list[str] = []
        monkeypatch.setattr(
            rig.worker.supervisor, "server_down", lambda server: down.append(server.name)
        )
        for change in (come_up, go_down, go_down):
            change(rig.fleet.servers["b"], 0.0)
            await rig.tell_state(rig.fleet.servers["b"])
        await rig.has_read_all()
        assert rig.servers["b"].active_health.up is False
        assert down == ["b"]


async def test_worker_takes_stored_responses_addresses_and_shares_of_keys():
    async with following() as rig:
        other: Entry = (b"fedcba9876543210", "http://b.test:1", "")
        addresses = {"b.test": [(int(socket.AF_INET), "10.0.0.2", 0, 0)]}
        for message in (StoredResponses([other]), ResolvedNames(addresses), KeyShare(3)):
            await rig.channel.send(encode(message))
        await rig.has_read_all()
        context = rig.worker.supervisor.proxy.context
        assert list(context.owners.entries()) == [ENTRY, other]
        assert rig.worker.supervisor.resolver.known()["b.test"] == addresses["b.test"]
        assert context.key_limits.routers == 3


async def test_worker_reports_refusals_and_stored_responses_to_leader():
    async with following() as rig:
        rig.worker.supervisor.refused("no_such_key")
        rig.worker.supervisor.proxy.context.owners.remember("resp_1", "http://a.test:1", "")
        report = await rig.sent(Report)
        assert report.refusals == ["no_such_key"]
        assert [url for _, url, _ in report.stored] == ["http://a.test:1"]


# -- configuration --------------------------------------------------------------------------------


async def test_worker_gets_its_share_of_memory_and_retries():
    config = make_config(1, max_bodies_mb=400, max_body_mb=32)
    async with following(config) as rig:
        supervisor = rig.worker.supervisor
        assert supervisor.config.settings.max_bodies_mb == 200
        budget = supervisor.proxy.context.budget
        assert budget.depth == budget.floor == RetryBudget().floor / 2
        await rig.configure(make_config(1, max_bodies_mb=600, max_body_mb=500))
        await rig.has_read_all()
        # Half of 600, but a body of the largest size must fit.
        assert supervisor.config.settings.max_bodies_mb == 500


async def test_worker_unchanged_configuration_only_looks_up_its_counters(
    monkeypatch: pytest.MonkeyPatch,
):
    config = make_config(2)
    async with following(config) as rig:
        applied: list[Config] = []
        rig.worker.supervisor.after_apply.append(applied.append)
        looked_up: list[bool] = []
        monkeypatch.setattr(
            rig.worker.supervisor.fleet, "use_columns", lambda: looked_up.append(True)
        )
        await rig.configure(config)
        await rig.has_read_all()
        assert (applied, looked_up) == ([], [True])


async def test_worker_configuration_being_written_waits_for_the_next_message():
    async with following(make_config(1)) as rig:
        await rig.channel.send(encode(Welcome(first=True)))
        await rig.sent(StoredResponses)
        os.pwrite(rig.snapshot._fileno, bytes(24), 0)
        await rig.channel.send(encode(Configured(2)))
        await rig.has_read_all()
        assert list(rig.servers) == ["a"]
        await rig.configure(make_config(2))
        await rig.has_read_all()
        assert list(rig.servers) == ["a", "b"]


async def test_worker_configuration_that_cannot_be_applied_changes_nothing(
    caplog: pytest.LogCaptureFixture,
):
    async with following(make_config(1)) as rig:

        def refuse(new: Config) -> None:
            raise ConfigError(["certificate: no such file"])

        rig.worker.supervisor.before_apply.append(refuse)
        await rig.configure(make_config(2))
        await rig.has_read_all()
        assert list(rig.servers) == ["a"]
    assert "cannot be applied in this worker" in caplog.text
    assert "certificate: no such file" in caplog.text


async def test_worker_without_leader_goes_on_with_the_last_state():
    async with following() as rig:
        come_up(rig.fleet.servers["a"], 0.0, "m")
        await rig.tell_state(rig.fleet.servers["a"])
        await rig.has_read_all()
        rig.channel.close()
        await wait_all_tasks_blocked()
        assert rig.servers["a"].active_health.up
        assert rig.worker.supervisor.task_restarts == 0


# -- model lists ----------------------------------------------------------------------------------


class Wire:
    """The sending side of a channel; `on_send` is called for each message."""

    def __init__(self, on_send: Callable[[], None] = lambda: None) -> None:
        self.sent: list[FromWorker] = []
        self._on_send = on_send

    async def send(self, message: bytes) -> None:
        self.sent.append(decode_from_worker(message))
        self._on_send()


async def test_model_list_request_without_answer_ends_after_its_time(autojump_clock):
    wire = Wire()
    await ModelListRequests(cast("Channel", wire), lambda: 5.0).refresh()
    assert wire.sent == [RefreshModelLists()]
    assert trio.current_time() == pytest.approx(LOOK_GAP + 5.0 + 1.0)


async def test_model_list_request_returns_with_the_answer_to_it_alone(autojump_clock):
    wire = Wire()
    requests = ModelListRequests(cast("Channel", wire), lambda: 5.0)
    requests.refreshed()  # the answer to a request that has timed out
    async with trio.open_nursery() as nursery:
        nursery.start_soon(requests.refresh)
        await trio.sleep(2)
        assert nursery.child_tasks
        requests.refreshed()
    assert trio.current_time() == 2


async def test_worker_refresh_of_lists_is_answered_by_leader():
    async with following() as rig:
        done = trio.Event()

        async def refresh() -> None:
            await rig.worker.supervisor.refresh_model_lists(lambda: False)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refresh)
            await rig.sent(RefreshModelLists)
            assert not done.is_set()
            await rig.channel.send(encode(ModelListsRefreshed()))


# -- upkeep ---------------------------------------------------------------------------------------


def probe_context(fleet: Fleet, upkeep: Callable[[Server, float], None]) -> ProbeContext:
    return ProbeContext(
        fleet=fleet,
        rng=cast("Any", None),
        tls=cast("Any", None),
        resolver=cast("Any", None),
        tasks=cast("Any", None),
        server_down=lambda server: None,
        upkeep=upkeep,
        scrapes=cast("Any", None),
    )


async def test_followed_probes_do_the_upkeep_of_a_large_fleet_in_slices(autojump_clock):
    servers = [{"url": f"http://s{n}.test:1"} for n in range(4 * SERVERS_AT_ONCE)]
    fleet = Fleet(make_config(servers, metrics_interval=3))
    turn, turns = 0, Counter[int]()

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await trio.lowlevel.checkpoint()

    def upkeep(server: Server, now: float) -> None:
        turns[turn] += 1

    probes = FollowedProbes(cast("Any", None), probe_context(fleet, upkeep))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(probes.run)
        await trio.sleep(2.9)
        nursery.start_soon(count_turns)
        autojump_clock.jump(0.2)
        for _ in range(1000):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert sum(turns.values()) == len(servers)
    # Trio runs the tasks of a turn in any order: two slices may follow each other.
    assert max(turns.values()) <= 2 * SERVERS_AT_ONCE


async def test_followed_probes_do_the_upkeep_of_each_server_per_scrape_interval(autojump_clock):
    fleet = Fleet(make_config(2, metrics_interval=3))
    kept: list[tuple[float, str]] = []
    context = probe_context(fleet, lambda server, now: kept.append((now - begun, server.name)))
    refresh: Callable[[], Awaitable[None]] = cast("Any", None)
    probes = FollowedProbes(refresh, context)
    assert probes.list_readers() == [refresh]
    begun = trio.current_time()
    server = fleet.servers["a"]
    come_up(server, begun)
    server.scraped(gauges(1), begun, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(probes.run)
        for seconds, fresh in ((9.5, True), (3.0, False)):  # metrics expire after three intervals
            await trio.sleep(seconds)
            assert server.load_estimate.fresh is fresh
        nursery.cancel_scope.cancel()
    assert kept == [(at, name) for at in (3, 6, 9, 12) for name in "ab"]


async def test_worker_control_plane_is_not_served():
    with pytest.raises(RuntimeError, match="http /metrics belongs to the leader"):
        await not_here({"type": "http", "path": "/metrics"}, cast("Any", None), cast("Any", None))
