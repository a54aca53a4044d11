"""Messages between the leader and a worker, over a real channel, without processes."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import msgspec
import pytest
import trio

from support.fleet_makers import make_config, make_fleet
from vllm_router.config.limits import LimitsConfig
from vllm_router.errors import ConfigError
from vllm_router.http.client.resolver import Resolver
from vllm_router.http.hypercorn.handler import HypercornHandler
from vllm_router.observability.router_state import CPU
from vllm_router.routing.policies import PolicySettings
from vllm_router.routing.policy_set import PolicySet
from vllm_router.routing.prompt.blocks import Prompt, hash_blocks
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.routing.sharing.messages import Batch, pack_blocks
from vllm_router.routing.sharing.peers import Peers
from vllm_router.runtime.workers.adopted import AdoptedConnections
from vllm_router.runtime.workers.channel import Channel, pair
from vllm_router.runtime.workers.config_snapshot import ConfigSnapshot
from vllm_router.runtime.workers.leader import Leader, build
from vllm_router.runtime.workers.messages import (
    Configured,
    Connection,
    FromLeader,
    Hello,
    ModelListsRefreshed,
    PeerBatch,
    RefreshModelLists,
    ResolvedNames,
    ServerStates,
    StoredResponses,
    Welcome,
    WorkerStats,
    decode_from_leader,
    encode,
)
from vllm_router.runtime.workers.queue_board import SLOTS, QueueBoard
from vllm_router.runtime.workers.queue_peers import SharedQueue
from vllm_router.runtime.workers.queue_wakeup import Wakeups
from vllm_router.runtime.workers.shared_counters import CounterView, SharedCounters
from vllm_router.runtime.workers.shared_prompts import NOT_SHOWN
from vllm_router.runtime.workers.worker_link import MAX_BATCHES

TEXT = bytes(n * n % 251 for n in range(40_000))
PROMPT = Prompt(hash_blocks(TEXT), len(TEXT), conversation=1)


async def _no_app(*_: Any) -> None:
    raise RuntimeError("not used")


@asynccontextmanager
async def leading(most: int | None = None) -> AsyncIterator[tuple[Leader, Channel]]:
    """A leader, and the other end of the channel to its only worker."""
    async with leading_two(most) as (leader, worker, _):
        yield leader, worker


@asynccontextmanager
async def leading_two(most: int | None = None) -> AsyncIterator[tuple[Leader, Channel, Channel]]:
    """A leader, and the other ends of the channels to two workers."""
    config = make_config(
        [{"url": f"http://127.0.0.1:{n}"} for n in range(1, 31)], enable_active_health_check=False
    )
    (ours, theirs), (ours_2, theirs_2) = (map(Channel, pair()) for _ in range(2))
    board, snapshot = SharedCounters.create(3), ConfigSnapshot.create(config)
    queue, wakeups = QueueBoard.create(3), [Wakeups.create() for _ in range(3)]
    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                leader = build(
                    config,
                    None,
                    nursery=nursery,
                    adopted=AdoptedConnections(HypercornHandler(_no_app), nursery, most),
                    counters=CounterView(SharedCounters(board, 3), 0),
                    queue=SharedQueue(QueueBoard(queue, 3), 0, Wakeups(wakeups, 0)),
                    channels=[ours, ours_2],
                    snapshot=ConfigSnapshot(snapshot),
                )
                await nursery.start(leader.supervisor.run)
                yield leader, theirs, theirs_2
                nursery.cancel_scope.cancel()
    finally:
        for channel in (ours, theirs, ours_2, theirs_2):
            channel.close()
        for fileno in (board, snapshot, queue, *wakeups):
            os.close(fileno)


def figures(cpu: float) -> bytes:
    return encode(WorkerStats(True, {CPU: cpu}, {}))


async def settled(condition: Any) -> None:
    while not condition():
        await trio.sleep(0.001)


async def received_until(worker: Channel, last: FromLeader) -> list[FromLeader]:
    """The leader's messages up to this one."""
    messages: list[FromLeader] = []
    while not messages or messages[-1] != last:
        messages.append(decode_from_leader((await worker.receive())[0]))
    return messages


