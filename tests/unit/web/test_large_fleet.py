"""Pages and feed of a large fleet: made in slices, and true although others run in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from support.fleet_makers import gauges
from support.longest_run import longest_run
from support.web_harness import Lab
from vllm_router.observability.slices import SERVERS_AT_ONCE
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.web import schema

FEW, MANY = 4 * SERVERS_AT_ONCE, 12 * SERVERS_AT_ONCE


def fleet_of(count: int, *, port: int = 1, **settings: Any) -> Lab:
    servers = [{"url": f"http://s{n}.test:{port}", "name": f"s{n}"} for n in range(count)]
    lab = Lab(servers, **settings)
    for server in lab.router.fleet.servers.values():
        server.scraped(gauges(1, 1, kv_usage=0.1, generation_tokens=5), trio.current_time(), 0)
        lab.ended(server)
    while lab.router.fleet.candidates("m", 0.0) is not lab.router.fleet.candidates("m", 0.0):
        pass  # a hundred servers are settled at a time
    return lab


async def new_client(lab: Lab) -> tuple[schema.Hello, schema.Snapshot]:
    """The first messages to a client of the feed."""
    mailbox = await lab.router.feed.subscribe(admin=False)
    hello, snapshot = await mailbox.get() or "", await mailbox.get() or ""
    lab.router.feed.unsubscribe(mailbox)
    return (
        msgspec.json.decode(hello, type=schema.Hello),
        msgspec.json.decode(snapshot, type=schema.Snapshot),
    )


async def feed_ticks(lab: Lab) -> None:
    """Two seconds of the feed with a client."""
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, trio.testing.MockClock)
    mailbox = await lab.router.feed.subscribe(admin=False)
    await mailbox.get()
    await mailbox.get()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.router.feed.run)
        for _ in range(4):
            await mailbox.get()
            clock.jump(0.5)
        nursery.cancel_scope.cancel()
    lab.router.feed.unsubscribe(mailbox)


async def page(lab: Lab, target: str) -> None:
    assert (await lab.get(target)).status == 200


TARGETS = (
    "/health",
    "/load-stats",
    "/server-models",
    "/admin/servers",
    "/metrics",
    "/explain?model=m",
    "/explain?model=unknown",
    "/decisions?limit=1000",
)
WORK: dict[str, Callable[[Lab], Awaitable[object]]] = {
    **{target: lambda lab, target=target: page(lab, target) for target in TARGETS},  # type: ignore[misc]
    "hello and snapshot": new_client,
    "feed": feed_ticks,
}


@pytest.mark.parametrize("work", WORK)
async def test_large_fleet_takes_no_longer_turns(mock_clock, work, monkeypatch):
    """Three times the servers take three times the turns, none of them longer."""
    # Every look at the clock finds the turn of a metrics page over.
    clock = iter(range(10**9))
    monkeypatch.setattr("vllm_router.observability.metrics.perf_counter", clock.__next__)
    longest = {}
    for count in (FEW, MANY):
        lab = fleet_of(count)
        await WORK[work](lab)  # fills what is computed once
        with longest_run() as run:
            await WORK[work](lab)
        longest[count] = run.calls
    # Whether any server has an unknown model is found at once, in 1 ms for a thousand.
    per_server = 13 if work == "/explain?model=unknown" else 1
    assert longest[MANY] <= 1.25 * longest[FEW] + per_server * (MANY - FEW)


@pytest.mark.parametrize("at_cap", [False, True])
async def test_explain_leaves_the_scores_of_requests_as_they_are(mock_clock, at_cap):
    """The next request does not measure all candidates anew."""
    lab = fleet_of(MANY, policy="adaptive", limits={"max_in_flight": 1, "queue_size": 10})
    fleet, policy = lab.router.fleet, lab.router.proxy.context.policies.default
    now = trio.current_time()
    policy.pick(fleet.candidates("m", now), RoutingInfo("m"), now)
    if at_cap:
        fleet.servers["s3"].lease(now)
    cache = policy._caches["m"]
    found = (await lab.get("/explain?model=m")).json
    assert policy._caches["m"] is cache
    assert len(found["candidates"]) == MANY - at_cap
    assert [row["server"] for row in found["out"]] == ["s3"] * at_cap


async def test_first_explanation_of_a_model_takes_no_longer_turns(mock_clock):
    """All candidates of a model are measured for the first time."""
    longest = {}
    for count in (FEW, MANY):
        lab = fleet_of(300 + count, policy="adaptive")
        await page(lab, "/explain?model=m")  # fills what is computed once
        lab.router.proxy.context.policies.default._caches.clear()
        with longest_run() as run:
            await page(lab, "/explain?model=m")
        longest[count] = run.calls
    assert longest[MANY] <= 1.25 * longest[FEW] + 2 * (MANY - FEW)


@asynccontextmanager
async def restless(lab: Lab) -> AsyncIterator[None]:
    """Servers are drained and taken back, and get and lose requests, in every turn."""
    rng = Random(1)
    servers = list(lab.router.fleet.servers.values())

    async def change() -> None:
        while True:
            for server in rng.sample(servers, 10):
                server.drain(on=not server.draining)
                if server.leases and rng.random() < 0.5:
                    next(iter(server.leases)).release()
                else:
                    server.lease(trio.current_time())
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change)
        await trio.lowlevel.checkpoint()
        yield
        nursery.cancel_scope.cancel()


async def test_feed_totals_are_sums_of_the_servers_in_the_snapshot(autojump_clock):
    lab = fleet_of(MANY)
    async with restless(lab):
        _, snapshot = await new_client(lab)
    servers, fleet = snapshot.servers, snapshot.fleet
    (model,) = snapshot.models
    assert fleet.states == Counter(server.state for server in servers)
    assert 0 < fleet.states["draining"] == model.draining < MANY
    assert fleet.available == model.available == fleet.states["up"]
    assert fleet.leases == sum(server.leases for server in servers)
    assert fleet.running == model.running == sum(server.running for server in servers)
    assert fleet.capacity == model.capacity


async def test_health_counts_the_servers_that_it_lists(autojump_clock):
    lab = fleet_of(MANY)
    async with restless(lab):
        health = (await lab.get("/health")).json
        load = (await lab.get("/load-stats")).json
    assert health["healthy_servers"] == sum(one["healthy"] for one in health["servers"])
    assert load["summary"]["in_flight"] == sum(one["in_flight"] for one in load["servers"])
    there = sum(one["current_load"] for one in load["servers"])
    assert load["summary"]["total_active_load"] == there


async def test_metrics_of_a_server_are_of_one_moment(autojump_clock, monkeypatch):
    clock = iter(range(10**9))
    monkeypatch.setattr("vllm_router.observability.metrics.perf_counter", clock.__next__)
    lab = fleet_of(MANY)
    async with restless(lab):
        text = (await lab.get("/metrics")).body.decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    up = [lines[f'vllm_router_server_available{{server="s{n}"}}'] for n in range(MANY)]
    assert up == [
        lines[f'vllm_router_server_state{{server="s{n}",state="up"}}'] for n in range(MANY)
    ]
    assert lines['vllm_router_model_available_servers{model="m"}'] == str(up.count("1"))
    assert up.count("0") > 0


@pytest.mark.parametrize("target", ["/health", "/load-stats", "/server-models", "/admin/servers"])
async def test_page_has_the_servers_of_one_configuration(autojump_clock, target):
    lab = fleet_of(FEW)
    old = list(lab.router.fleet.servers.values())

    async def reload() -> None:
        await trio.lowlevel.checkpoint()
        changed = [{"url": f"http://s{n}.test:2", "name": f"s{n}"} for n in range(FEW)]
        lab.apply(changed)
        for server in lab.router.fleet.gone():
            lab.router.proxy.forget(server)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reload)
        reply = await lab.get(target)
    assert old[0] not in lab.router.fleet.all_servers()
    text = reply.body.decode()
    assert text.count(".test:2") == FEW
    assert ".test:1" not in text


async def test_feed_snapshot_has_the_servers_of_one_configuration(autojump_clock):
    lab = fleet_of(FEW)

    async def reload() -> None:
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        lab.apply([{"url": f"http://s{n}.test:2", "name": f"s{n}"} for n in range(FEW)])
        lab.router.fleet.gone()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reload)
        _, snapshot = await new_client(lab)
    assert {server.url.rpartition(":")[2] for server in snapshot.servers} == {"2"}
    assert len(snapshot.servers) == snapshot.fleet.servers == FEW


async def test_explain_rows_are_of_the_moment_of_the_decision(autojump_clock):
    lab = fleet_of(MANY, policy="adaptive")
    async with restless(lab):
        found = (await lab.get("/explain?model=m")).json
    rows = found["candidates"]
    assert found["picked"] == rows[0]["server"]
    assert [row["score"] for row in rows] == sorted(row["score"] for row in rows)
    assert len(rows) + len(found["out"]) == MANY
    for row in rows:
        parts = row["parts"]
        score = parts["slow"] * (1.0 + parts["load"]) / (parts["share"] * parts["slow_start"])
        assert row["score"] == pytest.approx(score)
        assert parts["load"] == row["running"] + 0.5 * row["waiting"] + parts["others"]
    assert {row["state"] for row in found["out"]} <= {"draining"}
