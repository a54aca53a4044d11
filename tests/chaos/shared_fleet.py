"""Three routers that share state: scrapes, limits, cost, clocks (S5 to S8)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from glob import glob
from pathlib import Path
from typing import ClassVar, NamedTuple

import trio

from chaos.harness import Card, NotRun, scenario, waited
from chaos.shared import MOCK, _all, _drain, _is, _redis
from support.load import Load
from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, chat, servers_toml

INTERVAL = 0.5
"""Seconds between two scrapes of one router."""

PER_MINUTE = 300
KEY = {"authorization": "Bearer sk-team"}
KEYS = (
    f'[auth]\nkeys = [{{ name = "team", key = "sk-team", requests_per_minute = {PER_MINUTE} }}]\n'
)


class Fleet(NamedTuple):
    mocks: list[MockProcess]
    routers: list[RouterProcess]


@contextmanager
def _fleet(
    card: Card,
    store: str,
    names: tuple[str, ...] = ("one", "two", "three"),
    tables: str = "",
    kinds: dict[str, type[RouterProcess]] | None = None,
) -> Iterator[Fleet]:
    """Routers of these names before three servers; one called "alone" shares nothing."""
    with ExitStack() as ending:
        mocks = ending.enter_context(mock_processes(3, *MOCK))
        routers = []
        for name in names:
            file = card.directory / f"{name}.toml"
            shared = f'[shared]\nurl = "{store}"\nname = "{name}"\n'
            urls = [mock.url for mock in mocks]
            text = servers_toml(urls, capacity=64, metrics_interval=INTERVAL) + tables
            file.write_text(text + ("" if name.startswith("alone") else shared))
            routers.append((kinds or {}).get(name, RouterProcess)(file))
            ending.callback(routers[-1].close)
        for router in routers:
            router.wait_ready()
        yield Fleet(mocks, routers)


async def _scrapes_per_second(fleet: Fleet, seconds: float) -> float:
    """The scrapes of one server per second, on average."""
    began, before = time.monotonic(), sum(mock.stats()["scrapes"] for mock in fleet.mocks)
    await trio.sleep(seconds)
    after = sum(mock.stats()["scrapes"] for mock in fleet.mocks)
    return (after - before) / (time.monotonic() - began) / len(fleet.mocks)


def _oldest(router: RouterProcess) -> float:
    """The age of its oldest figures of a server, in seconds."""
    text = router.get("/metrics").text
    lines = [
        line for line in text.splitlines() if line.startswith("vllm_router_server_metrics_age")
    ]
    return max(float(line.rsplit(" ", 1)[1]) for line in lines)


def _cpu(router: RouterProcess) -> float:
    """Seconds of CPU that the router has used."""
    fields = Path(f"/proc/{router.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@scenario("S5", "each server is scraped by one router; that router is killed, the Redis frozen")
async def one_scraper(card: Card) -> None:
    with _redis(card.directory) as redis, _fleet(card, redis.url) as fleet:
        routers = fleet.routers
        await _all(routers, "routers", 3)
        seconds = card.size(6, 20)
        # Each router looks at each server by itself until it has heard of it from another one.
        await trio.sleep(3)
        rate = await _scrapes_per_second(fleet, seconds)
        card.note("scrapes of a server per second, of one router alone", f"{1 / INTERVAL:g}")
        card.most("of three routers", rate, 1.5 / INTERVAL)
        card.least("of three routers at least", rate, 0.5 / INTERVAL)
        spared = sum(router.metric("vllm_router_shared_servers_spared") for router in routers)
        card.equal("servers that routers leave to others", spared, 6.0)
        victim = min(routers, key=lambda one: one.metric("vllm_router_shared_servers_spared"))
        left = [router for router in routers if router is not victim]
        victim.signal(signal.SIGKILL)
        began, oldest = time.monotonic(), 0.0
        while time.monotonic() - began < card.size(4, 10):
            oldest = max(oldest, *(_oldest(router) for router in left))
            await trio.sleep(0.1)
        card.most("a scraper is killed: oldest figures", oldest, 5, " s")
        card.most("afterwards", max(_oldest(router) for router in left), 2, " s")
        card.most(
            "scrapes per second then", await _scrapes_per_second(fleet, seconds), 1.5 / INTERVAL
        )
        redis.freeze()
        await _all(left, "up", 0)
        await trio.sleep(1)
        rate = await _scrapes_per_second(fleet, seconds)
        card.least("Redis frozen: scrapes per second", rate, 1.5 / INTERVAL)
        card.most("oldest figures", max(_oldest(router) for router in left), 2, " s")
        redis.thaw()
        await _all(left, "up", 1)


@scenario("S6", "a key's limit over three routers")
async def limit(card: Card) -> None:
    with _redis(card.directory) as redis, _fleet(card, redis.url, tables=KEYS) as fleet:
        await _all(fleet.routers, "routers", 3)
        async with _key_loads(fleet.routers) as loads:

            def admitted() -> int:
                return sum(result.status == 200 for load in loads for result in load.results)

            def refused() -> bool:
                return any(result.status == 429 for load in loads for result in load.results)

            await waited(refused, "the end of the burst", 120)
            card.note("requests in the burst", admitted())
            await trio.sleep(2)
            began, before = time.monotonic(), admitted()
            await trio.sleep(card.size(40, 60))
            expected = PER_MINUTE / 60 * (time.monotonic() - began)
            share = (admitted() - before) / expected
            card.most("admitted then, of the limit", share, 1.05)
            card.least("admitted then, of the limit at least", share, 0.95)
            wrong = [
                result
                for load in loads
                for result in load.results
                if not result.ok and result.status != 429
            ]
            card.most("other failures", len(wrong), 0)


@asynccontextmanager
async def _key_loads(routers: list[RouterProcess]) -> AsyncIterator[list[Load]]:
    """Clients of the key on all routers, with more requests than its limit allows."""
    body = chat(max_tokens=1)
    async with AsyncExitStack() as ending:
        yield [
            await ending.enter_async_context(Load(one.url, body, 4, pause=0.1, headers=KEY))
            for one in routers
        ]


@scenario("S7", "what sharing costs a router")
async def cost(card: Card) -> None:
    names = ("one", "two", "three", "alone")
    with _redis(card.directory) as redis, _fleet(card, redis.url, names) as fleet:
        *sharing, alone = fleet.routers
        await _all(sharing, "routers", 3)
        await trio.sleep(3)
        both = (sharing[0], alone)
        seconds = card.size(15, 60)
        before = [_cpu(router) for router in both]
        await trio.sleep(seconds)
        idle = [(_cpu(one) - was) / seconds for one, was in zip(both, before, strict=True)]
        card.note("idle, of a core: sharing, alone", f"{idle[0]:.2%}, {idle[1]:.2%}")
        card.most("more, of a core", idle[0] - idle[1], 0.05)
        spent, count = [0.0, 0.0], card.size(50, 200)
        for _ in range(card.size(6, 20)):
            for number, router in enumerate(both):
                was = _cpu(router), time.monotonic()
                with router.client() as client:
                    for _ in range(count):
                        client.post("/v1/chat/completions", json=chat(max_tokens=1))
                spent[number] += _cpu(router) - was[0]
                spent[number] -= idle[number] * (time.monotonic() - was[1])
        total = count * card.size(6, 20)
        each = [one / total * 1e6 for one in spent]
        card.note("CPU of a request: sharing, alone", f"{each[0]:.0f} µs, {each[1]:.0f} µs")
        card.most("more, of a request", each[0] / each[1] - 1, 0.25)


class Ahead(RouterProcess):
    """A router whose clock is an hour ahead."""

    environment: ClassVar[dict[str, str]] = {"FAKETIME": "+1h", "DONT_FAKE_MONOTONIC": "1"}


@scenario("S8", "the clock of one router is an hour ahead")
async def wrong_clock(card: Card) -> None:
    found = [
        os.environ.get("FAKETIME_LIBRARY", ""),
        *glob("/usr/lib/*/faketime/libfaketimeMT.so.1"),
    ]
    library = next((path for path in found if path and Path(path).exists()), None)
    if library is None:
        raise NotRun("libfaketime is not installed, and FAKETIME_LIBRARY does not name it")
    Ahead.environment = {**Ahead.environment, "LD_PRELOAD": library}
    with _redis(card.directory) as redis, _fleet(card, redis.url, kinds={"two": Ahead}) as fleet:
        one, two, _ = fleet.routers
        date = two.get("/health").headers["date"]
        card.note("its clock, and ours", f"{date}, {time.strftime('%H:%M', time.gmtime())}")
        await _all(fleet.routers, "routers", 3)
        await _drain(card, "from the others", one, two)
        await _drain(card, "from it", two, one)
        await trio.sleep(3)
        spared = [router.metric("vllm_router_shared_servers_spared") for router in fleet.routers]
        card.equal("servers that routers leave to others", sum(spared), 6.0)
        card.most("oldest figures", max(map(_oldest, fleet.routers)), 2, " s")
        async with Load(two.url, chat(max_tokens=50, stream=True), 4) as load:
            await waited(
                lambda: one.metric("vllm_router_shared_requests_in_flight") > 0, "its requests", 60
            )
            await load.wait_for(card.size(10, 100))
        await waited(partial(_is, one, "requests_in_flight", 0), "the end of its requests", 60)
        card.most(f"failed of {len(load.results)}", len(load.bad()), 0)