async def test_leader_lets_worker_serve_after_sending_all_servers():
    async with leading() as (leader, worker):
        await worker.send(encode(Hello(1, [])))
        received: set[str] = set()
        while True:
            message = decode_from_leader((await worker.receive())[0])
            if isinstance(message, ServerStates):
                received.update(state.url for state in message.servers)
            elif isinstance(message, Welcome) and not message.first:
                break
        assert received == {server.url for server in leader.supervisor.fleet.servers.values()}


async def test_leader_and_worker_share_resolved_addresses():
    """A worker started while the resolver fails must not consider the fleet down."""
    async with leading() as (leader, worker):
        known, unknown = (
            leader.supervisor.resolver.name(host) for host in ("known.test", "unknown.test")
        )
        known.seed([(socket.AF_INET, "10.0.0.1", 0, 0)])
        hello = Hello(1, [], {"unknown.test": [(socket.AF_INET6, "fd00::1", 0, 0)], "other": []})
        await worker.send(encode(hello))
        received: dict[str, Any] = {}
        while True:
            message = decode_from_leader((await worker.receive())[0])
            if isinstance(message, ResolvedNames):
                received |= message.addresses
            elif message == Welcome(first=False):
                break
        assert received["known.test"] == [(socket.AF_INET, "10.0.0.1", 0, 0)]
        assert unknown.addresses(80, 0.0, 0) == [(socket.AF_INET6, ("fd00::1", 80, 0, 0))]
        mine = Resolver()
        name = mine.name("known.test")
        mine.take_over(received)
        assert name.hosts == known.hosts
        name.seed([(socket.AF_INET, "10.9.9.9", 0, 0)])
        assert name.hosts == known.hosts


@pytest.mark.parametrize("late", [False, True])
async def test_leader_counts_cost_of_dead_worker_once(late: bool):
    async with leading() as (leader, worker):
        await worker.send(encode(Hello(11, [])))
        await worker.send(figures(2.0))
        await settled(lambda: leader.supervisor.elsewhere(CPU) == 2.0)
        if not late:
            leader.workers.lost(1, 11)
        await worker.send(figures(3.0))  # its last message, which the leader had not read yet
        await worker.send(encode(Hello(12, [])))
        await worker.send(figures(0.5))
        await settled(lambda: leader.supervisor.workers().get("1", {}).get(CPU) == 0.5)
        if late:
            leader.workers.lost(1, 11)
        assert leader.supervisor.elsewhere(CPU) == (3.5 if late else 2.5)
        assert leader.workers.serving == 1
        assert leader.workers.restarts == 1


async def test_leader_worker_without_hello_is_not_serving():
    async with leading() as (leader, worker):
        await worker.send(encode(Hello(11, [])))
        await worker.send(figures(2.0))
        await settled(lambda: leader.workers.serving == 1)
        leader.workers.lost(1, 11)
        await worker.send(figures(3.0))
        await worker.send(encode(Hello(12, [])))
        await settled(lambda: leader.workers.links[0].pid == 12)
        assert leader.workers.serving == 0


async def test_leader_times_that_a_worker_reports_only_move_forward():
    async with leading() as (leader, worker):
        server = leader.supervisor.fleet.servers["127.0.0.1:1"]
        await worker.send(encode(Hello(1, [])))
        for cpu, byte_at, output_at in ((1.0, 70.0, 80.0), (2.0, 65.0, 75.0), (3.0, 71.0, 81.0)):
            heard, outputs = {server.url: byte_at}, {server.url: output_at}
            for times in (heard, outputs):
                times["http://removed.test"] = 99.0
            stats = WorkerStats(True, {CPU: cpu}, {}, heard=heard, outputs=outputs)
            await worker.send(encode(stats))
            await settled(lambda cpu=cpu: leader.supervisor.elsewhere(CPU) == cpu)
            expected = (71.0, 81.0) if cpu == 3.0 else (70.0, 80.0)
            assert (server.last_byte_at, server.activity.output_at) == expected


async def test_leader_started_anew_learns_drained_servers_from_worker():
    async with leading() as (leader, worker):
        servers = leader.supervisor.fleet.servers
        await worker.send(encode(Hello(1, [servers["127.0.0.1:7"].url, "http://removed.test"])))
        await received_until(worker, Welcome(first=False))
        assert [name for name, server in servers.items() if server.draining] == ["127.0.0.1:7"]


