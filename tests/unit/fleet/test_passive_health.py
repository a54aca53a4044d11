"""Passive health by itself: its window, its trials, and the requests that count."""

from __future__ import annotations

import pytest

from support.fleet_makers import detail
from vllm_router.fleet.health_rules import FORGET_AFTER, HealthRules
from vllm_router.fleet.passive_health import (
    INVALID_REMEMBERED,
    LONGEST_TRIAL_GAP,
    PassiveHealth,
)

HALF = PassiveHealth.WINDOW / 2


def make(threshold: int = 3, ejection_time: float = 5.0) -> PassiveHealth:
    return PassiveHealth(HealthRules(failure_threshold=threshold, ejection_time=ejection_time))


def fail(health: PassiveHealth, now: float, **more) -> bool:
    return health.failed(now, **({"trial": False} | more))


def test_passive_new_server_is_admitted_with_clean_record():
    health = make()
    assert (health.failures_in_row, health.ejections, health.ejected) == (0, 0, False)
    assert (health.reason.text, health.until, health.trial, health.next_trial_at) == (
        "",
        0.0,
        False,
        0,
    )
    assert health.admits(0.0) is True
    assert health.start_trial(0.0) is False
    assert health.success_rate(0.0) == (1.0, 0)


# -- the success rate --------------------------------------------------------------------------


def test_rate_counts_both_kinds_of_results():
    health = make(threshold=9)
    for _ in range(3):
        health.succeeded(1.0, trial=False)
    fail(health, 1.0)
    assert health.success_rate(1.0) == (0.75, 4)


@pytest.mark.parametrize("event", ["read", "good", "bad"])
def test_rate_keeps_the_last_half_and_forgets_the_one_before(event):
    def touch(now: float) -> None:
        {
            "read": lambda: health.success_rate(now),
            "good": lambda: health.succeeded(now, trial=False),
            "bad": lambda: fail(health, now),
        }[event]()

    health = make(threshold=99)
    fail(health, 1.0)
    health.succeeded(1.0, trial=False)
    touch(HALF)
    extra = {"read": (0, 0), "good": (1, 0), "bad": (0, 1)}[event]
    good, bad = 1 + extra[0], 1 + extra[1]
    assert health.success_rate(HALF) == pytest.approx((good / (good + bad), good + bad))
    assert health.success_rate(2 * HALF - 0.1)[1] == good + bad
    assert health.success_rate(2 * HALF)[1] == good + bad - 2
    assert health.success_rate(3 * HALF) == (1.0, 0)


def test_rate_after_a_whole_window_without_requests_is_empty():
    health = make()
    fail(health, 1.0)
    assert health.success_rate(2 * HALF) == (1.0, 0)
    fail(health, 2 * HALF + 1.0)
    assert health.success_rate(3 * HALF - 0.1) == (0.0, 1)
    assert health.success_rate(4 * HALF - 0.1) == (0.0, 1)
    assert health.success_rate(4 * HALF) == (1.0, 0)


def test_rate_begins_anew_when_the_server_is_restored():
    health = make(threshold=1)
    fail(health, 1.0)
    health.succeeded(8.0, trial=True)
    assert health.success_rate(8.0) == (1.0, 0)
    health.succeeded(9.0, trial=False)
    assert health.success_rate(8.0 + 2 * HALF - 0.1) == (1.0, 1)


# -- trials ------------------------------------------------------------------------------------


def test_trials_follow_silent_ones_at_growing_gaps():
    health, gaps = make(threshold=1), []
    fail(health, 0.0)
    now = health.until
    for _ in range(2000):
        assert health.admits(now) is True
        assert health.start_trial(now) is True
        gaps.append(health.next_trial_at - now)
        assert health.admits(health.next_trial_at - 0.5) is False
        now = health.next_trial_at
    assert gaps[:6] == [2.0, 4.0, 8.0, 16.0, 32.0, LONGEST_TRIAL_GAP]
    assert gaps[-1] == LONGEST_TRIAL_GAP


def test_trials_by_panic_rule_do_not_lengthen_gap():
    health = make(threshold=1)
    fail(health, 0.0)
    for _ in range(3):
        assert health.start_trial(4.0) is True
        assert health.next_trial_at == 6.0
    assert health.start_trial(5.0) is True
    assert health.start_trial(7.0) is True
    assert health.next_trial_at == 11.0


def test_trials_begin_with_short_gap_after_each_ejection():
    health = make(threshold=1)
    fail(health, 0.0)
    for now in (5.0, 7.0, 11.0):
        health.start_trial(now)
    assert fail(health, 12.0, trial=True) is True
    assert health.trial is False
    assert (health.until, health.reason.text) == (22.0, "its trial request failed")
    health.start_trial(22.0)
    assert health.next_trial_at == 24.0


def test_trial_without_result_lets_another_follow():
    health = make(threshold=1)
    fail(health, 0.0)
    health.start_trial(5.0)
    assert health.trial is True
    health.trial_ended()
    assert health.trial is False
    assert health.admits(5.0) is True


def test_trial_of_server_in_service_is_none():
    health = make(threshold=1)
    fail(health, 0.0)
    health.start_trial(5.0)
    health.succeeded(6.0, trial=True)
    assert (health.ejected, health.trial) == (False, False)
    assert health.start_trial(6.0) is False
    assert health.trial is False


@pytest.mark.parametrize(("now", "trial", "again"), [(4.9, True, False), (5.0, True, True)])
def test_trial_failure_counts_only_once_the_trial_was_due(now, trial, again):
    health = make(threshold=1)
    fail(health, 0.0)
    assert fail(health, now, trial=trial) is again
    assert fail(health, 5.0, trial=False) is False
    assert health.ejections == 1 + again


# -- ejections ---------------------------------------------------------------------------------


