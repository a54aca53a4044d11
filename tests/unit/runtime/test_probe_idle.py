"""Probes of a large fleet in virtual time: idle servers are asked seldom, others as usual."""

from __future__ import annotations

import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random

import httpx
import pytest
import trio

from support.fleet_makers import make_config
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.probe_pace import SETTLES_IN, ProbePace
from vllm_router.fleet.state import State
from vllm_router.runtime import probe_client
from vllm_router.runtime.probe import Probe

PAGE = 'vllm:num_requests_running{engine="0"} %d\nvllm:num_requests_waiting{engine="0"} 0\n'
COUNT, RATE = 16, 2
PAGES = ("/metrics", "/health", "/v1/models")
STRETCHED = COUNT / RATE
"""Seconds between two questions to an idle server: eight."""


class Rig:
    """A fleet whose servers answer from memory; `running` and `dead` may be changed."""

    def __init__(self, rate: int, **settings: object) -> None:
        described = [{"url": f"http://s{n}.test:1", "name": f"s{n}"} for n in range(COUNT)]
        self.fleet = Fleet(make_config(described, idle_probes_per_second=rate, **settings))
        self.servers = list(self.fleet.servers.values())
        self.asked: Counter[tuple[str, str]] = Counter()
        self.running: dict[str, int] = {}
        self.dead: set[str] = set()

    def transport(self, url: str, *_: object) -> httpx.MockTransport:
        async def handle(request: httpx.Request) -> httpx.Response:
            name, path = request.url.host.removesuffix(".test"), request.url.path
            self.asked[name, path] += 1
            if name in self.dead:
                raise httpx.ConnectError("refused")
            if path == "/v1/models":
                return httpx.Response(200, json={"data": [{"id": "m"}]})
            page = PAGE % self.running.get(name, 0) if path == "/metrics" else ""
            return httpx.Response(200, text=page)

        return httpx.MockTransport(handle)

    async def counted(self, seconds: float) -> Counter[tuple[str, str]]:
        """The requests in the next `seconds`, by server and path."""
        self.asked.clear()
        await trio.sleep(seconds)
        return self.asked.copy()

    async def until(self, condition: Callable[[], object]) -> float:
        """Wait for a condition; returns the seconds that it took."""
        began = trio.current_time()
        while not condition():
            await trio.sleep(0.01)
        return trio.current_time() - began


@asynccontextmanager
async def settled_fleet(
    monkeypatch: pytest.MonkeyPatch, rate: int = RATE, **settings: object
) -> AsyncIterator[Rig]:
    """All servers have been up for some intervals."""
    rig, pace = Rig(rate, **settings), ProbePace()
    monkeypatch.setattr(probe_client, "control_transport", rig.transport)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def ignore(*_: object) -> None:
        pass

    async with trio.open_nursery() as nursery:
        for number, server in enumerate(rig.servers):
            probe = Probe(server, rig.fleet, Random(number), tls, ignore, ignore, pace=pace)
            nursery.start_soon(probe.run)
        await trio.sleep(2 * STRETCHED)
        yield rig
        nursery.cancel_scope.cancel()


def total(asked: Counter[tuple[str, str]], path: str) -> int:
    return sum(count for (_, asked_path), count in asked.items() if asked_path == path)


@pytest.mark.parametrize(
    ("rate", "seconds", "times"),
    [(2, 100, (200, 200, 200)), (5, 100, (500, 500, 320)), (1000, 30, (960, 240, 96))],
    ids=["all pages at once", "each page", "as usual"],
)
async def test_probe_idle_servers_share_the_rate(autojump_clock, monkeypatch, rate, seconds, times):
    async with settled_fleet(monkeypatch, rate) as rig:
        asked = await rig.counted(seconds)
        for path, count in zip(PAGES, times, strict=True):
            assert total(asked, path) == pytest.approx(count, rel=0.1)
        assert all(server.load_estimate.fresh for server in rig.servers)
        assert all(server.state is State.UP for server in rig.servers)


async def test_probe_server_with_a_request_is_asked_as_usual(autojump_clock, monkeypatch):
    async with settled_fleet(monkeypatch) as rig:
        rig.asked.clear()
        lease = rig.servers[3].lease(trio.current_time())
        assert await rig.until(lambda: rig.asked["s3", "/health"]) < 0.5 + STRETCHED / COUNT * 2
        assert rig.asked["s3", "/metrics"] == 1
        asked = await rig.counted(20)
        assert asked["s3", "/metrics"] == pytest.approx(40, abs=3)
        assert asked["s3", "/health"] == pytest.approx(10, abs=2)
        lease.release()
        asked = await rig.counted(100)
        assert asked["s3", "/metrics"] == pytest.approx(100 / STRETCHED, abs=4)