async def test_leader_refreshed_lists_reach_worker_before_the_answer(
    monkeypatch: pytest.MonkeyPatch,
):
    async with leading() as (leader, worker):
        server = leader.supervisor.fleet.servers["127.0.0.1:1"]
        server.active_health.up = True

        async def refresh(found: Any) -> None:
            assert not found()  # every list is read, whatever the worker looks for
            server.listed({"new": {"id": "new"}}, trio.current_time())

        monkeypatch.setattr(leader.supervisor, "refresh_model_lists", refresh)
        await worker.send(encode(Hello(1, [])))
        await received_until(worker, Welcome(first=False))
        await worker.send(encode(RefreshModelLists()))
        *before, _ = await received_until(worker, ModelListsRefreshed())
        states = [state for m in before if isinstance(m, ServerStates) for state in m.servers]
        assert [(state.url, state.models) for state in states] == [(server.url, ("new",))]


async def test_leader_undecodable_message_is_dropped(caplog: pytest.LogCaptureFixture):
    async with leading() as (_, worker):
        await worker.send(b"not MessagePack")
        await worker.send(encode(Hello(1, [])))
        await received_until(worker, Welcome(first=False))
    assert "worker 1: dropping an undecodable message" in caplog.text


async def test_leader_new_configuration_is_announced_with_states_of_all_servers():
    async with leading() as (leader, worker):
        await worker.send(encode(Hello(1, [])))
        first = await received_until(worker, Welcome(first=False))
        assert Configured(1) in first
        servers = leader.supervisor.fleet.servers
        for server in servers.values():
            server.active_health.up = True
        old = leader.supervisor.config
        leader.supervisor.apply(old, msgspec.structs.replace(old))
        announced = decode_from_leader((await worker.receive())[0])
        assert announced == Configured(2)
        urls: set[str] = set()
        while len(urls) < len(servers):
            message = decode_from_leader((await worker.receive())[0])
            assert isinstance(message, ServerStates)
            urls |= {state.url for state in message.servers}


async def test_leader_closes_connections_beyond_descriptor_limit():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with leading(most=2) as (leader, worker):
            clients = []
            for _ in range(3):
                client = socket.create_connection(listener.getsockname())
                clients.append(client)
                with listener.accept()[0] as accepted:
                    await worker.send(encode(Connection(b"GET / ")), [accepted.fileno()])
            try:
                clients[2].setblocking(False)
                await trio.lowlevel.wait_readable(clients[2])
                assert clients[2].recv(1) == b""
                clients[0].setblocking(False)
                with pytest.raises(BlockingIOError):
                    clients[0].recv(1)
                assert leader.workers.restarts == 0
            finally:
                for client in clients:
                    client.close()


async def test_leader_shares_stored_responses_with_workers_that_connect():
    entry = (b"0123456789abcdef", "http://127.0.0.1:1", "ann")
    async with leading() as (leader, channel):
        await channel.receive()
        await channel.send(encode(Hello(1, [])))
        await channel.send(encode(StoredResponses([entry])))
        owners = leader.supervisor.proxy.context.owners
        await settled(lambda: list(owners.entries()) == [entry])
        await channel.send(encode(Hello(2, [])))
        while True:
            message = decode_from_leader((await channel.receive())[0])
            if isinstance(message, StoredResponses):
                assert message.entries == [entry]
                return


async def receive_batch(worker: Channel, of: str = "") -> PeerBatch:
    """The next batch; with `of`, the next one of a process whose id begins with it."""
    while True:
        message = decode_from_leader((await worker.receive())[0])
        if isinstance(message, PeerBatch) and message.batch.router.startswith(of):
            return message


def placed(number: int, url: str) -> Batch:
    blocks = [(url, pack_blocks(PROMPT.block_hashes))]
    return Batch("worker-1", number, NOT_SHOWN, placed=blocks)


