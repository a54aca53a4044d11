"""Who is ejected for its success rate, how many may be, and whose fault a failure is."""

from __future__ import annotations

import pytest

from support.fleet_makers import come_up, eject, gauges, go_down, make_fleet
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.health import Check, HealthRules, ProbeHealth, TrafficHealth
from vllm_router.fleet.server import State

GOOD, NO = Check.GOOD, Check.UNHEALTHY


def ejected(fleet: Fleet) -> str:
    return "".join(s.name for s in fleet.servers.values() if s.traffic_health.ejected)


def traffic(fleet: Fleet, name: str, pattern: str, now: float) -> None:
    """Requests to a server: `.` is answered, `x` fails."""
    server = fleet.servers[name]
    for mark in pattern:
        if mark == ".":
            server.answered(now, trial=False)
        else:
            fleet.failed(server, now, trial=False, jitter=1.0)


# -- the success rate ---------------------------------------------------------------------------


def test_a_server_that_fails_much_more_often_than_the_others_is_ejected():
    fleet = make_fleet(3)
    for name in "bc":
        traffic(fleet, name, "." * 20, 1.0)
    traffic(fleet, "a", "..x" * 4, 2.0)
    assert ejected(fleet) == "a"
    fleet.settle(2.0)
    assert fleet.servers["a"].state is State.EJECTED
    assert (
        "67% of its last 12 requests succeeded, 100% elsewhere" in fleet.servers["a"].state_reason
    )


def test_not_if_it_fails_seldom():
    fleet = make_fleet(3)
    for name in "bc":
        traffic(fleet, name, "." * 20, 1.0)
    traffic(fleet, "a", ".....x" * 10, 2.0)
    assert ejected(fleet) == ""


def test_not_for_the_first_few_requests():
    fleet = make_fleet(2)
    traffic(fleet, "b", "." * 20, 1.0)
    traffic(fleet, "a", ".x.x.x.x", 1.0)
    assert ejected(fleet) == ""


def test_a_trouble_of_all_is_nobodys():
    fleet = make_fleet(4)
    for _ in range(10):
        for name in "abcd":
            traffic(fleet, name, "x..", 1.0)
    assert ejected(fleet) == ""


def test_a_server_without_others_to_be_compared_with_is_not_judged_by_its_rate():
    fleet = make_fleet(3)
    traffic(fleet, "a", "x.x." * 20, 1.0)
    assert ejected(fleet) == ""


def test_a_server_is_compared_with_those_that_have_a_model_in_common():
    fleet = make_fleet(3)
    fleet.servers["b"].listed({"other": {"id": "other"}}, 0.0)
    traffic(fleet, "b", "." * 20, 1.0)
    traffic(fleet, "a", "x." * 10, 1.0)
    assert ejected(fleet) == ""
    traffic(fleet, "c", "." * 20, 1.0)
    traffic(fleet, "a", "x", 1.0)
    assert ejected(fleet) == "a"


def test_two_servers_are_enough_to_compare():
    fleet = make_fleet(2)
    traffic(fleet, "b", "." * 20, 1.0)
    traffic(fleet, "a", "x." * 10, 1.0)
    assert ejected(fleet) == "a"


def test_what_is_long_past_does_not_count():
    fleet = make_fleet(2)
    traffic(fleet, "a", "x." * 6, 0.0)
    for now in range(30):
        traffic(fleet, "b", "....", float(now))
        traffic(fleet, "a", "....", float(now))
    traffic(fleet, "a", "x", 29.0)
    assert ejected(fleet) == ""
    assert fleet.servers["a"].traffic_health.success_rate(29.0)[1] <= 4 * 10 + 1


def test_one_that_is_back_is_judged_by_what_it_has_done_since():
    fleet = make_fleet(2)
    traffic(fleet, "b", "." * 20, 1.0)
    traffic(fleet, "a", "x." * 10, 1.0)
    server = fleet.servers["a"]
    trial = server.lease(10.0)
    trial.release()
    server.answered(10.0, trial=trial.trial)
    traffic(fleet, "b", "." * 20, 10.0)
    traffic(fleet, "a", "x", 10.0)
    assert ejected(fleet) == ""


# -- how many -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("servers", "most"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3)])
def test_at_most_half_of_the_fleet_is_ejected_and_one_always_may_be(servers, most):
    fleet = make_fleet(servers)
    for _ in range(10):
        for name in list(fleet.servers):
            traffic(fleet, name, "x", 1.0)
    assert len(ejected(fleet)) == most


def test_the_share_can_be_set_and_zero_ejects_nobody():
    for share, expected in ((0, ""), (1, "abcd"), (0.75, "abc")):
        fleet = make_fleet(4, max_ejected_share=share)
        for name in "abcd":
            traffic(fleet, name, "xxx", 1.0)
        assert ejected(fleet) == expected


def test_servers_that_are_down_leave_room_and_who_still_fails_is_next():
    fleet = make_fleet(2)
    traffic(fleet, "a", "xxx", 1.0)
    traffic(fleet, "b", "xxxxx", 1.0)
    assert ejected(fleet) == "a"
    go_down(fleet.servers["a"], 2.0)
    traffic(fleet, "b", "x", 2.0)
    assert ejected(fleet) == "ab"
    assert [server.name for server in fleet.candidates("m", 2.0)] == ["b"]


