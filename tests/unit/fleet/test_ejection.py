"""Ejection by success rate: which servers, how many, and which failures count."""

from __future__ import annotations

import pytest

from support.fleet_makers import come_up, detail, eject, gauges, go_down, make_fleet
from vllm_router.fleet.active_health import ActiveHealth, Check
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.health_rules import HealthRules
from vllm_router.fleet.passive_health import PassiveHealth
from vllm_router.fleet.state import State

GOOD, NO = Check.GOOD, Check.UNHEALTHY


def ejected(fleet: Fleet) -> str:
    return "".join(s.name for s in fleet.servers.values() if s.passive_health.ejected)


def traffic(fleet: Fleet, name: str, pattern: str, now: float) -> None:
    """Requests to a server: `.` succeeds, `x` fails."""
    server = fleet.servers[name]
    for mark in pattern:
        if mark == ".":
            server.answered(now, trial=False)
        else:
            fleet.failed(server, now, trial=False, jitter=1.0)


# -- the success rate ---------------------------------------------------------------------------


def test_ejection_rate_far_above_others_ejects():
    fleet = make_fleet(3)
    for name in "bc":
        traffic(fleet, name, "." * 20, 1.0)
    traffic(fleet, "a", "..x" * 4, 2.0)
    assert ejected(fleet) == "a"
    fleet.settle(2.0)
    assert fleet.servers["a"].state is State.EJECTED
    assert (
        "67% of its last 12 requests succeeded, 100% elsewhere"
        in fleet.servers["a"].state_reason.text
    )


def test_ejection_low_rate_does_not_eject():
    fleet = make_fleet(3)
    for name in "bc":
        traffic(fleet, name, "." * 20, 1.0)
    traffic(fleet, "a", ".....x" * 10, 2.0)
    assert ejected(fleet) == ""


def test_ejection_first_few_requests_do_not_eject():
    fleet = make_fleet(2)
    traffic(fleet, "b", "." * 20, 1.0)
    traffic(fleet, "a", ".x.x.x.x", 1.0)
    assert ejected(fleet) == ""


def test_ejection_failures_of_all_servers_eject_none():
    fleet = make_fleet(4)
    for _ in range(10):
        for name in "abcd":
            traffic(fleet, name, "x..", 1.0)
    assert ejected(fleet) == ""


def test_ejection_rate_without_comparable_servers_does_not_eject():
    fleet = make_fleet(3)
    traffic(fleet, "a", "x.x." * 20, 1.0)
    assert ejected(fleet) == ""


def test_ejection_compares_servers_with_a_common_model():
    fleet = make_fleet(3)
    fleet.servers["b"].listed({"other": {"id": "other"}}, 0.0)
    traffic(fleet, "b", "." * 20, 1.0)
    traffic(fleet, "a", "x." * 10, 1.0)
    assert ejected(fleet) == ""
    traffic(fleet, "c", "." * 20, 1.0)
    traffic(fleet, "a", "x", 1.0)
    assert ejected(fleet) == "a"


def test_ejection_two_servers_are_comparable():
    fleet = make_fleet(2)
    traffic(fleet, "b", "." * 20, 1.0)
    traffic(fleet, "a", "x." * 10, 1.0)
    assert ejected(fleet) == "a"


def test_ejection_old_failures_do_not_count():
    fleet = make_fleet(2)
    traffic(fleet, "a", "x." * 6, 0.0)
    for now in range(30):
        traffic(fleet, "b", "....", float(now))
        traffic(fleet, "a", "....", float(now))
    traffic(fleet, "a", "x", 29.0)
    assert ejected(fleet) == ""
    assert fleet.servers["a"].passive_health.success_rate(29.0)[1] <= 4 * 10 + 1


def test_ejection_restored_server_is_judged_by_new_results():
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


def test_ejection_restored_server_starts_without_old_failures():
    """Within one window: what was counted before must not eject it at its first failure."""
    passive_health = PassiveHealth(HealthRules())
    for _ in range(9):
        passive_health.failed(1.0, trial=False)
    passive_health.eject(2.0, 1.0, detail("test"))
    assert passive_health.succeeded(3.0, trial=True)
    assert passive_health.success_rate(3.0) == (1.0, 0)
    passive_health.failed(3.5, trial=False)
    assert passive_health.success_rate(3.5) == (0.0, 1)


def test_ejection_ejected_server_at_fault_is_not_ejected_again():
    rules = HealthRules(failure_threshold=3)
    health = PassiveHealth(rules)
    for _ in range(9):
        health.failed(1.0, trial=False, body=7)
    health.eject(1.0, 1.0, detail("test"))
    until, ejections = health.until, health.ejections
    assert not health.answered_elsewhere(7, 2.0, jitter=1.0, allowed=True)
    assert (health.until, health.ejections) == (until, ejections)


# -- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("servers", "most"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3)])
def test_ejection_limit_is_half_of_fleet_and_at_least_one(servers, most):
    fleet = make_fleet(servers)
    for _ in range(10):
        for name in list(fleet.servers):
            traffic(fleet, name, "x", 1.0)
    assert len(ejected(fleet)) == most


def test_ejection_limit_is_configurable_and_zero_ejects_none():
    for share, expected in ((0, ""), (1, "abcd"), (0.75, "abc")):
        fleet = make_fleet(4, max_ejected_share=share)
        for name in "abcd":
            traffic(fleet, name, "xxx", 1.0)
        assert ejected(fleet) == expected


