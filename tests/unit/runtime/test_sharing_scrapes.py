"""Several routers before the same servers, in virtual time: each server is scraped by one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from random import Random

import httpx
import pytest
import trio
from trio.testing import MockClock

from support.fleet_makers import make_config
from support.shared_bus import Bus
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State
from vllm_router.routing.sharing.messages import About, Batch, Figures, encode
from vllm_router.routing.sharing.scrapes import LATER, STALE_INTERVALS
from vllm_router.runtime import probe as probe_module
from vllm_router.runtime import probe_client
from vllm_router.runtime.sharing.router_share import share_alone
from vllm_router.runtime.sharing.task import PERIOD
from vllm_router.runtime.supervisor import Supervisor

SERVERS = 3
INTERVAL = 0.5
USUAL = SERVERS / INTERVAL
"""Scrapes per second of one router."""

ROUTER_NOW: ContextVar[str] = ContextVar("ROUTER_NOW", default="")
"""The router whose task runs."""

PAGE = (
    'vllm:num_requests_running{engine="0"} %d\nvllm:num_requests_waiting{engine="0"} 1\n'
    'vllm:kv_cache_usage_perc{engine="0"} 0.5\nvllm:prompt_tokens_total{engine="0"} %d\n'
    'vllm:engine_sleep_state{engine="0",sleep_state="awake"} %d\n'
)


class Body(httpx.AsyncByteStream):
    """A body in one piece. Unlike httpx's own, it may be left unread when the test ends."""

    def __init__(self, text: str) -> None:
        self._pieces = [text.encode()]

    def __aiter__(self) -> Body:
        return self

    async def __anext__(self) -> bytes:
        if not self._pieces:
            raise StopAsyncIteration
        return self._pieces.pop()


def answer(text: str) -> httpx.Response:
    return httpx.Response(200, stream=Body(text))


class Engines:
    """All servers of the fleet. `running` and the others may be changed by the host's name."""

    def __init__(self) -> None:
        self.scrapes: Counter[tuple[str, str]] = Counter()
        """By router and server."""
        self.asked: Counter[tuple[str, str, str]] = Counter()
        """By router, server and page."""
        self.silent: set[str] = set()
        """Routers that do nothing any more."""
        self.running: Counter[str] = Counter()
        self.started_at: dict[str, float] = {}
        self.asleep: set[str] = set()
        self.unreachable: set[tuple[str, str]] = set()
        """Routers and the servers that they cannot reach."""
        self.adapters: list[str] = []

    def transport(self, *_: object) -> httpx.MockTransport:
        router = ROUTER_NOW.get()

        async def handle(request: httpx.Request) -> httpx.Response:
            name, path = request.url.host.removesuffix(".test"), request.url.path
            if router in self.silent:
                await trio.sleep_forever()
            self.asked[router, name, path] += 1
            if (router, name) in self.unreachable:
                raise httpx.ConnectError("refused")
            if path == "/v1/models":
                return answer(json.dumps({"data": [{"id": m} for m in ("m", *self.adapters)]}))
            if path != "/metrics":
                return answer("")
            self.scrapes[router, name] += 1
            tokens = 1000 * (trio.current_time() - self.started_at.get(name, -100.0))
            page = PAGE % (self.running[name], tokens, name not in self.asleep)
            return answer(page)

        return httpx.MockTransport(handle)

    def of(self, router: str) -> int:
        return sum(n for (by, _), n in self.scrapes.items() if by == router)

    def total(self, server: str | None = None) -> int:
        return sum(n for (_, name), n in self.scrapes.items() if server in (None, name))


class Router:
    """A router with its probes and its shared state."""

    def __init__(self, bus: Bus, name: str, servers: object = SERVERS, **settings: object) -> None:
        tables = f'[shared]\nurl = "redis://store"\nname = "{name}"\n'
        settings = {"metrics_interval": INTERVAL, **settings}
        self.name = name
        self.supervisor = Supervisor(
            make_config(servers, tables=tables, **settings), None, Random(1)
        )
        self.scrapes = self.supervisor.scrapes
        self.shared = share_alone(
            self.supervisor, self.supervisor.probes.check_soon, self.scrapes, bus.open
        )
        self.sharing = trio.CancelScope()

    async def run(self) -> None:
        ROUTER_NOW.set(self.name)
        self.shared.use(self.supervisor.config.shared)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._share)
            for server in self.supervisor.fleet.servers.values():
                self.supervisor.probes.start(server)
            await self.supervisor.probes.run()

    async def _share(self) -> None:
        with self.sharing:
            await self.shared.run()

    def server(self, name: str) -> Server:
        return self.supervisor.fleet.servers[name]

    @property
    def fresh(self) -> bool:
        """Whether it has usable figures of all servers."""
        servers = self.supervisor.fleet.servers.values()
        return all(server.load_estimate.fresh for server in servers)

    def ages(self) -> list[float]:
        """Of the figures of all servers, in seconds."""
        now = trio.current_time()
        return [one.load_estimate.age(now) for one in self.supervisor.fleet.servers.values()]


