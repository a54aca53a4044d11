"""Active and passive health, driven with numbers as time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.fleet.active_health import ActiveHealth, Check
from vllm_router.fleet.health_rules import HealthRules
from vllm_router.fleet.passive_health import PassiveHealth

GOOD, NO, REFUSED, SLOW = Check.GOOD, Check.UNHEALTHY, Check.UNREACHABLE, Check.TIMEOUT


def probed(*checks: Check, rules: HealthRules | None = None) -> ActiveHealth:
    health = ActiveHealth(rules or HealthRules(rise=2, fall=3))
    for check in checks:
        health.observe(check, 0.01, 0.0)
    return health


# -- probes ------------------------------------------------------------------------------------


def test_health_before_first_check_is_unknown():
    assert probed().up is None
    assert probed().success_rate == 1.0


@pytest.mark.parametrize(("check", "up"), [(GOOD, True), (NO, False), (REFUSED, False)])
def test_health_first_check_decides_alone(check, up):
    health = ActiveHealth(HealthRules())
    assert health.observe(check, 0.01, 0.0)
    assert health.up is up


@pytest.mark.parametrize("bad", [NO, REFUSED, SLOW])
def test_health_configured_failures_in_a_row_take_server_down(bad):
    health = probed(GOOD, bad, bad)
    assert health.up
    assert health.observe(bad, 0.01, 0.0)
    assert not health.up
    assert "3 checks in a row" in health.reason.text


def test_health_good_check_restarts_failure_count():
    assert probed(GOOD, NO, NO, GOOD, NO, NO).up


def test_health_configured_good_checks_in_a_row_bring_server_up():
    health = probed(NO)
    assert not health.observe(GOOD, 0.01, 0.0)
    assert not health.observe(NO, 0.01, 0.0)
    assert not health.observe(GOOD, 0.01, 0.0)
    assert health.observe(GOOD, 0.01, 0.0)
    assert health.up
    assert health.reason.text == ""


def test_health_recovery_outweighs_old_failures():
    rules = HealthRules(rise=2, fall=3, window=5, min_success_rate=0.8)
    health = probed(GOOD, NO, NO, NO, GOOD, GOOD, rules=rules)
    assert health.up
    assert not health.observe(GOOD, 0.01, 0.0)
    assert health.up


def test_health_window_with_too_few_good_checks_takes_server_down():
    rules = HealthRules(fall=3, window=5, min_success_rate=0.8)
    health = probed(GOOD, NO, GOOD, NO, rules=rules)
    assert health.up
    assert health.observe(GOOD, 0.01, 0.0)
    assert not health.up
    assert "60% of the last 5" in health.reason.text


def test_health_window_of_slow_checks_takes_server_down():
    rules = HealthRules(window=3, max_response_time=1.0, min_success_rate=0.0)
    health = ActiveHealth(rules)
    health.observe(GOOD, 1.5, 0.0)
    health.observe(NO, 100.0, 0.0)
    assert health.mean_response_time == 1.5
    assert health.observe(GOOD, 1.5, 0.0)
    assert not health.up
    assert "1.5 s" in health.reason.text


def test_health_settled_is_false_while_checks_contradict_state():
    assert probed(GOOD).settled
    assert not probed(GOOD, NO).settled
    assert probed(NO).settled
    assert not probed(NO, GOOD).settled


def test_health_good_scrape_clears_failures_but_not_down():
    health = probed(GOOD, SLOW, SLOW)
    assert not health.observe_scrape(True, 0.0)
    assert health.failures_in_row == 0
    down = probed(NO)
    for _ in range(5):
        assert not down.observe_scrape(True, 0.0)
    assert down.up is False


def test_health_good_scrape_does_not_excuse_failed_check():
    health = probed(GOOD, NO, NO)
    health.observe_scrape(True, 0.0)
    assert health.observe(NO, 0.01, 0.0)
    assert not health.up


def test_health_failed_scrape_is_a_failed_check():
    health = probed(GOOD, REFUSED)
    assert not health.observe_scrape(False, 0.0)
    assert health.observe_scrape(False, 0.0)
    assert not health.up


def test_health_new_rules_keep_history():
    health = probed(GOOD, NO, NO)
    health.apply(HealthRules(fall=5, window=2, min_success_rate=0.0))
    assert len(health.window) == 2
    assert health.failures_in_row == 2
    assert not health.observe_scrape(False, 0.0)


@given(
    st.lists(st.sampled_from(list(Check)), max_size=60),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 12),
)
def test_health_transition_is_reported_exactly_on_change(checks, rise, fall, window):
    health = ActiveHealth(HealthRules(rise=rise, fall=fall, window=window))
    for check in checks:
        before = health.up
        flipped = health.observe(check, 0.1, 0.0)
        assert flipped is (health.up is not before)
        assert bool(health.reason) is not health.up


# -- traffic -----------------------------------------------------------------------------------


def ejected(at: float = 100.0, **rules: float) -> PassiveHealth:
    health = PassiveHealth(HealthRules(failure_threshold=3, ejection_time=5.0, **rules))
    for _ in range(3):
        health.failed(at, trial=False)
    assert health.ejected
    return health


def test_passive_failures_in_a_row_eject_unless_interrupted():
    health = PassiveHealth(HealthRules(failure_threshold=3))
    assert not health.failed(1.0, trial=False)
    assert not health.failed(1.0, trial=False)
    health.succeeded(1.0, trial=False)
    assert not health.failed(1.0, trial=False)
    assert not health.failed(1.0, trial=False)
    assert health.admits(1.0)
    assert health.failed(1.0, trial=False)
    assert not health.admits(1.0)


def test_passive_ejected_server_gets_one_probation_request_at_a_time():
    health = ejected(at=100.0)
    assert not health.admits(104.9)
    assert health.admits(105.0)
    assert health.start_trial(105.0)
    assert not health.admits(105.0)
    health.trial_ended()
    assert health.admits(105.0)


def test_passive_good_probation_restores_but_straggler_does_not():
    health = ejected(at=100.0)
    assert not health.succeeded(101.0, trial=False)
    assert health.ejected
    assert health.start_trial(105.0)
    assert health.succeeded(105.1, trial=True)
    assert not health.ejected
    assert health.admits(105.1)


def test_passive_ejection_time_grows_up_to_cap():
    health, now, lasted = ejected(at=0.0), 0.0, []
    for _ in range(15):
        lasted.append(health.until - now)
        now = health.until
        health.start_trial(now)
        assert health.failed(now, trial=True)
    assert lasted[:3] == [5.0, 10.0, 15.0]
    assert max(lasted) == lasted[-1] == 60.0


def test_passive_ejection_time_configured_beyond_cap_is_kept():
    health = PassiveHealth(HealthRules(failure_threshold=1, ejection_time=90.0))
    health.failed(0.0, trial=False)
    assert health.until == 90.0


def test_passive_straggler_failures_do_not_prolong_ejection():
    health = ejected(at=100.0)
    for _ in range(50):
        assert not health.failed(101.0, trial=False)
    assert (health.until, health.ejections) == (105.0, 1)


def test_passive_panic_failures_do_not_prolong_ejection():
    """All servers are ejected and still tried, 50 requests at once.

    That counts as one more failure.
    """
    health = ejected(at=100.0)
    for _ in range(50):
        health.failed(101.0, trial=True)
    assert (health.until, health.ejections) == (105.0, 1)


def test_passive_overlapping_probations_prolong_ejection_once():
    health = ejected(at=100.0)
    for _ in range(50):
        health.failed(106.0, trial=True)
    assert (health.until, health.ejections) == (116.0, 2)


def test_passive_ejections_are_forgotten_after_good_service():
    health = ejected(at=100.0)
    health.succeeded(105.0, trial=True)
    for _ in range(3):
        health.failed(120.0, trial=False)
    assert health.until == 130.0
    health.succeeded(130.0, trial=True)
    for _ in range(3):
        health.failed(200.0, trial=False)
    assert health.until == 205.0


def test_passive_repeats_of_one_body_do_not_count_for_another():
    health = PassiveHealth(HealthRules(failure_threshold=3))
    for _ in range(5):
        assert not health.failed(100.0, trial=False, body=1)
    assert not health.failed(100.0, trial=False, body=2)
    assert not health.answered_elsewhere(2, 100.0, jitter=1.0, allowed=True)
    assert not health.ejected
    assert health.failures_in_row == 2


def test_passive_jitter_lengthens_ejection():
    health = PassiveHealth(HealthRules(failure_threshold=1, ejection_time=5.0))
    health.failed(0.0, trial=False, jitter=1.1)
    assert health.until == pytest.approx(5.5)


def test_passive_restart_clears_history():
    health = ejected(at=100.0)
    health.restarted(101.0)
    assert health.admits(101.0)
    assert not health.failed(102.0, trial=False)
