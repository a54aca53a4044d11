"""Which servers may take a request: by model list, by what was tried, and by rank."""

from __future__ import annotations

import pytest

from support.fleet_makers import come_up, detail, eject, gauges, go_down, make_fleet
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
    healthy.silence.suspect(0.0, 10.0, detail("silent"), 5.0)
    assert (rank(healthy, 10.0), rank(healthy, 15.0)) == (2, 0)


def test_rank_paused_server_is_the_last_resort_of_all():
    fleet = make_fleet(2, health_check_rise=1)
    paused, flapping = servers = list(fleet.servers.values())
    paused.pause(on=True, now=0.0)
    damped(flapping)
    assert (rank(paused, 10.0), rank(flapping, 10.0)) == (5, 4)
    assert names(servers) == "b"


def test_choose_paused_server_only_for_first_attempt():
    """A request that waits on a paused server is not better off on another paused one."""
    fleet = make_fleet(2)
    a, b = servers = list(fleet.servers.values())
    b.pause(on=True, now=0.0)
    assert names(servers) == "a"
    assert names(servers, "m", a) == ""
    assert names([b]) == "b"


@pytest.mark.parametrize("healthy", [True, False])
def test_is_fully_healthy_is_rank_zero(healthy):
    (server,) = make_fleet(1).servers.values()
    if not healthy:
        server.refused(9.5, None)
    assert is_fully_healthy(server, 10.0) is healthy


def test_next_rank_change_includes_trials_of_refusals():
    (server,) = make_fleet(1).servers.values()
    server.accepted_elsewhere("/v1/embeddings", 0, "404", 10.0, body=1, sure=True)
    assert next_rank_change(server, 10.0) == 10.0 + server.passive_health.rules.ejection_time


def test_next_rank_change_includes_ejection_and_its_trials():
    (server,) = make_fleet(1).servers.values()
    eject(server, 10.0)
    assert next_rank_change(server, 10.0) == server.passive_health.until
    now = server.passive_health.until
    server.lease(now)
    assert next_rank_change(server, now) == server.passive_health.next_trial_at


def test_next_rank_change_is_the_first_moment_to_come():
    (server,) = make_fleet(1).servers.values()
    assert next_rank_change(server, 10.0) is None
    server.backoff_until = 20.0
    server.silence.suspect(0.0, 10.0, detail("silent"), 5.0)
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
