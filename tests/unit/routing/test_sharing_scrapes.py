"""Which router scrapes a server, and what it announces; see also runtime/test_sharing_scrapes."""

from __future__ import annotations

import pytest

from support.fleet_makers import come_up, make_fleet
from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.routing.sharing.messages import MAX_BYTES, MAX_FIGURES, About, Batch, encode
from vllm_router.routing.sharing.scrapes import OLDEST, SharedScrapes

ROUTERS = tuple(f"router-{number}" for number in range(8))
SERVERS = [{"url": f"http://s{n}.test:1/{'x' * 500}"} for n in range(MAX_FIGURES + 20)]
METRICS = EngineMetrics(running=1.0, waiting=0.0, prompt_tokens=10.0)


def scrapes(own: str = ROUTERS[0], others: frozenset[str] = frozenset(ROUTERS[1:2])):
    """A router that hears others, and its fleet."""
    fleet = make_fleet(3)
    made = SharedScrapes(fleet.by_url)
    made.connect(own, lambda: True)
    made.follow(others)
    for server in fleet.servers.values():
        come_up(server, 0.0)
    return made, fleet


def first_of(url: str, routers: tuple[str, ...]) -> list[str]:
    """The routers that take themselves for the one that scrapes the server."""
    found = []
    for own in routers:
        made, _ = scrapes(own, frozenset(routers) - {own})
        if made._rank(url) == 0:
            found.append(own)
    return found


def test_rank_names_one_router_per_server_and_spreads_them():
    urls = [f"http://10.0.0.{number}:8000" for number in range(80)]
    owners = [first_of(url, ROUTERS) for url in urls]
    assert all(len(one) == 1 for one in owners)
    counts = [owners.count([router]) for router in ROUTERS]
    assert all(3 <= count <= 20 for count in counts), counts
    # Without one router only its servers move.
    left = [first_of(url, ROUTERS[1:]) for url in urls]
    assert all(one == [ROUTERS[0]] or one == other for one, other in zip(owners, left, strict=True))


def test_take_is_bounded_and_keeps_the_rest_for_the_next_batch():
    fleet = make_fleet(SERVERS)
    made = SharedScrapes(fleet.by_url)
    made.connect("own", lambda: True)
    made.follow(frozenset({"other"}))
    names = tuple(f"adapter-{n:0200}" for n in range(250))
    rich = EngineMetrics(running=1.0, adapters=names)
    for number, server in enumerate(fleet.servers.values()):
        made.scraped(server, rich if number % 50 == 0 else METRICS, 0.0)
    taken: list[str] = []
    while batch := made.take(1.0):
        assert len(batch) <= MAX_FIGURES
        assert len(encode(Batch("r", 1, About("", "", "", 0.0, 0), figures=batch))) < MAX_BYTES / 2
        assert all(one.age == 1.0 for one in batch.values())
        taken += batch
    assert sorted(taken) == sorted(server.url for server in fleet.servers.values())


def test_take_leaves_out_old_figures_and_replaces_repeated_ones():
    made, fleet = scrapes()
    a, b, _ = fleet.servers.values()
    made.scraped(a, METRICS, 0.0)
    made.scraped(b, METRICS, 0.0)
    made.scraped(b, EngineMetrics(running=7.0), OLDEST + 1)
    found = made.take(OLDEST + 1)
    assert list(found) == [b.url]
    assert found[b.url].running == 7.0
    assert not made.take(OLDEST + 1)


@pytest.mark.parametrize("alone", [True, False])
def test_scraped_is_announced_to_other_routers_and_only_with_a_load(alone: bool):
    made, fleet = scrapes(others=frozenset() if alone else frozenset({"other"}))
    a, b, _ = fleet.servers.values()
    made.scraped(a, METRICS, 0.0)
    made.scraped(b, EngineMetrics(), 0.0)
    assert list(made.take(0.0)) == ([] if alone else [a.url])


@pytest.mark.parametrize(
    ("at", "leases"), [(-5.0, 2), (0.0, 2), (0.5, 3), (1.0, 4), (1.5, 3), (2.0, 2)]
)
def test_figures_count_the_requests_at_the_time_of_the_scrape(at: float, leases: int):
    made, fleet = scrapes()
    a = fleet.servers["a"]
    made.look({a.url: 2}, 0.0)
    made.look({a.url: 4}, 1.0)
    for _ in range(2):
        a.lease(0.0)
    assert made._leases(a, at, 2.0) == leases