def test_ejection_lasts_by_jitter_and_number():
    health = make(threshold=1)
    assert fail(health, 10.0, jitter=1.2) is True
    assert health.until == pytest.approx(16.0)
    assert (health.ejections, health.reason.text) == (1, "1 requests in a row failed")


def test_ejection_not_allowed_leaves_server_in_service():
    health = make(threshold=1)
    assert fail(health, 0.0, allowed=False) is False
    assert not health.ejected
    assert fail(health, 0.0, allowed=True) is True


@pytest.mark.parametrize(
    ("served", "lasts"), [(FORGET_AFTER - 0.1, 10.0), (FORGET_AFTER, 5.0), (10 * FORGET_AFTER, 5.0)]
)
def test_ejection_is_forgotten_after_good_service_since_return(served, lasts):
    health = make(threshold=1)
    fail(health, 100.0)
    health.succeeded(105.0, trial=True)
    fail(health, 105.0 + served)
    assert health.until == pytest.approx(105.0 + served + lasts)


def test_ejection_while_ejected_forgets_none():
    health = make(threshold=1)
    fail(health, 1000.0)
    fail(health, 2000.0, trial=True)
    assert (health.ejections, health.until) == (2, 2010.0)


def test_restart_clears_record_but_remembers_ejections():
    health = make(threshold=2)
    fail(health, 0.0)
    fail(health, 0.0)
    health.start_trial(5.0)
    fail(health, 4.0, body=7)
    fail(health, 4.0, body=7)
    health.restarted(6.0)
    assert (health.ejected, health.trial, health.failures_in_row) == (False, False, 0)
    assert health.success_rate(6.0) == (1.0, 0)
    assert health.answered_elsewhere(7, 6.0, jitter=1.0, allowed=True) is False
    assert health.failures_in_row == 0
    fail(health, 7.0)
    fail(health, 7.0)
    assert (health.ejections, health.until) == (2, 17.0)


# -- which failures count ----------------------------------------------------------------------


def test_body_that_fails_again_after_another_counts():
    health = make(threshold=9)
    for body in (1, 1, 2, 1, 1):
        fail(health, 1.0, body=body)
    assert health.failures_in_row == 3
    assert health.answered_elsewhere(1, 1.0, jitter=1.0, allowed=True) is False
    assert (health.failures_in_row, health.success_rate(1.0)) == (4, (0.0, 4))
    # Its repeats have been counted.
    assert health.answered_elsewhere(1, 1.0, jitter=1.0, allowed=True) is False
    assert health.failures_in_row == 4
    fail(health, 1.0, body=1)
    assert health.failures_in_row == 5


def test_repeats_answered_elsewhere_eject_with_jitter_only_if_allowed():
    health = make(threshold=3)
    for _ in range(3):
        fail(health, 1.0, body=7)
    assert health.answered_elsewhere(7, 1.0, jitter=1.2, allowed=False) is False
    assert not health.ejected
    assert health.failures_in_row == 3
    for _ in range(2):
        fail(health, 1.0, body=8, allowed=False)
    assert health.answered_elsewhere(8, 1.0, jitter=1.2, allowed=True) is True
    assert health.until == pytest.approx(7.0)


def test_odd_response_counts_once_another_body_has_one():
    health = make(threshold=1)
    assert fail(health, 1.0, body=1, odd=True) is False
    assert fail(health, 2.0, body=1, odd=True) is False
    assert health.failures_in_row == 0
    assert health.success_rate(2.0) == (1.0, 0)
    assert fail(health, 3.0, body=2, odd=True) is True


@pytest.mark.parametrize(("after", "counts"), [(INVALID_REMEMBERED - 0.1, True), (60.0, False)])
def test_odd_response_is_remembered_for_a_time(after, counts):
    health = make(threshold=1)
    fail(health, 1.0, body=1, odd=True)
    assert fail(health, 1.0 + after, body=2, odd=True) is counts
    if not counts:  # the later one is remembered now
        assert fail(health, 1.0 + after, body=1, odd=True) is True


def test_odd_response_counts_once_another_server_answers_the_body():
    health = make(threshold=2)
    fail(health, 1.0, body=1, odd=True)
    assert health.answered_elsewhere(2, 1.0, jitter=1.0, allowed=True) is False
    assert health.answered_elsewhere(1, 1.0, jitter=1.0, allowed=True) is False
    assert (health.failures_in_row, health.success_rate(1.0)) == (1, (0.0, 1))
    assert health.answered_elsewhere(1, 1.0, jitter=1.0, allowed=True) is False
    assert health.failures_in_row == 1
    fail(health, 1.0, body=3, odd=True)
    assert health.answered_elsewhere(3, 1.0, jitter=1.2, allowed=True) is True
    assert health.until == pytest.approx(7.0)


def test_odd_response_answered_elsewhere_ejects_none_unless_allowed():
    health = make(threshold=1)
    fail(health, 1.0, body=1, odd=True)
    assert health.answered_elsewhere(1, 1.0, jitter=1.0, allowed=False) is False
    assert not health.ejected
    fail(health, 1.0, body=2, odd=True)
    health.eject(1.0, 1.0, detail("test"))
    assert health.answered_elsewhere(2, 1.0, jitter=1.0, allowed=True) is False
    assert health.ejections == 1


def test_success_ends_row_of_failures_and_restores_only_by_trial():
    health = make(threshold=2)
    fail(health, 1.0)
    assert health.succeeded(1.0, trial=False) is False
    assert health.failures_in_row == 0
    assert health.succeeded(1.0, trial=True) is False
    fail(health, 1.0)
    fail(health, 1.0)
    assert health.succeeded(9.0, trial=False) is False
    assert health.succeeded(9.0, trial=True) is True