def test_ejection_limit_ignores_down_servers_and_then_ejects_next():
    fleet = make_fleet(2)
    traffic(fleet, "a", "xxx", 1.0)
    traffic(fleet, "b", "xxxxx", 1.0)
    assert ejected(fleet) == "a"
    go_down(fleet.servers["a"], 2.0)
    traffic(fleet, "b", "x", 2.0)
    assert ejected(fleet) == "ab"
    assert [server.name for server in fleet.candidates("m", 2.0)] == ["b"]


def test_ejection_limit_ignores_drained_and_sleeping_servers():
    """They get no probation request, so they would block other ejections for as long."""
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


def test_ejection_failed_probation_ejects_beyond_limit():
    fleet = make_fleet(2)
    traffic(fleet, "a", "xxx", 1.0)
    server = fleet.servers["a"]
    trial = server.lease(7.0)
    trial.release()
    fleet.failed(server, 7.0, trial=trial.trial, jitter=1.0)
    assert server.passive_health.until == 17.0


# -- which failures count -----------------------------------------------------------------------


def health() -> PassiveHealth:
    return PassiveHealth(HealthRules(failure_threshold=3))


def test_ejection_one_body_failing_repeatedly_ejects_none():
    traffic = health()
    for _ in range(50):
        assert not traffic.failed(1.0, trial=False, body=7)
    assert (traffic.failures_in_row, traffic.success_rate(1.0)) == (1, (0.0, 1))


def test_ejection_two_bodies_failing_in_turn_ejects():
    traffic = health()
    assert not traffic.failed(1.0, trial=False, body=7)
    assert not traffic.failed(1.0, trial=False, body=8)
    assert traffic.failed(1.0, trial=False, body=7)


def test_ejection_failures_without_body_all_count():
    traffic = health()
    assert not traffic.failed(1.0, trial=False)
    assert not traffic.failed(1.0, trial=False)
    assert traffic.failed(1.0, trial=False)


def test_ejection_repeats_count_once_another_server_answers_the_body():
    traffic = health()
    for _ in range(3):
        traffic.failed(1.0, trial=False, body=7)
    assert not traffic.answered_elsewhere(9, 1.0, jitter=1.0, allowed=True)
    assert traffic.answered_elsewhere(7, 1.0, jitter=1.0, allowed=True)
    assert traffic.ejected
    assert traffic.reason.text == "3 requests in a row failed"


def test_ejection_success_ends_row_of_repeats():
    traffic = health()
    for _ in range(5):
        traffic.failed(1.0, trial=False, body=7)
    traffic.succeeded(1.0, trial=False)
    assert not traffic.answered_elsewhere(7, 1.0, jitter=1.0, allowed=True)
    assert not traffic.ejected


# -- servers that keep falling -------------------------------------------------------------------


def run(probes: ActiveHealth, checks: str, now: float, every: float = 0.5) -> float:
    for mark in checks:
        now += every
        probes.observe(GOOD if mark == "." else NO, 0.01, now)
    return now


def flapping(ups: int) -> ActiveHealth:
    probes = ActiveHealth(HealthRules(rise=2, fall=2, ejection_time=5.0))
    now = run(probes, ".", 0.0)
    for _ in range(ups):
        now = run(probes, "xxxx....", now)
    probes.at = now
    return probes


def test_damping_first_time_down_has_no_cost():
    assert flapping(1).up


def test_damping_flapping_server_stays_out():
    probes = flapping(30)
    assert not probes.up
    assert probes.damped
    assert probes.times_down == 2
    assert "went down 2 times: back after 5 s of good checks" in probes.reason.text


def test_damping_ends_after_enough_good_checks():
    probes = flapping(2)
    now = run(probes, "." * 6, probes.at)
    assert not probes.up
    run(probes, ".", now)
    assert probes.up


def test_damping_grows_with_each_time_down_up_to_cap():
    probes = ActiveHealth(HealthRules(rise=2, fall=2, ejection_time=5.0))
    now, held = run(probes, ".", 0.0), []
    for _ in range(16):
        now = began = run(probes, "xx", now)
        while not probes.up:
            now = run(probes, ".", now)
        held.append(now - began)
    assert held[:4] == [1.0, 5.5, 10.5, 15.5]
    assert max(held) == held[-1] == 60.5


def test_damping_history_is_forgotten_after_good_service():
    probes = flapping(1)
    now = run(probes, "." * 80, probes.at)
    now = run(probes, "xx..", now)
    assert probes.up


def test_damping_server_is_used_if_no_other_is_up():
    fleet = make_fleet(2, health_check_rise=1)
    a, b = fleet.servers.values()
    for now in (1.0, 2.0):
        go_down(a, now)
        a.checked(GOOD, 0.01, now)
    assert a.damped
    assert [server.name for server in fleet.candidates("m", 3.0)] == ["b"]
    go_down(b, 3.0)
    assert [server.name for server in fleet.candidates("m", 3.0)] == ["a"]


def test_damping_server_is_used_only_while_checks_are_good():
    fleet = make_fleet(1, health_check_rise=1)
    (a,) = fleet.servers.values()
    go_down(a, 1.0)
    a.checked(GOOD, 0.01, 1.0)
    go_down(a, 2.0)
    assert fleet.candidates("m", 2.0) == ()
    a.checked(GOOD, 0.01, 2.5)
    assert fleet.candidates("m", 2.5) == (a,)
    assert a.state is State.DOWN
    assert a.state_reason.text == "went down 2 times: back after 5 s of good checks"
    a.checked(NO, 0.01, 3.0)
    assert fleet.candidates("m", 3.0) == ()


def test_damping_is_independent_of_ejection():
    fleet = make_fleet(2)
    a = fleet.servers["a"]
    eject(a, 1.0)
    go_down(a, 2.0)
    come_up(a, 3.0)
    assert not a.passive_health.ejected
