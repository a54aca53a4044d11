"""Hostile names, resolvers and servers (F22 to F24, B10)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import trio

from chaos.harness import MOCK, SHORT, Card, off_loop, scenario, waited
from support.fake_names import FakeNames, swallowing
from support.hostile import lab
from support.hostile_servers import SERVERS
from support.load import Load
from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml

OUTAGE = 45.0
"""Seconds: half as long again as the router believes an answer."""


@contextlib.contextmanager
def named_fleet(
    card: Card, count: int = 2
) -> Iterator[tuple[list[MockProcess], RouterProcess, FakeNames]]:
    """Servers called `gpu-0.test` and so on, at 127.0.0.1."""
    names = FakeNames(card.directory, believed_for=5.0)
    with mock_processes(count, *MOCK, "--host", "127.0.0.1") as mocks:
        urls = []
        for number, mock in enumerate(mocks):
            names.set(f"gpu-{number}.test", "127.0.0.1")
            urls.append(f"http://gpu-{number}.test:{mock.port}")
        # An address is abandoned when a connect to it or a check of it times out.
        config = servers_toml(urls, 16, **SHORT)
        with router_process(config, card.directory, kind=names.router) as router:
            yield mocks, router, names


def _failed(load: Load) -> int:
    return sum(not result.ok for result in load.results)


@scenario("F22", "the resolver fails, knows no name, and hangs, under load", p0=True)
async def resolver_down(card: Card) -> None:
    with named_fleet(card) as (mocks, router, names):
        seconds = card.size(8, int(OUTAGE))
        for what, break_it in (
            ("fails", names.fail),
            ("knows no such name", names.forget),
            ("hangs", names.hang),
        ):
            for number in range(len(mocks)):
                break_it(f"gpu-{number}.test")
            before = names.asked()
            async with Load(router.url, chat(max_tokens=4), 20) as load:
                await trio.sleep(seconds)
            card.note(f"{what}: look-ups, requests", (names.asked() - before, len(load.results)))
            card.equal(f"{what}: not answered", _failed(load), 0)
            states = {s["state"] for s in (await off_loop(router.servers)).values()}
            card.equal(f"{what}: states", states, {"up"})


@scenario("F23", "a name moves, and its old address swallows", p0=True)
async def name_moves(card: Card) -> None:
    with named_fleet(card, 1) as ([old], router, names):
        new = MockProcess(*MOCK, "--host", "127.0.0.2", port=old.port)
        try:
            await off_loop(new.wait)
            names.set("gpu-0.test", "127.0.0.2")
            old.kill()
            with swallowing("127.0.0.1", old.port):
                took = await waited(
                    lambda: router.post("/v1/chat/completions", chat()).status_code == 200,
                    "an answer",
                )
                card.most("until it answers again", took, 3, " s")
                async with Load(router.url, chat(max_tokens=4), 20) as load:
                    await trio.sleep(card.size(2, 5))
                card.equal("not answered", _failed(load), 0)
        finally:
            new.close()


@scenario("F24", "the first of a name's addresses swallows from the start")
async def first_address_swallows(card: Card) -> None:
    with named_fleet(card, 1) as ([mock], router, names):
        with swallowing("127.0.0.3", mock.port):
            names.set("gpu-0.test", "127.0.0.3", "127.0.0.1")
            await trio.sleep(6)  # until it has been looked up again
            began = time.monotonic()
            async with Load(router.url, chat(max_tokens=4), 20) as load:
                await trio.sleep(card.size(2, 5))
            card.equal("not answered", _failed(load), 0)
            card.least("requests per s", len(load.results) / (time.monotonic() - began), 20)
        states = {server["state"] for server in (await off_loop(router.servers)).values()}
        card.equal("states", states, {"up"})


@scenario("B10", "servers that mean harm: pages, lists, names, heads, streams", p0=True)
async def hostile_servers(card: Card) -> None:
    with mock_processes(2, "--model", "m", "--ttft", "0", "--token-delay", "0") as mocks:
        rows = [row for row in SERVERS if not card.quick or "page" in row.name]
        for front in ("lane", "workers"):
            directory = card.directory / front
            directory.mkdir()
            with lab(front, [mock.url for mock in mocks], directory, tls=False) as there:
                for row in rows:
                    await off_loop(there.run, row)
                    _, computing = there.stalls[row.name]
                    card.most(f"{front}: {row.name}: stall", computing * 1000, 100, " ms")