async def test_probe_server_with_short_requests_stays_idle(autojump_clock, monkeypatch):
    async with settled_fleet(monkeypatch) as rig:
        rig.asked.clear()
        for _ in range(1000):
            lease = rig.servers[3].lease(trio.current_time())
            await trio.sleep(0.001)
            lease.release()
            await trio.sleep(0.099)
        assert rig.asked["s3", "/metrics"] <= 100 / STRETCHED * 1.4


async def test_probe_server_with_others_requests_is_asked_as_usual(autojump_clock, monkeypatch):
    async with settled_fleet(monkeypatch) as rig:
        rig.running["s5"] = 3
        assert await rig.until(lambda: rig.servers[5].running == 3) < 1.3 * STRETCHED
        asked = await rig.counted(20)
        assert asked["s5", "/metrics"] == pytest.approx(40, abs=3)
        assert asked["s5", "/health"] == pytest.approx(10, abs=2)


@pytest.mark.parametrize("number", [7, 8, 9])
async def test_probe_dead_idle_server_is_found_and_comes_back(autojump_clock, monkeypatch, number):
    """One failed question is followed by others as usual, whichever page it was for."""
    async with settled_fleet(monkeypatch) as rig:
        server = rig.servers[number]
        rig.dead.add(f"s{number}")
        took = await rig.until(lambda: server.state is State.DOWN)
        assert took < 1.3 * STRETCHED + 3 * 0.5
        asked = await rig.counted(20)
        assert asked[f"s{number}", "/metrics"] == pytest.approx(40, abs=3)
        rig.dead.clear()
        assert await rig.until(lambda: server.state is State.UP) < 2


async def test_probe_idle_servers_are_asked_in_turn_after_a_standstill(autojump_clock, monkeypatch):
    """The process was stopped for a minute: all probes are due, and are spread over an interval."""
    async with settled_fleet(monkeypatch) as rig:
        rig.asked.clear()
        autojump_clock.jump(60)
        lease = rig.servers[3].lease(trio.current_time())
        asked = await rig.counted(2)
        assert asked["s3", "/metrics"] >= 1  # it has a request
        assert len({name for name, _ in asked}) <= COUNT / 2
        lease.release()
        asked = await rig.counted(2 * STRETCHED)
        assert {name for name, _ in asked} == {server.name for server in rig.servers}
        assert all(server.state is State.UP for server in rig.servers)


async def test_probe_dead_chosen_server_is_found_as_usual(autojump_clock, monkeypatch):
    async with settled_fleet(monkeypatch) as rig:
        server = rig.servers[7]
        rig.dead.add("s7")
        lease = server.lease(trio.current_time())
        assert await rig.until(lambda: server.state is State.DOWN) < 2
        lease.release()


async def test_probe_server_down_for_long_is_asked_seldom(autojump_clock, monkeypatch):
    async with settled_fleet(monkeypatch) as rig:
        server = rig.servers[7]
        rig.dead.add("s7")
        await rig.until(lambda: server.state is State.DOWN)
        await trio.sleep(SETTLES_IN + 2 * STRETCHED)
        asked = await rig.counted(100)
        assert asked["s7", "/metrics"] <= 100 / STRETCHED * 1.4
        assert server.state is State.DOWN
        rig.dead.clear()
        assert await rig.until(lambda: server.state is State.UP) < 1.3 * STRETCHED + 3


async def test_probe_busy_servers_share_the_rate_of_a_few(autojump_clock, monkeypatch):
    async with settled_fleet(monkeypatch, busy_servers_at_full_rate=4) as rig:
        leases = [server.lease(trio.current_time()) for server in rig.servers]
        rig.running.update({server.name: 1 for server in rig.servers})
        await trio.sleep(STRETCHED)
        asked = await rig.counted(100)
        assert total(asked, "/metrics") == pytest.approx(100 * 4 * 2, rel=0.1)
        assert total(asked, "/health") == pytest.approx(100 * 4 / 2, rel=0.1)
        assert min(asked[server.name, "/metrics"] for server in rig.servers) >= 40
        assert all(server.load_estimate.fresh for server in rig.servers)
        rig.running["s5"] = 9  # other routers' requests, too
        asked = await rig.counted(60)
        assert asked["s5", "/metrics"] == pytest.approx(120, abs=15)
        for lease in leases:
            lease.release()


async def test_probe_dead_busy_server_among_many_is_found(autojump_clock, monkeypatch):
    """One failed scrape is followed by others as usual."""
    async with settled_fleet(monkeypatch, busy_servers_at_full_rate=4) as rig:
        leases = [server.lease(trio.current_time()) for server in rig.servers]
        await trio.sleep(STRETCHED)
        rig.dead.add("s7")
        server = rig.servers[7]
        assert await rig.until(lambda: server.state is State.DOWN) < 1.3 * 2 + 3 * 0.5
        for lease in leases:
            lease.release()
