"""The leader's sums over its workers: counters outlive a worker, gauges do not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.fleet_makers import make_fleet
from vllm_router.observability.router_state import CPU, IN_FLIGHT, LAG
from vllm_router.proxy.record import Phase
from vllm_router.routing.server_estimate import PrefixStatistics
from vllm_router.runtime.workers.channel import Channel, pair
from vllm_router.runtime.workers.messages import Hello, WorkerStats
from vllm_router.runtime.workers.worker_link import MAX_BATCHES
from vllm_router.runtime.workers.worker_links import WorkerLinks

STALLS = "vllm_router_event_loop_stalls_total"


@pytest.fixture
async def workers() -> Iterator[WorkerLinks]:
    """Two workers that have said hello, with process ids 101 and 102."""
    ends = [pair() for _ in range(2)]
    links = WorkerLinks([Channel(ours) for ours, _ in ends])
    for number, link in enumerate(links.links, 101):
        link.hello(Hello(number, []), [], [])
    yield links
    for end in (end for both in ends for end in both):
        end.close()


def stats(*, serving: bool = True, **values: float) -> WorkerStats:
    return WorkerStats(serving, values, {})


async def test_worker_links_sum_counters_and_take_longest_lag(workers: WorkerLinks):
    one, two = workers.links
    one.stats = stats(**{CPU: 1.5, IN_FLIGHT: 2, LAG: 0.01, STALLS: 1})
    two.stats = stats(serving=False, **{CPU: 2.0, IN_FLIGHT: 3, LAG: 0.5})
    assert workers.figure(CPU) == 3.5
    assert workers.figure(LAG) == 0.5
    assert workers.figure(STALLS) == 1
    assert workers.in_flight == 5
    assert (workers.figure("workers"), workers.serving, workers.ready) == (1, 1, True)
    assert set(workers.workers()) == {"1", "2"}


async def test_worker_links_dead_worker_leaves_its_counters_only(workers: WorkerLinks):
    one, two = workers.links
    one.stats = stats(**{CPU: 1.5, IN_FLIGHT: 2, STALLS: 4})
    two.stats = stats(**{CPU: 2.0})
    workers.lost(1, 101)
    assert workers.restarts == workers.figure("restarts") == 1
    assert (workers.figure(CPU), workers.figure(STALLS)) == (3.5, 4)
    assert (workers.in_flight, workers.serving) == (0, 1)
    assert set(workers.workers()) == {"2"}
    workers.bury(one)  # the successor's hello finds it buried
    assert workers.figure(CPU) == 3.5


async def test_worker_links_late_news_of_death_spares_the_successor(workers: WorkerLinks):
    one, _ = workers.links
    one.hello(Hello(103, []), [], [])
    one.stats = stats(**{IN_FLIGHT: 2})
    workers.lost(1, 101)
    assert workers.restarts == 1
    assert workers.in_flight == 2


async def test_worker_links_running_streams_are_records_of_their_servers(workers: WorkerLinks):
    fleet = make_fleet(2)
    workers.server_of = fleet.by_url
    first, second = fleet.servers.values()
    workers.links[0].stats = WorkerStats(True, {}, {first.url: 7, "http://gone": 1})
    workers.links[1].stats = WorkerStats(True, {}, {second.url: 2})
    found = [(record.server, record.chunks, record.phase) for record in workers.running()]
    assert found == [
        (first, 7, Phase.STREAM),
        (None, 1, Phase.STREAM),
        (second, 2, Phase.STREAM),
    ]


async def test_worker_links_statistics_are_of_workers_that_have_some(workers: WorkerLinks):
    (server,) = make_fleet(1).servers.values()
    known = PrefixStatistics(10, 4, 3, 4096)
    workers.links[1].stats = WorkerStats(True, {}, {}, prefixes={server.url: known})
    assert workers.prefix_statistics(server) == [known]


async def test_worker_links_stored_responses_go_to_the_other_workers(workers: WorkerLinks):
    one, two = workers.links
    entries = [(b"digest", "http://a", "")]
    workers.stored(one, entries)
    assert (one._stored, two._stored) == ([], entries)


async def test_worker_link_that_is_dead_is_sent_nothing(workers: WorkerLinks):
    one, two = workers.links
    workers.bury(one)
    for _ in range(MAX_BATCHES + 10):
        one.tell(b"batch")
        two.tell(b"batch")
    assert (len(one._batches), len(two._batches)) == (0, MAX_BATCHES)