class Fleet:
    def __init__(self, bus: Bus, engines: Engines, nursery: trio.Nursery) -> None:
        self.bus, self.engines, self.nursery = bus, engines, nursery
        self.routers: list[Router] = []

    def add(self, *args: object, **settings: object) -> Router:
        router = Router(self.bus, f"gw-{len(self.routers)}", *args, **settings)
        self.routers.append(router)
        self.nursery.start_soon(router.run)
        return router

    async def rate(self, seconds: float = 5.0) -> float:
        """Scrapes per second in the next `seconds`."""
        self.engines.scrapes.clear()
        await trio.sleep(seconds)
        return self.engines.total() / seconds


@asynccontextmanager
async def fleet(monkeypatch: pytest.MonkeyPatch, count: int = 3) -> AsyncIterator[Fleet]:
    """Routers that have heard of each other."""
    engines = Engines()
    monkeypatch.setattr(probe_client, "control_transport", engines.transport)
    async with trio.open_nursery() as nursery:
        made = Fleet(Bus(), engines, nursery)
        for _ in range(count):
            made.add()
        await trio.sleep(5)
        yield made
        nursery.cancel_scope.cancel()


def scraper_of(engines: Engines, server: str) -> str:
    """The router that has scraped the server most."""
    return max(((n, by) for (by, name), n in engines.scrapes.items() if name == server))[1]


@pytest.mark.parametrize("count", [1, 3, 6])
async def test_scrapes_of_many_routers_cost_as_much_as_one(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, count: int
):
    async with fleet(monkeypatch, count) as all_of_them:
        rate = await all_of_them.rate()
        assert rate == pytest.approx(USUAL, rel=0.1)
        engines = all_of_them.engines
        for number in range(SERVERS):
            name = "abc"[number]
            assert len([1 for _, scraped in engines.scrapes if scraped == name]) == 1
        for router in all_of_them.routers:
            assert max(router.ages()) < 1.2
            status = router.shared.status()
            assert status is not None
            scraped = {name for by, name in engines.scrapes if by == router.name}
            assert status.spared == SERVERS - len(scraped)


