"""Active health by itself: what each check changes, and flap damping."""

from __future__ import annotations

import pytest

from support.fleet_makers import detail
from vllm_router.fleet.active_health import ActiveHealth, Check
from vllm_router.fleet.health_rules import FORGET_AFTER, HealthRules

GOOD, BAD = Check.GOOD, Check.UNHEALTHY


def make(**rules) -> ActiveHealth:
    return ActiveHealth(HealthRules(**({"rise": 2, "fall": 2, "ejection_time": 5.0} | rules)))


def observe(health: ActiveHealth, marks: str, now: float, every: float = 1.0) -> float:
    """Checks at these intervals: `.` is good, `x` fails. Returns the time of the last."""
    for mark in marks:
        now += every
        health.observe(GOOD if mark == "." else BAD, 0.01, now)
    return now


def test_new_health_is_unknown_and_settled():
    health = make()
    assert (health.up, health.reason.text, health.settled, health.damped) == (
        None,
        "not probed yet",
        True,
        False,
    )
    assert (health.failures_in_row, health.goods_in_row, health.times_down) == (0, 0, 0)
    assert (health.total_checks, health.last_verdict, health.last_response_time) == (0, None, None)
    assert (health.success_rate, health.mean_response_time) == (1.0, 0.0)


def test_checks_are_counted_and_the_last_is_remembered():
    health = make(rise=9, fall=9)
    health.observe(GOOD, 0.5, 1.0)
    health.observe(Check.TIMEOUT, 2.0, 2.0)
    health.observe(GOOD, 1.5, 3.0)
    assert (health.total_checks, health.last_verdict, health.last_response_time) == (3, GOOD, 1.5)
    assert (health.success_rate, health.mean_response_time) == (pytest.approx(2 / 3), 1.0)
    assert (health.failures_in_row, health.goods_in_row) == (0, 1)


def test_rules_of_same_window_keep_it_and_of_another_shorten_it():
    health = make(window=3)
    window = health.window
    observe(health, "...", 0.0)
    health.apply(HealthRules(window=3, rise=7))
    assert health.window is window
    assert health.rules.rise == 7
    health.apply(HealthRules(window=2))
    assert (len(health.window), health.window.maxlen) == (2, 2)


def test_first_check_that_fails_gives_its_detail_as_reason():
    health = make()
    assert health.observe(BAD, 0.01, 1.0, detail("HTTP 500")) is True
    assert (health.up, health.reason.text) == (False, "HTTP 500")
    health = make()
    assert health.observe_scrape(False, 1.0) is True
    assert (health.up, health.reason.text) == (False, "unreachable")
    health = make()
    assert health.observe_scrape(False, 1.0, detail("refused")) is True
    assert health.reason.text == "refused"


def test_reason_of_down_server_follows_other_failures_only():
    health = make(fall=2)
    observe(health, ".", 0.0)
    health.observe(BAD, 0.01, 2.0, detail("HTTP 500"))
    health.observe(BAD, 0.01, 3.0, detail("HTTP 500"))
    assert health.reason.text == "HTTP 500 (2 checks in a row)"
    assert health.observe(BAD, 0.01, 4.0, detail("HTTP 500")) is False
    assert health.reason.text == "HTTP 500 (2 checks in a row)"
    assert health.observe(GOOD, 0.01, 5.0) is False
    assert health.reason.text == "HTTP 500 (2 checks in a row)"
    assert health.observe(BAD, 0.01, 6.0, detail("HTTP 502")) is False
    assert health.reason.text == "HTTP 502"


@pytest.mark.parametrize(
    ("up", "last", "failures"),
    [
        (True, Check.TIMEOUT, 0),
        (True, Check.UNREACHABLE, 0),
        (True, Check.UNHEALTHY, 2),
        (False, Check.TIMEOUT, 1),
    ],
)
def test_good_scrape_clears_failures_of_reachable_server_that_is_up(up, last, failures):
    health = make(fall=3)
    for check in (GOOD, last, last) if up else (last,):
        health.observe(check, 0.01, 1.0)
    assert health.observe_scrape(True, 2.0) is False
    assert health.failures_in_row == failures


def test_scrape_that_fails_ends_row_of_good_checks():
    health = make(rise=2)
    observe(health, "x.", 0.0)
    assert health.goods_in_row == 1
    health.observe_scrape(False, 3.0)
    assert (health.goods_in_row, health.failures_in_row) == (0, 1)


@pytest.mark.parametrize(("seconds", "up"), [(1.0, True), (1.01, False)])
def test_window_of_checks_slower_than_allowed_takes_server_down(seconds, up):
    health = make(window=2, max_response_time=1.0)
    for now in (1.0, 2.0):
        health.observe(GOOD, seconds, now)
    assert health.up is up


def test_window_at_smallest_allowed_rate_keeps_server_up():
    health = make(window=4, min_success_rate=0.75, fall=2)
    observe(health, "..x.", 0.0)
    assert health.up
    observe(health, "x", 4.0)
    assert not health.up
    assert health.reason.text == "only 50% of the last 4 checks were good"


def test_window_is_judged_only_once_it_is_full():
    health = make(window=4, min_success_rate=0.75, fall=3)
    observe(health, ".xx", 0.0)
    assert health.up
    assert len(health.window) == 3


def test_window_is_empty_after_return():
    health = make(fall=2, rise=2)
    observe(health, ".xx..", 0.0)
    assert (health.up, health.reason.text, len(health.window)) == (True, "", 0)


# -- damping -----------------------------------------------------------------------------------


def down_twice(health: ActiveHealth) -> float:
    now = observe(health, ".xx..xx", 0.0)
    assert (health.up, health.times_down, health.goods_in_row) == (False, 2, 0)
    return now


def test_damping_begins_with_the_first_good_check_after_the_last_failure():
    health = make()
    now = observe(health, "..x", down_twice(health))
    assert health.damped is False
    first = now + 1.0
    now = observe(health, "..", now)
    assert health.damped is True
    assert health.observe(GOOD, 0.01, first + 4.9) is False
    assert health.reason.text == "went down 2 times: back after 5 s of good checks"
    assert health.observe(GOOD, 0.01, first + 5.0) is True
    assert (health.up, health.damped) == (True, False)


def test_damping_once_down_returns_without_a_wait():
    health = make()
    observe(health, ".xx.", 0.0)
    assert health.damped is False
    assert health.observe(GOOD, 0.01, 4.0) is True
    assert (health.up, health.damped) == (True, False)


@pytest.mark.parametrize(
    ("up_for", "times"), [(FORGET_AFTER - 0.1, 3), (FORGET_AFTER, 2), (90.0, 1)]
)
def test_damping_forgets_times_down_after_good_service(up_for, times):
    health = make()
    now = observe(health, "......", down_twice(health))
    assert health.up
    health.observe(BAD, 0.01, now + 1.0)
    health.observe(BAD, 0.01, now + up_for)
    assert (health.up, health.times_down) == (False, times)


def test_damping_counts_service_from_the_first_check():
    health = make()
    health.observe(GOOD, 0.01, 1000.0)
    health.times_down = 5
    health.observe(BAD, 0.01, 1001.0)
    health.observe(BAD, 0.01, 1001.0 + FORGET_AFTER)
    assert health.times_down == 5