def test_ejected_ones_that_are_drained_or_asleep_leave_room_too():
    """They get no trial: nobody else could be ejected for as long as they stay so."""
    for how in ("drained", "asleep"):
        fleet = make_fleet(3)
        traffic(fleet, "a", "xxx", 1.0)
        if how == "drained":
            fleet.servers["a"].drain(on=True)
        else:
            fleet.servers["a"].scraped(gauges(0, asleep=True), 2.0, leases=0)
        traffic(fleet, "b", "xxx", 2.0)
        assert ejected(fleet) == "ab", how
        assert [server.name for server in fleet.candidates("m", 2.0)] == ["c"]


def test_a_trial_that_fails_ejects_again_though_others_are_out():
    fleet = make_fleet(2)
    traffic(fleet, "a", "xxx", 1.0)
    server = fleet.servers["a"]
    trial = server.lease(7.0)
    trial.release()
    fleet.failed(server, 7.0, trial=trial.trial, jitter=1.0)
    assert server.traffic_health.until == 17.0


# -- whose fault --------------------------------------------------------------------------------


def health() -> TrafficHealth:
    return TrafficHealth(HealthRules(failure_threshold=3))


def test_one_body_that_fails_again_and_again_ejects_nobody():
    traffic = health()
    for _ in range(50):
        assert not traffic.failed(1.0, trial=False, body=7)
    assert (traffic.failures_in_row, traffic.success_rate(1.0)) == (1, (0.0, 1))


def test_two_bodies_that_fail_in_turn_do():
    traffic = health()
    assert not traffic.failed(1.0, trial=False, body=7)
    assert not traffic.failed(1.0, trial=False, body=8)
    assert traffic.failed(1.0, trial=False, body=7)


def test_failures_that_no_body_explains_count_each():
    traffic = health()
    assert not traffic.failed(1.0, trial=False)
    assert not traffic.failed(1.0, trial=False)
    assert traffic.failed(1.0, trial=False)


def test_all_of_them_count_once_another_server_has_answered_the_body():
    traffic = health()
    for _ in range(3):
        traffic.failed(1.0, trial=False, body=7)
    assert not traffic.not_its_fault(9, 1.0, jitter=1.0, allowed=True)
    assert traffic.not_its_fault(7, 1.0, jitter=1.0, allowed=True)
    assert traffic.ejected
    assert traffic.reason == "3 requests in a row failed"


def test_a_good_answer_ends_the_row_of_repeats_too():
    traffic = health()
    for _ in range(5):
        traffic.failed(1.0, trial=False, body=7)
    traffic.succeeded(1.0, trial=False)
    assert not traffic.not_its_fault(7, 1.0, jitter=1.0, allowed=True)
    assert not traffic.ejected


# -- servers that keep falling -------------------------------------------------------------------


def run(probes: ProbeHealth, checks: str, now: float, every: float = 0.5) -> float:
    for mark in checks:
        now += every
        probes.observe(GOOD if mark == "." else NO, 0.01, now)
    return now


def flapping(ups: int) -> ProbeHealth:
    probes = ProbeHealth(HealthRules(rise=2, fall=2, ejection_time=5.0))
    now = run(probes, ".", 0.0)
    for _ in range(ups):
        now = run(probes, "xxxx....", now)
    probes.at = now
    return probes


def test_the_first_fall_costs_nothing():
    assert flapping(1).up


def test_one_that_flaps_stays_out():
    probes = flapping(30)
    assert not probes.up
    assert probes.held_back
    assert probes.falls == 2
    assert "it fell 2 times: back after 5 s of good checks" in probes.reason


def test_it_is_back_when_its_checks_have_been_good_for_long_enough():
    probes = flapping(2)
    now = run(probes, "." * 6, probes.at)
    assert not probes.up
    run(probes, ".", now)
    assert probes.up


def test_each_fall_holds_it_back_longer_up_to_a_cap():
    probes = ProbeHealth(HealthRules(rise=2, fall=2, ejection_time=5.0))
    now, held = run(probes, ".", 0.0), []
    for _ in range(16):
        now = began = run(probes, "xx", now)
        while not probes.up:
            now = run(probes, ".", now)
        held.append(now - began)
    assert held[:4] == [1.0, 5.5, 10.5, 15.5]
    assert max(held) == held[-1] == 60.5


def test_falls_are_forgotten_with_time_well_served():
    probes = flapping(1)
    now = run(probes, "." * 80, probes.at)
    now = run(probes, "xx..", now)
    assert probes.up


def test_where_all_others_are_gone_one_that_is_held_back_is_asked():
    fleet = make_fleet(2, health_check_rise=1)
    a, b = fleet.servers.values()
    for now in (1.0, 2.0):
        go_down(a, now)
        a.checked(GOOD, 0.01, now)
    assert a.held_back
    assert [server.name for server in fleet.candidates("m", 3.0)] == ["b"]
    go_down(b, 3.0)
    assert [server.name for server in fleet.candidates("m", 3.0)] == ["a"]


def test_it_is_asked_as_soon_as_its_checks_are_good_and_no_longer():
    fleet = make_fleet(1, health_check_rise=1)
    (a,) = fleet.servers.values()
    go_down(a, 1.0)
    a.checked(GOOD, 0.01, 1.0)
    go_down(a, 2.0)
    assert fleet.candidates("m", 2.0) == ()
    a.checked(GOOD, 0.01, 2.5)
    assert fleet.candidates("m", 2.5) == (a,)
    assert a.state is State.DOWN
    assert a.state_reason == "it fell 2 times: back after 5 s of good checks"
    a.checked(NO, 0.01, 3.0)
    assert fleet.candidates("m", 3.0) == ()


def test_ejection_and_falls_are_separate():
    fleet = make_fleet(2)
    a = fleet.servers["a"]
    eject(a, 1.0)
    go_down(a, 2.0)
    come_up(a, 3.0)
    assert not a.traffic_health.ejected
