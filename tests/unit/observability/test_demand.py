"""`vllm_router_model_demand`: what an autoscaler sees, with and without servers."""

from __future__ import annotations

import re
from typing import Any

from trio.testing import MockClock

from support.fleet_makers import come_up, gauges
from support.web_harness import Lab
from vllm_router.config.parser import parse
from vllm_router.observability.demand import REFUSED_FOR, RecentRefusals

ZERO = """
[discovery]
defaults = { models = ["base"] }
file = { path = "none.json" }
[models]
public = "llama"
fast = { fallback = "big" }
"""


async def demand(lab: Lab) -> dict[str, float]:
    page = (await lab.get("/metrics")).body.decode()
    found = re.findall(r'^vllm_router_model_demand\{model="(.+)"\} (\S+)$', page, re.MULTILINE)
    return {name: float(value) for name, value in found}


def expecting() -> Lab:
    lab = Lab(1)
    lab.router.fleet.apply(parse(ZERO.encode(), "servers.toml", {}))
    return lab


async def test_demand_exists_at_zero_servers() -> None:
    assert await demand(expecting()) == {"base": 0, "big": 0, "fast": 0, "llama": 0}


async def test_demand_counts_requests_in_engines_by_model() -> None:
    lab = Lab(2)
    for server, running in zip(lab.router.fleet.servers.values(), (3, 4), strict=True):
        server.scraped(gauges(running, 2), 0.0, leases=0)
    assert await demand(lab) == {"m": 11}


async def test_demand_adapters_have_none_of_their_own() -> None:
    lab = Lab(1)
    server = lab["a"]
    cards = {"m": {"id": "m"}, "lora": {"id": "lora", "parent": "m"}}
    server.listed(cards, 0.0)
    assert await demand(lab) == {"m": 0}


async def test_demand_refused_requests_count_for_a_minute(autojump_clock: MockClock) -> None:
    lab = expecting()
    refused: dict[str, Any] = {"status": 503, "code": "no_server_available", "outcome": None}
    lab.ended(model="public", served_model="llama", **refused)
    lab.ended(model="invented", **refused)
    assert await demand(lab) == {"base": 0, "big": 0, "fast": 0, "llama": 1}


def test_refusals_are_counted_by_second_and_forgotten() -> None:
    recent = RecentRefusals()
    for number in range(10_000):
        recent.add(number / 1000)
    assert recent.count(10.0) == 10_000
    assert len(recent._seconds) == 10
    assert recent.count(REFUSED_FOR + 4.5) == 5_000
    assert recent.count(REFUSED_FOR + 20) == 0


async def test_demand_of_server_that_came_up_is_its_models() -> None:
    lab = Lab(1, up=False)
    assert await demand(lab) == {}
    come_up(lab["a"], 0.0, "late")
    assert await demand(lab) == {"late": 0}
