"""Which servers may take a request: by model list, by what was tried, and by rank."""

from __future__ import annotations

import pytest

from support.fleet_makers import come_up, eject, gauges, go_down, make_fleet
from vllm_router.fleet.active_health import Check
from vllm_router.fleet.candidates import choose, is_fully_healthy, next_rank_change, rank
from vllm_router.fleet.server import ChangeLog, Server


def names(servers: list[Server], model: str | None = "m", *tried: Server) -> str:
    return "".join(server.name for server in choose(servers, model, 10.0, tried))


def damped(server: Server) -> None:
    for now in (1.0, 2.0):
        go_down(server, now)
        server.checked(Check.GOOD, 0.01, now)
    assert server.damped


def test_choose_prefers_servers_whose_list_has_the_model():
    fleet = make_fleet(3, up=False)
    a, b, c = servers = list(fleet.servers.values())
    come_up(a, 0.0, "m")
    come_up(b, 0.0, "other")
    c.checked(Check.GOOD, 0.01, 0.0)
    c.checked(Check.GOOD, 0.01, 0.0)
    assert c.models is None
    assert names(servers) == "a"
    assert names(servers, "unlisted") == "c"
    assert names(servers, None) == "abc"


def test_choose_damped_server_only_without_others_and_only_once():
    fleet = make_fleet(2, health_check_rise=1)
    a, b = servers = list(fleet.servers.values())
    damped(a)
    assert names(servers) == "b"
    assert names(servers, "m", b) == "a"
    assert names(servers, "m", a, b) == ""


def test_rank_orders_reasons_against_a_server():
    fleet = make_fleet(3, health_check_rise=1)
    healthy, ejected, flapping = fleet.servers.values()
    eject(ejected, 10.0)
    damped(flapping)
    assert [rank(server, 10.0) for server in (healthy, ejected, flapping)] == [0, 3, 4]
    healthy.backoff_until = 11.0
    assert (rank(healthy, 10.0), rank(healthy, 11.0)) == (1, 0)
    assert not is_fully_healthy(healthy, 10.0)
    healthy.silence.suspect(0.0, 10.0, "silent", 5.0)
    assert (rank(healthy, 10.0), rank(healthy, 15.0)) == (2, 0)


def test_next_rank_change_is_the_first_moment_to_come():
    (server,) = make_fleet(1).servers.values()
    assert next_rank_change(server, 10.0) is None
    server.backoff_until = 20.0
    server.silence.suspect(0.0, 10.0, "silent", 5.0)
    assert next_rank_change(server, 10.0) == 15.0
    assert next_rank_change(server, 15.0) == 20.0
    assert next_rank_change(server, 20.0) is None


@pytest.mark.parametrize("scraped", [False, True])
def test_change_log_stays_bounded_however_loads_change(scraped):
    server = make_fleet(1).servers["a"]
    if scraped:
        server.scraped(gauges(1), 0.0, leases=0)
    for _ in range(2 * ChangeLog.MAX_LENGTH):
        server.lease(1.0).release()
        assert len(server.change_log.servers) <= ChangeLog.MAX_LENGTH
