"""What is known of a server, at the bounds: silence, standing still, refusals, the success rate."""

from __future__ import annotations

import pytest

from support.fleet_makers import detail, make_fleet
from vllm_router.fleet.health_rules import HealthRules
from vllm_router.fleet.passive_health import PassiveHealth
from vllm_router.fleet.refusals import DOUBTS, FORGET_AFTER, LONGEST, Refusals
from vllm_router.fleet.silence import Silence, StandStill

ROUTE = "/v1/responses"


# -- silence ------------------------------------------------------------------------------------


def test_silence_suspected_again_when_its_trial_is_due_lasts_longer():
    silence = Silence()
    assert silence.suspect(0.0, 10.0, detail("first"), 5.0)
    assert not silence.suspect(1.0, 14.9, detail("too early"), 5.0)
    assert silence.suspect(1.0, 15.0, detail("again"), 5.0)
    assert (silence.since, silence.reason.text, silence.until) == (0.0, "again", 25.0)


def test_stand_still_begins_anew_at_signs_of_work_alone():
    still = StandStill()
    assert still.lasts(10.0, 5.0, (1.0, 0.0), own=False) == 0.0
    assert still.lasts(13.0, 5.0, (1.0, 0.0), own=False) == 3.0
    assert still.lasts(14.0, 5.0, (2.0, 0.0), own=True) == 4.0
    assert still.lasts(15.0, 5.0, (3.0, 0.0), own=False) == 0.0
    assert still.lasts(17.0, 15.0, (3.0, 0.0), own=False) == 2.0
    assert still.lasts(18.0, 16.0, (3.0, 0.0), own=False) == 0.0
    still.reset()
    assert still.lasts(20.0, 5.0, (3.0, 0.0), own=False) == 0.0


# -- refusals -----------------------------------------------------------------------------------


def doubt(refusals: Refusals, now: float, body: int) -> bool:
    return refusals.refused(ROUTE, 0, "403", now, hold=5.0, body=body, sure=False)


@pytest.mark.parametrize(("gap", "believed"), [(LONGEST - 1.0, True), (LONGEST, False)])
def test_refusals_doubts_count_together_only_if_they_are_close(gap, believed):
    refusals = Refusals()
    found = [doubt(refusals, 1000.0 + number * gap, number) for number in range(DOUBTS)]
    assert found == [False] * (DOUBTS - 1) + [believed]


def test_refusals_expire_after_the_later_of_refusal_and_trial():
    refusals = Refusals()
    refusals.refused(ROUTE, 0, "404", 100.0, hold=50.0, body=1, sure=True)
    assert not refusals.expire(150.0 + FORGET_AFTER)
    assert refusals.expire(150.0 + FORGET_AFTER + 0.1)
    assert refusals.all() == ()


@pytest.mark.parametrize(("count", "shown", "more"), [(3, 3, ""), (5, 3, "; and 2 more")])
def test_refusals_reason_names_three(count, shown, more):
    refusals = Refusals()
    for number in range(count):
        refusals.refused(f"/{number}", 0, "404", 1.0, hold=5.0, body=1, sure=True)
    reason = refusals.reason().text
    assert reason.count("404") == shown
    assert reason.endswith(more or "404")


# -- the success rate ---------------------------------------------------------------------------


@pytest.mark.parametrize(("now", "count"), [(4.9, 1), (5.0, 1), (9.9, 1), (10.0, 0), (100.0, 0)])
def test_success_rate_forgets_a_half_of_its_window_at_a_time(now, count):
    health = PassiveHealth(HealthRules(failure_threshold=100))
    health.failed(0.0, trial=False)
    assert health.success_rate(now)[1] == count


def test_success_rate_counts_two_halves():
    health = PassiveHealth(HealthRules(failure_threshold=100))
    health.failed(0.0, trial=False)
    health.succeeded(5.5, trial=False)
    assert health.success_rate(6.0) == (0.5, 2)
    assert health.success_rate(10.5) == (1.0, 1)
    assert health.success_rate(15.5) == (1.0, 0)


# -- load ---------------------------------------------------------------------------------------


def test_server_whose_error_came_fast_has_more_load_at_once():
    """Else the server that fails fastest would look least busy to the next request."""
    fleet = make_fleet(2)
    a, b = fleet.servers.values()
    for server in (a, b):
        fleet.record_success(server, 10.0)
    before = a.load_estimate.effective
    fleet.record_error(a, 100.0, 0.1)
    assert a.load_estimate.effective > before == b.load_estimate.effective
