"""One admission queue for all processes of a router, with real processes and real clients."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml, until
from support.worker_processes import connections, pids

ONE_AT_A_TIME = ("--model", "m", "--max-num-seqs", "1", "--max-num-queued-reqs", "0")
WITH_ONE_WAITING = (*ONE_AT_A_TIME[:-1], "1")
"""For tests whose first client leaves: the engine notices that a moment later than the router."""
KEYS = "".join(
    f'[[auth.keys]]\nname = "{name}"\nkey = "sk-{name}"\n' for name in ("greedy", "modest")
)


SILENT = "has not served its waiting requests"
FALLBACK = '\n[models.m]\nfallback = "spare"\n[models.plain]\nserves = "m"\n'


def config(mocks: list[MockProcess], **limits: Any) -> str:
    """Servers that may be busy for long without being considered down, and `[limits]`."""
    table = {"max_in_flight": 1, "queue_timeout": 60, **limits}
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    servers = servers_toml([mock.url for mock in mocks], health_check_timeout=10)
    return "\n".join([servers, "[limits]", *lines, KEYS])


class Clients:
    """Requests of clients that stay connected until the end.

    HTTP/2 is served by the leader, every other connection by a worker.
    """

    def __init__(self, router: RouterProcess, nursery: trio.Nursery, stack: AsyncExitStack) -> None:
        self.router = router
        self.answers: dict[int, httpx.Response] = {}
        self._nursery = nursery
        self._stack = stack

    async def connect(self, http2: bool) -> httpx.AsyncClient:
        client = httpx.AsyncClient(
            base_url=self.router.url, http1=not http2, http2=http2, trust_env=False, timeout=120
        )
        return await self._stack.enter_async_context(client)

    async def send(
        self, number: int, *, http2: bool = False, key: str = "modest", **more: Any
    ) -> trio.CancelScope:
        """A request on its own connection, once it waits or has a server.

        Its client disconnects when the scope is cancelled.
        """
        before = await self.under_way()
        scope = trio.CancelScope()
        headers = {"authorization": f"Bearer sk-{key}"}
        client = await self.connect(http2)

        async def post() -> None:
            body = chat(seed=number, **{"max_tokens": 1, **more})
            # The connections of a killed worker are lost.
            with scope, suppress(httpx.TransportError):
                self.answers[number] = await client.post(
                    "/v1/chat/completions", json=body, headers=headers
                )

            await client.aclose()

        self._nursery.start_soon(post)
        answered = len(self.answers)  # it, or the request that it displaced
        while await self.under_way() == before and len(self.answers) == answered:
            await trio.sleep(0.01)
        return scope

    async def under_way(self) -> float:
        def look() -> float:
            return self.router.metric("vllm_router_queue_length") + self.router.metric(
                "vllm_router_server_leases"
            )

        return await trio.to_thread.run_sync(look)


@asynccontextmanager
async def clients_of(router: RouterProcess):
    with trio.fail_after(120):
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            yield Clients(router, nursery, stack)
            nursery.cancel_scope.cancel()


async def in_thread(condition: Any, what: str, seconds: float = 60.0) -> None:
    await trio.to_thread.run_sync(until, condition, what, seconds)


def assert_order(router: RouterProcess, order: list[int], expected: list[int]) -> None:
    """One order for all processes.

    `tests/unit/runtime/test_workers_queue.py` holds it exactly; here a request may be three places
    off, or more if a process did not run for 2 s, as the log then says.
    """
    assert sorted(order) == sorted(expected)
    if any(abs(order.index(number) - place) > 3 for place, number in enumerate(expected)):
        router.wait_for_text(SILENT)


def seeds(mock: MockProcess) -> list[int]:
    """The numbers of the requests in the order of their arrival at the server."""
    return [json.loads(entry["body"])["seed"] for entry in mock.log("/v1/chat/completions")]


@pytest.mark.parametrize("workers", [2, 4])
async def test_queue_of_workers_and_http2_has_one_order(tmp_path: Path, workers: int):
    with (
        mock_processes(1, *WITH_ONE_WAITING, "--token-delay", "0.02") as mocks,
        router_process(config(mocks), tmp_path, "--workers", str(workers)) as router,
    ):
        async with clients_of(router) as clients:
            occupier = await clients.send(0, max_tokens=30_000)
            for number in range(1, 13):
                await clients.send(number, http2=number % 3 == 0)
            await clients.send(13, priority=7)
            await clients.send(14, http2=True, priority=-1)
            await clients.send(15, priority=-2)
            counts = await trio.to_thread.run_sync(connections, router)
            assert sum(count > 0 for count in counts.values()) > 1
            occupier.cancel()
            await in_thread(lambda: len(clients.answers) == 15, "all answers")
        statuses = {number: answer.status_code for number, answer in clients.answers.items()}
        assert [number for number in range(1, 16) if statuses[number] != 200] == []
        order = [number for number in seeds(mocks[0]) if number]
        assert_order(router, order, [15, 14, *range(1, 14)])


async def test_queue_serves_clients_of_workers_and_http2_alike(tmp_path: Path):
    """Clients that keep their connections and send the next request after each response."""
    count, rounds = 12, 5
    with (
        mock_processes(1, *ONE_AT_A_TIME, "--ttft", "0.05", "--token-delay", "0") as mocks,
        router_process(config(mocks), tmp_path, "--workers", "2") as router,
    ):
        answers: Counter[int] = Counter()
        codes: Counter[str] = Counter()

        async def keep_asking(number: int, client: httpx.AsyncClient) -> None:
            headers = {"authorization": "Bearer sk-modest"}
            while answers.total() < count * rounds:
                got = await client.post(
                    "/v1/chat/completions", json=chat(max_tokens=1), headers=headers
                )
                codes[got.headers.get("x-vllm-router-error", str(got.status_code))] += 1
                answers[number] += got.status_code == 200

        async with clients_of(router) as clients, trio.open_nursery() as nursery:
            for number in range(count):
                client = await clients.connect(http2=number % 6 == 0)
                nursery.start_soon(keep_asking, number, client)
        # A server may be given away before it has ended the previous request; it says 503 then.
        assert set(codes) <= {"200", "503"}
        if min(answers[number] for number in range(count)) < rounds - 3:
            router.wait_for_text(SILENT)
        assert codes["503"] <= mocks[0].stats()["rejected"] < count


@pytest.mark.parametrize("workers", [1, 2])
async def test_queue_full_gives_every_key_its_share(tmp_path: Path, workers: int):
    with (
        mock_processes(1, *WITH_ONE_WAITING, "--token-delay", "0.02") as mocks,
        router_process(config(mocks, queue_size=6), tmp_path, "--workers", str(workers)) as router,
    ):
        async with clients_of(router) as clients:
            occupier = await clients.send(0, max_tokens=30_000)
            for number in range(1, 7):
                await clients.send(number, key="greedy", http2=number == 6)
            for number in range(11, 14):
                await clients.send(number, key="modest", http2=number == 12)
                await in_thread(lambda n=number: len(clients.answers) == n - 10, "the refusal")
            await clients.send(7, key="greedy")
            await clients.send(14, key="modest")
            occupier.cancel()
            await in_thread(lambda: len(clients.answers) == 11, "all answers")
        codes = {
            number: answer.headers.get("x-vllm-router-error")
            for number, answer in clients.answers.items()
            if answer.status_code == 429
        }
        assert codes == {
            **dict.fromkeys((4, 5, 6), "queue_displaced"),
            **dict.fromkeys((7, 14), "queue_full"),
        }
        assert all(int(clients.answers[number].headers["retry-after"]) >= 1 for number in codes)
        order = [number for number in seeds(mocks[0]) if number]
        assert_order(router, order, [1, 11, 2, 12, 3, 13])


@pytest.mark.parametrize("workers", [1, 2])
async def test_queue_request_without_fallback_holds_up_none_with_one(tmp_path: Path, workers: int):
    """At the head of the queue, when the last server of its model is drained."""
    with (
        mock_processes(1, *WITH_ONE_WAITING, "--token-delay", "0.02") as [only],
        mock_processes(1, "--model", "spare") as [spare],
        router_process(
            config([only, spare]) + FALLBACK, tmp_path, "--workers", str(workers)
        ) as router,
    ):
        server = f"/admin/servers/{only.url.removeprefix('http://')}"
        async with clients_of(router) as clients:
            occupier = await clients.send(0, max_tokens=4000)
            await clients.send(1, model="plain")
            await clients.send(2)
            await clients.send(3, http2=True)
            await trio.to_thread.run_sync(router.administrate, "POST", f"{server}/drain")
            await in_thread(lambda: {2, 3} <= clients.answers.keys(), "the fallback requests")
            assert 1 not in clients.answers
            await trio.to_thread.run_sync(router.administrate, "POST", f"{server}/undrain")
            occupier.cancel()
            await in_thread(lambda: 1 in clients.answers, "the one that does not")
        assert [clients.answers[number].status_code for number in (1, 2, 3)] == [200] * 3
        assert sorted(seeds(spare)) == [2, 3]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_queue_worker_dying_or_hanging_delays_no_other(tmp_path: Path, how: int):
    with (
        mock_processes(1, *WITH_ONE_WAITING, "--token-delay", "0.02") as mocks,
        router_process(config(mocks), tmp_path, "--workers", "2") as router,
    ):
        async with clients_of(router) as clients:
            occupier = await clients.send(0, max_tokens=30_000, http2=True)
            for number in range(1, 9):
                await clients.send(number, http2=number > 6)
            counts = await trio.to_thread.run_sync(connections, router)
            victim = await trio.to_thread.run_sync(lambda: pids(router)["worker 1"])
            os.kill(victim, how)
            try:
                occupier.cancel()
                others = 8 - counts["1"]
                await in_thread(
                    lambda: {7, 8} <= clients.answers.keys() and len(clients.answers) >= others,
                    "the answers of the leader and the other worker",
                )
                assert {answer.status_code for answer in clients.answers.values()} == {200}
            finally:
                with suppress(ProcessLookupError):  # the parent replaces a hung process
                    os.kill(victim, signal.SIGCONT)
            idle = "vllm_router_requests_in_flight"
            await in_thread(lambda: router.metric(idle) == 0, "an idle router")


def test_queue_larger_than_shared_memory_is_refused(tmp_path: Path):
    with mock_processes(1, "--model", "m") as mocks:
        file = tmp_path / "servers.toml"
        file.write_text(config(mocks, queue_size=20_000))
        router = RouterProcess(file, "--workers", "2")
        try:
            assert router.process.wait(30) == 2
            router.wait_for_text(
                "limits.queue_size: expected at most 16384 with --workers, got 20000"
            )
        finally:
            router.close()