async def test_leader_passes_prompts_of_one_worker_on_to_the_other():
    async with leading_two() as (leader, first, second):
        for number, worker in enumerate((first, second), 1):
            await worker.send(encode(Hello(number, [])))
        await settled(lambda: all(link.alive for link in leader.workers.links))
        batch = placed(1, "http://127.0.0.1:7")
        await first.send(encode(PeerBatch(batch)))
        # Before it the leader may send the batch as part of what is known.
        assert await receive_batch(second, "worker") == PeerBatch(batch)
        await second.send(encode(PeerBatch(msgspec.structs.replace(batch, router="worker-2"))))
        assert (await receive_batch(first, "worker")).batch.router == "worker-2"  # not its own


async def test_leader_announces_worker_that_starts_all_prompts_and_explains_with_them():
    async with leading_two() as (leader, first, second):
        await first.send(encode(Hello(1, [])))
        await first.send(encode(PeerBatch(placed(1, "http://127.0.0.1:7"))))
        context = leader.supervisor.proxy.context
        await settled(lambda: list(context.policies.blocks(1)))
        await second.send(encode(Hello(2, [])))
        fleet = make_fleet([{"url": f"http://127.0.0.1:{n}"} for n in range(1, 31)])
        policies = PolicySet(Random(1), "adaptive", {}, PolicySettings())
        peers = Peers("worker-2", policies, fleet.by_url)
        peers.hear((await receive_batch(second)).batch, 0.0, sibling=True)
        info = RoutingInfo("m", stream=True, prompt=PROMPT)
        server, _ = policies.default.pick(fleet.candidates("m", 0.0), info, 0.0)
        assert server.url == "http://127.0.0.1:7"
        server, _ = context.policies.default.pick(
            leader.supervisor.fleet.candidates(None, 0.0), info, 0.0
        )
        assert server.url == "http://127.0.0.1:7"


async def test_leader_announces_its_own_prompts_to_workers():
    """The leader serves HTTP/2."""
    async with leading() as (leader, worker):
        await worker.send(encode(Hello(1, [])))
        while decode_from_leader((await worker.receive())[0]) != Welcome(first=False):
            pass
        server = leader.supervisor.fleet.by_url("http://127.0.0.1:3")
        info = RoutingInfo("m", stream=True, prompt=PROMPT)
        lease = server.lease(0.0)
        policy = leader.supervisor.proxy.context.policies.default
        policy.leased(lease, None, info, trio.current_time())
        batch = (await receive_batch(worker)).batch
        assert [url for url, _ in batch.placed] == ["http://127.0.0.1:3"]
        assert batch.servers["http://127.0.0.1:3"].queued > 1000
        policy.ended(lease, trio.current_time(), failed=False)
        lease.release()
        while batch.servers:
            batch = (await receive_batch(worker)).batch


async def test_leader_worker_that_does_not_read_gets_a_bounded_number_of_batches():
    async with leading_two() as (leader, first, second):
        for number, worker in enumerate((first, second), 1):
            await worker.send(encode(Hello(number, [])))
        await settled(lambda: all(link.alive for link in leader.workers.links))
        link = leader.workers.links[1]
        for _ in range(5 * MAX_BATCHES):
            link.tell(bytes(50_000))
            await trio.lowlevel.checkpoint()
        assert len(link._batches) == MAX_BATCHES


async def test_leader_refuses_too_long_queue_before_other_hooks_act():
    """The hooks of the listeners take over certificates and limits at once."""
    async with leading() as (leader, _):
        supervisor, acted = leader.supervisor, []
        supervisor.before_apply.append(acted.append)
        limits = LimitsConfig(max_in_flight=1, queue_size=SLOTS + 1)
        new = msgspec.structs.replace(supervisor.config, limits=limits)
        with pytest.raises(ConfigError, match=f"limits.queue_size: expected at most {SLOTS}"):
            supervisor.apply(supervisor.config, new)
        assert not acted
        assert supervisor.config.limits is None


async def test_leader_drops_message_that_is_none_with_its_descriptor(
    caplog: pytest.LogCaptureFixture,
):
    async with leading() as (leader, worker):
        reading, writing = os.pipe()
        try:
            await worker.send(b"nonsense", [reading])
            os.close(reading)
            await worker.send(encode(Hello(7, [])))
            await settled(lambda: leader.workers.links[0].pid == 7)
            assert "dropping an undecodable message" in caplog.text
            with pytest.raises(BrokenPipeError):
                os.write(writing, b"x")
        finally:
            os.close(writing)
