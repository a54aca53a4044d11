"""Which servers are asked often, and how seldom the others are. Pure."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.fleet_makers import eject, gauges, go_down, make_fleet
from vllm_router.fleet.active_health import Check
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.probe_pace import (
    LONGEST,
    SETTLES_IN,
    ProbePace,
    changed_recently,
    is_doubtful,
    matters,
)
from vllm_router.fleet.reason import NONE
from vllm_router.fleet.server import Server

LATER = 1000.0


def large_fleet(count: int, **settings: object) -> Fleet:
    servers = [{"url": f"http://s{n}.test:1", "name": f"s{n}"} for n in range(count)]
    return make_fleet(servers, **settings)


class Probed:
    """A fleet whose servers have all been scraped at LATER, and the names of woken servers."""

    def __init__(self, count: int, **settings: object) -> None:
        self.fleet = large_fleet(count, **{"idle_probes_per_second": 100, **settings})
        self.servers = list(self.fleet.servers.values())
        self.pace = ProbePace()
        self.woken: list[str] = []
        for server in self.servers * 2:  # the first ones cannot know how many there are
            self.scraped(server)

    def scraped(self, server: Server, now: float = LATER) -> float:
        wake = lambda: self.woken.append(server.name)  # noqa: E731 (shorter than a function)
        return self.pace.scraped(server, self.fleet.settings, now, wake)


def test_matters_idle_server_does_not():
    fleet = make_fleet(1)
    server = fleet.servers["a"]
    assert matters(server) is False  # up since the start
    server.scraped(gauges(0.0), LATER, 0)
    assert not matters(server)


REASONS: dict[str, Callable[[Server], object]] = {
    "our request": lambda server: server.lease(LATER),
    "others' running request": lambda server: server.scraped(gauges(1.0), LATER, 0),
    "others' waiting request": lambda server: server.scraped(gauges(0.0, 1.0), LATER, 0),
    "failed check": lambda server: server.checked(Check.TIMEOUT, 1.0, LATER),
    "ejected": lambda server: eject(server, LATER),
    "paused": lambda server: server.pause(on=True, now=LATER),
    "silent": lambda server: server.silence.suspect(LATER, LATER, NONE, 1.0),
}


@pytest.mark.parametrize("reason", REASONS)
def test_matters_reason_to_follow_the_server(reason):
    server = make_fleet(1).servers["a"]
    assert not matters(server)
    REASONS[reason](server)
    assert matters(server)


def test_matters_unprobed_server_does():
    assert matters(make_fleet(1, up=False).servers["a"])


@pytest.mark.parametrize("change", ["down", "back"])
def test_changed_recently_ends_some_time_after_a_change(change):
    server = make_fleet(1).servers["a"]
    go_down(server, LATER)
    if change == "back":
        while not server.active_health.up:
            server.checked(Check.GOOD, 0.001, LATER)
    assert changed_recently(server, LATER + SETTLES_IN - 1)
    assert not changed_recently(server, LATER + SETTLES_IN)
    assert not matters(server)


def test_pace_small_fleet_is_asked_as_usual():
    rig = Probed(6)
    for server in rig.servers:
        assert rig.scraped(server) == 0.5
        assert rig.pace.interval(server, 2.0) == 2.0
        assert server.load_estimate.stale_after == 1.5
        server.lease(LATER)
    assert rig.woken == []


@pytest.mark.parametrize(
    ("servers", "rate", "scrape", "check"),
    [(50, 100, 0.5, 2.0), (100, 100, 1.0, 2.0), (1000, 100, 10.0, 10.0), (1000, 10, 30.0, 30.0)],
)
def test_pace_all_idle_servers_share_the_rate(servers, rate, scrape, check):
    rig = Probed(servers, idle_probes_per_second=rate)
    server = rig.servers[0]
    assert rig.scraped(server) == scrape
    assert rig.pace.interval(server, 2.0) == check
    assert server.load_estimate.stale_after == 3 * scrape
    assert scrape <= LONGEST


@pytest.mark.parametrize(("down", "scrape"), [(1, 0.5), (40, 0.5), (400, 4.0), (1000, 10.0)])
def test_pace_servers_that_went_down_are_asked_the_more_seldom_the_more_they_are(down, scrape):
    rig = Probed(1000)
    for server in rig.servers[:down] * 2:
        if server.active_health.up:
            go_down(server, LATER)
        rig.scraped(server)
    assert rig.scraped(rig.servers[0]) == scrape
    for server in rig.servers[:down] * 2:
        rig.scraped(server, LATER + SETTLES_IN)
    assert rig.scraped(rig.servers[0], LATER + SETTLES_IN) == 10.0


def test_pace_long_intervals_are_not_shortened():
    rig = Probed(300, idle_probes_per_second=1, metrics_interval=3600)
    assert rig.scraped(rig.servers[0]) == 3600


def test_pace_server_that_matters_is_asked_as_usual_among_many():
    rig = Probed(1000)
    server = rig.servers[7]
    server.scraped(gauges(3.0), LATER, 0)
    assert rig.scraped(server) == 0.5
    assert rig.pace.interval(server, 2.0) == 2.0
    assert server.load_estimate.stale_after == 1.5
    server.lease(LATER)
    assert rig.woken == [], "it is asked in half a second anyway"


def test_pace_chosen_idle_server_is_woken_once_if_its_request_lasts():
    rig = Probed(1000)
    server = rig.servers[7]
    server.lease(LATER)
    server.lease(LATER)
    assert rig.pace.interval(server, 2.0) == 2.0, "its health is checked as usual from now on"
    for passed in (0.4, 0.5, 0.6):
        rig.scraped(rig.servers[500], LATER + passed)
        assert rig.woken == ["s7"] * (passed > 0.4)


def test_pace_chosen_server_is_idle_again_after_a_short_request():
    rig = Probed(1000)
    server = rig.servers[7]
    server.lease(LATER).release()
    rig.scraped(rig.servers[500], LATER + 0.5)
    assert rig.woken == []
    assert rig.pace.is_idle(server)
    server.lease(LATER + 10)
    rig.scraped(rig.servers[500], LATER + 10.5)
    assert rig.woken == ["s7"]


def test_pace_chosen_server_that_fails_its_request_is_woken_at_once():
    rig = Probed(1000, idle_probes_per_second=10)
    for server in rig.servers[:30]:
        lease = server.lease(LATER + 60)
        rig.pace.failed(server, LATER + 60)
        lease.release()
    assert rig.woken == [f"s{n}" for n in range(10)], "at the rate"


def test_pace_idle_server_that_fails_a_request_from_before_is_not_woken():
    rig = Probed(1000)
    rig.pace.failed(rig.servers[7], LATER)
    assert rig.woken == []


def test_pace_chosen_server_is_not_woken_after_a_scrape_meanwhile():
    rig = Probed(1000)
    for server in rig.servers[:3]:
        server.lease(LATER)
    assert rig.scraped(rig.servers[1], LATER + 0.1) == 0.5
    rig.scraped(rig.servers[500], LATER + 1)
    assert rig.woken == ["s0", "s2"]


def test_pace_forgotten_server_is_not_counted_and_not_woken():
    rig = Probed(200)
    for server in rig.servers[100:]:
        rig.pace.forget(server)
    assert rig.scraped(rig.servers[0]) == 1.0
    rig.servers[150].lease(LATER)
    rig.servers[50].lease(LATER)
    rig.pace.forget(rig.servers[50])
    rig.scraped(rig.servers[0], LATER + 1)
    assert rig.woken == []


def test_pace_new_setting_applies_with_the_next_scrape():
    rig = Probed(1000)
    rig.fleet.settings = make_fleet(1, idle_probes_per_second=100_000).settings
    assert rig.scraped(rig.servers[0]) == 0.5


def busy(rig: Probed, count: int, *, waiting: int = 0, others: float = 0.0) -> list[Server]:
    """Give the first servers a request each, and scrape them twice.

    In the engines of the first `waiting` ones a request waits; `others` are other routers' requests
    on each of these.
    """
    servers = rig.servers[:count]
    for server in servers:
        server.lease(LATER)
    for position, server in enumerate(servers * 2):
        waits = position % count < waiting
        gauge = gauges(1.0 + others * waits, float(waits and not others))
        server.scraped(gauge, LATER, server.in_flight)
        rig.scraped(server)
    return servers


def test_pace_two_hundred_busy_servers_are_asked_as_usual():
    rig = Probed(1000)
    servers = busy(rig, 200, waiting=150)
    for server in servers:
        assert rig.scraped(server) == 0.5
        assert rig.pace.interval(server, 2.0) == 2.0
        assert server.load_estimate.stale_after == 1.5
        rig.pace.failed(server, LATER)
    assert rig.woken[200:] == [], "only because they were idle"


@pytest.mark.parametrize(("count", "scrape", "check"), [(250, 0.625, 2.5), (1000, 2.5, 10.0)])
def test_pace_more_busy_servers_cost_as_much_as_two_hundred(count, scrape, check):
    rig = Probed(1000)
    servers = busy(rig, count)
    intervals = [rig.scraped(server) for server in servers]
    assert intervals == [scrape] * count
    assert sum(1 / interval for interval in intervals) == pytest.approx(200 / 0.5)
    assert rig.pace.interval(servers[0], 2.0) == check
    assert servers[0].load_estimate.stale_after == 3 * scrape


@pytest.mark.parametrize(
    ("doubtful", "theirs", "others"),
    [(1, 0.5, 0.5 * 999 / 199), (100, 0.5, 4.5), (500, 2.5, 2.5), (900, 4.5, 0.5), (1000, 2.5, 0)],
)
@pytest.mark.parametrize("peers", [0.0, 5.0], ids=["queue", "other routers"])
def test_pace_doubtful_servers_have_half_of_the_places(doubtful, theirs, others, peers):
    rig = Probed(1000)
    servers = busy(rig, 1000, waiting=doubtful, others=peers)
    intervals = [rig.scraped(server) for server in servers]
    assert intervals[:doubtful] == pytest.approx([theirs] * doubtful)
    assert intervals[doubtful:] == pytest.approx([others] * (1000 - doubtful))
    assert sum(1 / interval for interval in intervals) == pytest.approx(400)


def test_is_doubtful_own_requests_that_run_are_predictable():
    server = make_fleet(1).servers["a"]
    for _ in range(3):
        server.lease(LATER)
    server.scraped(gauges(3.0), LATER, 3)
    assert not is_doubtful(server)
    server.scraped(gauges(4.0), LATER, 3)
    assert not is_doubtful(server), "the gauge may lag behind a response"
    server.scraped(gauges(6.0), LATER, 3)
    assert is_doubtful(server)
    server.scraped(gauges(2.0, 1.0), LATER, 3)
    assert is_doubtful(server)


@pytest.mark.parametrize("reason", [name for name in REASONS if "request" not in name])
def test_is_doubtful_health_in_doubt(reason):
    server = make_fleet(1).servers["a"]
    REASONS[reason](server)
    assert is_doubtful(server)


def test_pace_busy_servers_are_never_asked_less_often_than_at_the_longest_interval():
    rig = Probed(300, busy_servers_at_full_rate=1)
    servers = busy(rig, 300)
    assert rig.scraped(servers[0]) == LONGEST
    slow = Probed(300, busy_servers_at_full_rate=1, metrics_interval=3600)
    assert slow.scraped(busy(slow, 300)[0]) == 3600


def test_pace_servers_that_another_router_scrapes_take_no_places():
    rig = Probed(1000)
    servers = busy(rig, 1000)
    for server in servers[500:]:
        rig.pace.scraped(server, rig.fleet.settings, LATER, lambda: None, spared=True)
    assert rig.scraped(servers[0]) == 1.25
    spared = rig.pace.scraped(servers[-1], rig.fleet.settings, LATER, lambda: None, spared=True)
    assert spared == 1.25


def test_pace_failed_request_wakes_a_stretched_busy_server_at_the_rate():
    rig = Probed(1000, idle_probes_per_second=10)
    servers = busy(rig, 1000)
    rig.woken.clear()
    for server in servers[:30]:
        rig.pace.failed(server, LATER + 60)
    assert rig.woken == [f"s{n}" for n in range(10)]


def test_pace_busy_servers_are_asked_as_usual_again_when_few_are_left():
    rig = Probed(1000)
    servers = busy(rig, 1000)
    for server in servers[100:]:
        next(iter(server.leases)).release()
        server.scraped(gauges(0.0), LATER, 0)
        rig.scraped(server)
    assert rig.scraped(servers[0]) == 0.5
    for server in servers[50:100]:
        rig.pace.forget(server)
    assert rig.scraped(servers[0]) == 0.5