async def test_scrapes_figures_of_another_router_are_used_like_own_ones(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    async with fleet(monkeypatch) as all_of_them:
        all_of_them.engines.running["a"] = 7
        await trio.sleep(1.5)
        for router in all_of_them.routers:
            load = router.server("a").load_estimate
            assert (load.running, load.waiting, load.fresh) == (7.0, 1.0, True)
            assert load.metrics is not None
            assert load.metrics.kv_usage == 0.5
            assert router.server("a").state is State.UP
            assert router.server("a").restarts == 0


async def test_scrapes_figures_are_corrected_by_own_requests_since(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    """A request that began before the scrape is in the gauges; one that began later is not."""
    async with fleet(monkeypatch) as all_of_them:
        engines = all_of_them.engines
        await all_of_them.rate(5)
        name = scraper_of(engines, "a")
        other = next(router for router in all_of_them.routers if router.name != name)
        server = other.server("a")
        lease = server.lease(trio.current_time())
        engines.running["a"] = 4  # this request, and three of others
        await trio.sleep(2)
        assert server.load_estimate.running + server.load_estimate.waiting == 5
        later = server.lease(trio.current_time())
        assert server.load_estimate.running + server.load_estimate.waiting == 6
        later.release()
        lease.release()
        assert server.load_estimate.running + server.load_estimate.waiting == 4


async def test_scrapes_of_a_router_that_is_gone_are_taken_over_without_a_storm(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    async with fleet(monkeypatch, 6) as all_of_them:
        await all_of_them.rate(5)
        engines = all_of_them.engines
        name = scraper_of(engines, "a")
        gone = next(router for router in all_of_them.routers if router.name == name)
        left = [router for router in all_of_them.routers if router is not gone]
        lost = {server for by, server in engines.scrapes if by == name}
        gone.sharing.cancel()
        engines.silent.add(name)
        engines.scrapes.clear()
        for _ in range(40):
            await trio.sleep(0.1)
            assert all(router.fresh for router in left)
            assert max(max(router.ages()) for router in left) < STALE_INTERVALS * (INTERVAL + LATER)
        for server in lost:
            assert engines.total(server) <= 4 / INTERVAL + 2
        assert await all_of_them.rate() == pytest.approx(USUAL, rel=0.1)


async def test_scrapes_router_that_joins_takes_its_part_without_a_gap(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    async with fleet(monkeypatch, 2) as all_of_them:
        engines = all_of_them.engines
        engines.scrapes.clear()
        for _ in range(4):
            all_of_them.add()
        for _ in range(40):
            await trio.sleep(0.1)
            assert all(router.fresh for router in all_of_them.routers[:2])
        # Each router that starts looks at every server once or twice.
        assert engines.total() <= 4 * USUAL + 4 * 3 * SERVERS
        assert await all_of_them.rate() == pytest.approx(USUAL, rel=0.1)


@pytest.mark.parametrize("fault", ["gone", "frozen"])
async def test_scrapes_without_the_store_are_done_by_each_router(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, fault: str
):
    async with fleet(monkeypatch) as all_of_them:
        bus = all_of_them.bus
        if fault == "gone":
            bus.gone = True
        else:
            bus.freeze()
        for _ in range(40):
            await trio.sleep(0.1)
            assert all(router.fresh for router in all_of_them.routers)
        assert await all_of_them.rate() == pytest.approx(3 * USUAL, rel=0.1)
        bus.gone = False
        bus.thaw()
        await trio.sleep(5)
        assert await all_of_them.rate() == pytest.approx(USUAL, rel=0.1)


async def test_scrapes_of_a_server_that_its_router_cannot_reach_are_done_by_one_other(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    """Health stays local: the others neither follow the bad network nor lose the figures."""
    async with fleet(monkeypatch, 4) as all_of_them:
        await all_of_them.rate(5)
        engines = all_of_them.engines
        name = scraper_of(engines, "a")
        engines.unreachable.add((name, "a"))
        await trio.sleep(6)
        engines.scrapes.clear()
        await trio.sleep(10)
        assert engines.total("a") == pytest.approx(10 / INTERVAL, rel=0.1)
        assert len({by for by, server in engines.scrapes if server == "a"}) == 1
        for router in all_of_them.routers:
            expected = State.DOWN if router.name == name else State.UP
            assert router.server("a").state is expected
            if router.name != name:
                assert router.server("a").load_estimate.fresh


async def test_scrapes_of_a_server_that_only_some_routers_have(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    """Neither another server list nor another spelling of the URL leaves a server unscraped."""
    async with fleet(monkeypatch, 3) as all_of_them:
        own = [{"url": f"http://x{n}.test:1", "name": f"x{n}"} for n in range(SERVERS)]
        routers = [all_of_them.add(own), all_of_them.add(own)]
        await trio.sleep(6)
        assert await all_of_them.rate() == pytest.approx(2 * USUAL, rel=0.1)
        assert all(max(router.ages()) < 1.2 for router in routers)


async def test_scrapes_with_another_api_key_are_not_shared(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    async with fleet(monkeypatch, 2) as all_of_them:
        url = all_of_them.routers[0].server("a").url
        other = all_of_them.add([{"url": url, "name": "a", "api_key": "other"}])
        await trio.sleep(5)
        all_of_them.engines.scrapes.clear()
        await trio.sleep(10)
        assert all_of_them.engines.of(other.name) == pytest.approx(10 / INTERVAL, rel=0.1)
        assert all_of_them.engines.total("a") == pytest.approx(20 / INTERVAL, rel=0.1)


async def test_scrapes_failed_request_makes_its_router_check_at_once(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    async with fleet(monkeypatch) as all_of_them:
        await all_of_them.rate(5)
        engines = all_of_them.engines
        name = scraper_of(engines, "a")
        other = next(router for router in all_of_them.routers if router.name != name)
        await trio.sleep(0.05)
        engines.asked.clear()
        now = trio.current_time()
        other.supervisor.fleet.failed(other.server("a"), now, trial=False, jitter=1.0)
        await trio.sleep(0.001)
        for page in ("/health", "/metrics"):
            assert engines.asked[other.name, "a", page]
        engines.scrapes.clear()
        await trio.sleep(10)
        assert engines.scrapes[other.name, "a"] == pytest.approx(20, abs=2)  # until it answers
        other.server("a").answered(trio.current_time(), trial=False)
        await trio.sleep(2)
        engines.scrapes.clear()
        await trio.sleep(10)
        assert engines.scrapes[other.name, "a"] == 0


async def test_scrapes_restart_and_sleep_are_confirmed_by_each_router(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    async with fleet(monkeypatch) as all_of_them:
        engines = all_of_them.engines
        engines.started_at["a"] = trio.current_time()
        await trio.sleep(3)
        assert [router.server("a").restarts for router in all_of_them.routers] == [1, 1, 1]
        engines.asleep.add("a")
        await trio.sleep(3)
        assert {router.server("a").state for router in all_of_them.routers} == {State.ASLEEP}
        engines.asleep.clear()
        await trio.sleep(3)
        assert {router.server("a").state for router in all_of_them.routers} == {State.UP}
        await trio.sleep(3)
        assert await all_of_them.rate() == pytest.approx(USUAL, rel=0.1)


async def test_scrapes_new_adapter_is_looked_for_by_the_others(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    async with fleet(monkeypatch) as all_of_them:
        monkeypatch.setattr(probe_module, "MODELS_EVERY", 1000.0)
        await trio.sleep(6)  # the interval that had begun
        all_of_them.engines.adapters.append("adapter")
        await all_of_them.rate(5)
        name = scraper_of(all_of_them.engines, "a")
        first = next(router for router in all_of_them.routers if router.name == name)
        first.supervisor.probes.read_list_soon(first.server("a"))
        await trio.sleep(2)
        for router in all_of_them.routers:
            assert router.server("a").serves("adapter")


# -- hostile senders ---------------------------------------------------------------------------


async def test_scrapes_lying_figures_judge_no_server(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    """They may spoil the load, as a lying server may; health and restarts stay this router's."""
    async with fleet(monkeypatch, 2) as all_of_them:
        bus = all_of_them.bus
        url = all_of_them.routers[0].server("a").url
        lies = (
            Figures(0.0, 0, 0, 1e15, 1e15, 1.0, prompt_tokens=0.0),
            Figures(0.0, 0, 0, 0.0, 0.0, 0.0, asleep=True),
            Figures(0.0, 0, 0, 5.0, adapters=("x",) * 256, kv_tokens=2**62),
            Figures(1e15, 0, 0, 5.0),
        )
        number = 0
        for _ in range(40):
            for lie in lies:
                number += 1
                about = About("evil", "9", "c", 1.0, 0)
                figures = {url: lie, "http://unknown.test:1": lie}
                bus.append(encode(Batch("evil", number, about, figures=figures)))
            await trio.sleep(PERIOD)
        for router in all_of_them.routers:
            server = router.server("a")
            assert server.state is State.UP
            assert server.restarts == 0
            assert router.scrapes.doubted > 0
        await trio.sleep(5)  # the liar is silent
        for router in all_of_them.routers:
            assert router.server("a").load_estimate.running == 0.0
            assert router.server("a").load_estimate.waiting == 1.0
            assert router.server("b").load_estimate.fresh
        assert await all_of_them.rate() == pytest.approx(USUAL, rel=0.1)


async def test_scrapes_routers_that_never_announce_figures_are_passed_over(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
):
    """As a flood of invented routers, or ones of an older version."""
    async with fleet(monkeypatch, 2) as all_of_them:
        bus = all_of_them.bus
        oldest = 0.0
        for number in range(1, 30):
            about = About("old", "1", "c", 1.0, 0)
            for one in range(30):
                bus.append(encode(Batch(f"old-{one}", number, about)))
            await trio.sleep(PERIOD)
            oldest = max(oldest, *(max(router.ages()) for router in all_of_them.routers))
        assert oldest < 10 * INTERVAL
        for router in all_of_them.routers:
            assert max(router.ages()) < STALE_INTERVALS * INTERVAL
