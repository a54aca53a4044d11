"""One waiting order for several processes, which share servers, leases and a queue board.

The processes are proxies of one program here, in virtual time; a wake-up for another process runs
as its next task.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from support.fleet_makers import come_up, go_down, make_config
from support.proxy_harness import Client, Recorder, Rig
from support.scripted_server import MemoryPool, ScriptedServer
from unit.proxy.test_exchange_full_queue import FALLBACK, client_of
from unit.proxy.test_exchange_queue import PRIORITY, body, order, working
from vllm_router.proxy.admission import AdmissionQueue
from vllm_router.proxy.batched_recorder import BatchedRecorder
from vllm_router.proxy.handler import Proxy
from vllm_router.runtime.workers.fleet import LeadingFleet
from vllm_router.runtime.workers.queue_board import QueueBoard
from vllm_router.runtime.workers.queue_peers import PATIENCE, SILENCE, QueuePeers
from vllm_router.runtime.workers.queue_wakeup import POLL_WHILE_WAITING
from vllm_router.runtime.workers.shared_counters import CounterView, SharedCounters


class Process(Rig):
    """One process of the router."""

    def __init__(self, group: ProcessGroup, number: int) -> None:
        self.number = number
        self.group = group
        self.watched = False
        self.nursery = group.nursery
        self.config = group.config
        self.fleet = LeadingFleet(
            group.config,
            CounterView(SharedCounters(group.leases, group.count), number),
            lambda server: None,
        )
        self.recorder = Recorder()
        self.rng = Random(number)
        self.stopped = False
        self.proxy = Proxy(
            self.fleet,
            group.config,
            BatchedRecorder((self.recorder,)),
            self.rng,
            make_peers=self._peers,
        )
        self.proxy.context.recorder.interval = 0.0
        self.scripted = group.scripted
        for server in self.servers:
            self.proxy.context.upstreams[server].pool = MemoryPool(group.scripted[server.name])

    def _peers(self, admission: AdmissionQueue) -> QueuePeers:
        return QueuePeers(
            admission, QueueBoard(self.group.queue, self.group.count), self.number, self.notify
        )

    def notify(self, number: int) -> None:
        self.nursery.start_soon(self.group.processes[number].woken)

    async def woken(self) -> None:
        admission = self.proxy.context.admission
        if admission is not None and not self.stopped:
            self.fleet.refresh_leases()
            admission.follow_peers(trio.current_time())

    async def tick(self) -> None:
        while True:
            await trio.sleep(POLL_WHILE_WAITING)
            await self.woken()

    @property
    def waiters(self) -> int:
        admission = self.proxy.context.admission
        return 0 if admission is None else admission._waiters


class ProcessGroup:
    """Several processes in front of the same scripted servers."""

    def __init__(self, nursery: trio.Nursery, count: int, scripts: Any, **options: Any) -> None:
        self.nursery = nursery
        self.count = count
        self.leases, self.queue = SharedCounters.create(count), QueueBoard.create(count)
        limits = {"max_in_flight": 1, **options.pop("limits", {})}
        self.config = make_config(len(scripts), policy="least_load", limits=limits, **options)
        names = [server.name for server in self.config.servers]
        self.scripted = {
            name: ScriptedServer(nursery, script)
            for name, script in zip(names, scripts, strict=True)
        }
        self.processes: list[Process] = []
        for number in range(count):
            self.processes.append(Process(self, number))
        self.each(lambda process: [come_up(one, 0.0) for one in process.servers])

    def __getitem__(self, number: int) -> Process:
        return self.processes[number]

    def each(self, action: Any) -> None:
        for process in self.processes:
            action(process)
            process.fleet.settle(trio.current_time())

    async def start(self, process: int, number: int, key: str = "", **more: Any) -> Client:
        """A request that has advanced as far as it can for now."""
        rig = self.processes[process]
        options = {"headers": more.pop("headers")} if "headers" in more else {}
        if key:
            client = client_of(rig, key, number, **more)
        else:
            client = rig.client(body(number, **more), **options)
        self.nursery.start_soon(client.run)
        await wait_all_tasks_blocked()
        return client


@contextlib.asynccontextmanager
async def group(count: int, *scripts: Any, **options: Any) -> AsyncIterator[ProcessGroup]:
    async with trio.open_nursery() as nursery:
        made = ProcessGroup(nursery, count, scripts, **options)
        try:
            for process in made.processes:
                nursery.start_soon(process.tick)
            yield made
            await trio.sleep(2 * POLL_WHILE_WAITING)
            for process in made.processes:
                assert not process.proxy.context.exchanges
                assert len(process.proxy.context.admission.queue) == 0  # type: ignore[union-attr]
                for server in process.servers:
                    process.fleet.refresh_leases()
                    assert server.in_flight == 0
                process.proxy.close()
        finally:
            os.close(made.leases)
            os.close(made.queue)
            nursery.cancel_scope.cancel()


# -- one order --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5])
async def test_workers_queue_is_first_come_first_served_across_processes(autojump_clock, count):
    async with group(count, working(0.2)) as router:
        clients = [await router.start(n % count, n) for n in range(20)]
        await trio.sleep(5)
        assert order(*clients) == list(range(20))


async def test_workers_queue_newcomer_does_not_overtake_other_process(autojump_clock):
    async with group(2, working(0.2)) as router:
        first = await router.start(0, 0)
        waits = [await router.start(0, n) for n in (1, 2)]
        await trio.sleep(0.18)
        late = [await router.start(1, n) for n in (3, 4, 5)]
        await trio.sleep(2)
        assert order(first, *waits, *late) == [0, 1, 2, 3, 4, 5]


async def test_workers_queue_server_freed_within_a_pass_goes_to_first_waiter(autojump_clock):
    """Process 0 releases it while process 2 has passed over an earlier request, but not its own."""
    async with group(3, working()) as router:
        [server, *_] = router[0].servers
        lease = server.lease(trio.current_time())
        clients = [await router.start(n, n) for n in (1, 2)]
        admission = router[2].proxy.context.admission
        assert admission is not None
        peers = admission._peers
        assert isinstance(peers, QueuePeers)
        reserve = peers.reserve

        def reserve_and_release(place: Any, now: float) -> Any:
            verdict = reserve(place, now)
            if lease in server.leases:
                lease.release()
            return verdict

        peers.reserve = reserve_and_release  # type: ignore[method-assign]
        await trio.sleep(3)
        assert order(*clients) == [1, 2]


async def test_workers_queue_release_seen_before_its_note_goes_to_first_waiter(autojump_clock):
    """Process 2 looks between the two writes of process 0."""
    async with group(3, working()) as router:
        [server, *_] = router[0].servers
        lease = server.lease(trio.current_time())
        clients = [await router.start(n, n) for n in (1, 2)]
        await trio.sleep(1)  # process 1 has found the server taken many times
        admission = router[2].proxy.context.admission
        assert admission is not None
        counters = router[0].fleet.counters
        put = counters.put

        def put_and_look(column: int, count: int) -> None:
            put(column, count)
            admission.follow_peers(trio.current_time())

        counters.put = put_and_look  # type: ignore[method-assign]
        lease.release()
        counters.put = put  # type: ignore[method-assign]
        await trio.sleep(3)
        assert order(*clients) == [1, 2]


async def test_workers_queue_priorities_hold_across_processes(autojump_clock):
    async with group(3, working(0.2)) as router:
        clients = [await router.start(n, n) for n in range(3)]
        clients.append(await router.start(1, 3, priority=5))
        clients.append(await router.start(2, 4, headers=(PRIORITY,)))
        clients.append(await router.start(0, 5, priority=-7))
        await trio.sleep(2)
        assert order(*clients) == [0, 5, 4, 1, 2, 3]


async def test_workers_queue_keys_take_turns_across_processes(autojump_clock):
    async with group(2, working(0.2)) as router:
        clients = [await router.start(0, 0)]
        clients += [await router.start(n % 2, n, "greedy") for n in range(1, 7)]
        clients += [await router.start(0, 7, "modest"), await router.start(1, 8, "modest")]
        await trio.sleep(3)
        assert order(*clients) == [0, 1, 7, 2, 8, 3, 4, 5, 6]


async def test_workers_queue_cap_holds_across_processes(autojump_clock):
    most = [0]
    async with group(4, working(0.1, most), limits={"max_in_flight": 3}) as router:
        clients = [await router.start(n % 4, n) for n in range(40)]
        await trio.sleep(4)
        assert len(order(*clients)) == 40
        assert most == [3]


async def test_workers_queue_servers_freed_at_once_go_to_first_waiters(autojump_clock):
    async with group(4, working(), limits={"max_in_flight": 8}) as router:
        router.each(lambda process: go_down(process.servers[0], trio.current_time()))
        clients = [await router.start(n % 4, n) for n in range(16)]
        await trio.sleep(1)
        for process in router.processes:
            come_up(process.servers[0], trio.current_time())
        for process in router.processes:
            process.fleet.settle(trio.current_time())
        await trio.sleep(0.9)
        assert {process.waiters for process in router.processes} == {2}
        await trio.sleep(3)
        assert sorted(order(*clients)[:8]) == list(range(8))


# -- one queue --------------------------------------------------------------------------------


async def test_workers_queue_limit_covers_all_processes(autojump_clock):
    async with group(3, working(0.2), limits={"queue_size": 4}) as router:
        clients = [await router.start(n % 3, n) for n in range(5)]
        for process in range(3):
            refused = await router.start(process, 9)
            assert (refused.got.status, refused.got.code) == (429, "queue_full")
            assert "4 requests wait already" in refused.got.json["error"]["message"]
        await trio.sleep(2)
        assert order(*clients) == list(range(5))


async def test_workers_queue_full_displaces_greediest_key_of_any_process(autojump_clock):
    async with group(2, working(0.2), limits={"queue_size": 4}) as router:
        greedy = [await router.start(n % 2, n, "greedy") for n in range(5)]
        modest = [await router.start(1, 10, "modest"), await router.start(0, 11, "modest")]
        assert [client.got.code for client in greedy if client.done] == ["queue_displaced"] * 2
        assert not greedy[2].done
        await trio.sleep(2)
        assert order(*greedy, *modest) == [0, 1, 10, 2, 11]


async def test_workers_queue_prediction_uses_rate_and_queue_of_all(autojump_clock):
    limits = {"queue_timeout": 20, "queue_size": 100, "max_in_flight": 2}
    async with group(4, working(1.0), limits=limits) as router:
        clients = [await router.start(n % 4, n) for n in range(36)]
        await trio.sleep(6.5)
        assert not any(client.done and client.got.status != 200 for client in clients)
        headers = ((b"x-request-timeout", b"6"),)
        hopeless = await router.start(1, 99, headers=headers)
        assert (hopeless.got.status, hopeless.got.code) == (503, "queue_too_long")
        await trio.sleep(13)
        assert len(order(*clients)) == 36


# -- no request is delayed --------------------------------------------------------------------


async def test_workers_queue_request_without_fallback_delays_no_process(autojump_clock):
    async with group(2, working(), working(), tables=FALLBACK) as router:
        for process in router.processes:
            come_up(process.server("b"), 0.0, "spare")
            process.fleet.settle(0.0)
        busy = [await router.start(0, 0), await router.start(1, 1, model="spare")]
        stuck = await router.start(0, 2, model="plain", headers=(PRIORITY,))
        can = [await router.start(1, 3), await router.start(0, 4)]
        router.each(lambda process: process.server("a").drain(on=True))
        await trio.sleep(5)
        assert [client.got.status for client in can] == [200, 200]
        assert not stuck.done
        router.each(lambda process: process.server("a").drain(on=False))
        await trio.sleep(5)
        assert [client.got.status for client in (*busy, stuck)] == [200] * 3


async def test_workers_queue_request_of_other_model_is_not_delayed(autojump_clock):
    async with group(2, working(50), working(1)) as router:
        for process in router.processes:
            come_up(process.server("a"), 0.0, "slow")
            come_up(process.server("b"), 0.0, "fast")
            process.fleet.settle(0.0)
        slow = [await router.start(0, n, model="slow") for n in range(3)]
        fast = [await router.start(1, n, model="fast") for n in range(3)]
        await trio.sleep(3.1)
        assert order(*fast) == [0, 1, 2]
        for client in slow:
            client.leave()


async def test_workers_queue_hanging_process_delays_others_briefly(autojump_clock, caplog):
    async with group(2, working(0.1)) as router:
        first = await router.start(0, 0)
        hung = await router.start(1, 1)
        router[1].stopped = True
        waits = [await router.start(0, n) for n in range(2, 12)]
        await trio.sleep(0.1 + SILENCE + 10 * (0.1 + 2 * POLL_WHILE_WAITING))
        assert order(first, *waits) == [0, *range(2, 12)]
        assert not hung.done
        assert caplog.text.count("worker 1 has not served its waiting requests for 2 s") == 1
        router[1].stopped = False
        await trio.sleep(1)
        assert hung.got.status == 200


@pytest.mark.parametrize("slow", [0.5, 0.9 * SILENCE])
async def test_workers_queue_slow_process_keeps_its_turns(autojump_clock, slow):
    """Each pass of process 1 comes late, and one server after the other is its turn."""
    async with group(3, working(0.1)) as router:
        clients = [await router.start(0, 0)]
        clients += [await router.start(n % 3, n, "ab"[n % 2]) for n in range(1, 10)]
        for _ in range(12):
            router[1].stopped = True
            await trio.sleep(slow)
            router[1].stopped = False
            await trio.sleep(2 * POLL_WHILE_WAITING)
        assert order(*clients) == list(range(10))


async def test_workers_queue_process_that_cannot_use_server_passes_its_turn_on(autojump_clock):
    """Process 1 has not heard yet that the server has come up."""
    async with group(2, working(0.1)) as router:
        router.each(lambda process: go_down(process.servers[0], trio.current_time()))
        waits = [await router.start(1, 0), await router.start(0, 1)]
        come_up(router[0].servers[0], trio.current_time())
        router[0].fleet.settle(trio.current_time())
        await trio.sleep(0.1 + PATIENCE / 2)
        assert order(*waits) == [1]
        come_up(router[1].servers[0], trio.current_time())
        router[1].fleet.settle(trio.current_time())
        await trio.sleep(1)
        assert order(*waits) == [1, 0]


async def test_workers_queue_process_that_leaves_a_free_server_loses_its_turn(autojump_clock):
    """Process 1 makes passes, which do not give the server to its request."""
    async with group(2, working(0.1)) as router:
        clients = [await router.start(n, n) for n in (0, 1)]
        clients.append(await router.start(0, 2))
        router[1].stopped = True
        board = QueueBoard(router.queue, 2)
        for _ in range(int((0.2 + 2 * PATIENCE) / POLL_WHILE_WAITING)):
            await trio.sleep(POLL_WHILE_WAITING)
            board.pages[1].beat(int(trio.current_time() * 1e6))
        assert order(*clients) == [0, 2]
        router[1].stopped = False
        await trio.sleep(1)
        assert order(*clients) == [0, 2, 1]


async def test_workers_queue_standstill_of_machine_costs_no_turn(autojump_clock):
    async with group(2, working(0.1)) as router:
        clients = [await router.start(n % 2, n) for n in (0, 1, 2)]
        for process in router.processes:
            process.stopped = True
        await trio.sleep(10 * SILENCE)
        router[0].stopped = False
        await trio.sleep(3 * POLL_WHILE_WAITING)
        assert order(*clients) == [0]
        router[1].stopped = False
        await trio.sleep(1)
        assert order(*clients) == [0, 1, 2]


async def test_workers_queue_requests_of_dead_process_are_forgotten(autojump_clock):
    async with group(2, working(), limits={"queue_size": 3}) as router:
        first = await router.start(1, 0)
        lost = [await router.start(0, n) for n in (1, 2, 3)]
        router[0].stopped = True
        for client in lost:  # its clients see their connections close
            client.leave()
        QueueBoard(router.queue, 2).pages[0].reset()
        await trio.sleep(0.1)
        waits = [await router.start(1, n) for n in (4, 5, 6)]
        await trio.sleep(5)
        assert order(first, *waits) == [0, 4, 5, 6]
        router[0].stopped = False


async def test_workers_queue_late_process_finds_waiters(autojump_clock):
    async with group(2, working()) as router:
        clients = [await router.start(0, n) for n in range(4)]
        router[1].stopped = True
        router.processes[1] = Process(router, 1)
        come_up(router[1].servers[0], 0.0)
        late = await router.start(1, 4)
        router.nursery.start_soon(router[1].tick)
        await trio.sleep(6)
        assert order(*clients, late) == [0, 1, 2, 3, 4]


async def test_workers_queue_disconnect_lets_next_of_other_process_go(autojump_clock):
    async with group(2, working(0.2)) as router:
        clients = [await router.start(n % 2, n) for n in range(5)]
        clients[2].leave()
        await wait_all_tasks_blocked()
        await trio.sleep(2)
        assert order(*clients) == [0, 1, 3, 4]


async def test_workers_queue_limits_removed_and_readded_start_anew(autojump_clock):
    async with group(2, working(2)) as router:
        clients = [await router.start(n % 2, n) for n in range(4)]
        without = make_config(1, policy="least_load")
        for process in router.processes:
            process.fleet.apply(without)
            process.proxy.apply(without)
        for process in router.processes:
            process.fleet.apply(router.config)
            process.proxy.apply(router.config)
        late = [await router.start(n % 2, n) for n in range(4, 8)]
        await trio.sleep(12)
        assert [client.got.status for client in clients] == [200] * 4
        assert order(*late) == [4, 5, 6, 7]


# -- any sequence of events -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_workers_queue_any_events_keep_order_caps_and_requests(autojump_clock, seed):
    """Any order of events keeps the order of service, the caps and every request.

    Requests arrive in all processes and disconnect, servers go down and come back, caps change.
    """
    rng = Random(seed)
    most = [0]
    async with group(
        3, working(0.7, most), working(0.4, most), limits={"queue_size": 200}
    ) as router:
        clients: list[Client] = []
        left: set[int] = set()
        for number in range(60):
            clients.append(
                await router.start(
                    rng.randrange(3),
                    number,
                    rng.choice(["a", "a", "b"]),
                    priority=rng.choice([0, 1]),
                )
            )
            await trio.sleep(rng.choice([0.0, 0.01, 0.2]))
            what = rng.random()
            if what < 0.1:
                one = rng.randrange(len(clients))
                if not clients[one].done:
                    clients[one].leave()
                    left.add(one)
            elif what < 0.2:
                name, on = rng.choice("ab"), rng.random() < 0.5
                router.each(lambda process, name=name, on=on: process.server(name).drain(on=on))
            elif what < 0.25:
                cap = rng.choice([1, 2])
                config = make_config(2, policy="least_load", limits={"max_in_flight": cap})
                for process in router.processes:
                    process.fleet.apply(config)
                    process.proxy.apply(config)
        router.each(lambda process: [one.drain(on=False) for one in process.servers])
        for _ in range(60):
            if not all(client.done for client in clients):
                await trio.sleep(1)
        missing = [n for n, client in enumerate(clients) if n not in left and not client.got.whole]
        assert missing == []
        codes = {client.got.status for n, client in enumerate(clients) if n not in left}
        assert codes == {200}
        assert most[0] <= 4  # two servers, which take two each at most
