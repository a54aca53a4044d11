"""The table of outcomes, row by row, and the retry budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.proxy.retry import (
    BREAKS_SERVERS,
    DOUBTFUL,
    NOT_COMPUTED,
    RULES,
    Outcome,
    RetryBudget,
    RetryContext,
    RetryDecision,
    classify_status,
    decide,
)

NO, SAME, ELSEWHERE = RetryDecision.NO, RetryDecision.SAME_SERVER, RetryDecision.ELSEWHERE


def standing(**changes) -> RetryContext:
    values = {"attempts": 1, "broken": 0, "candidates_left": True, "replayable": True}
    return RetryContext(**{**values, **changes})


def after(
    outcome: Outcome, *, max_retries: int = 3, tokens: float = 10.0, **changes
) -> RetryDecision:
    budget = RetryBudget()
    budget.depth = tokens
    return decide(outcome, standing(**changes), max_retries, budget)


BLAMED = {
    Outcome.SERVER_ERROR,
    Outcome.CONNECT_FAILED,
    Outcome.CONNECT_TIMEOUT,
    Outcome.CONNECTION_LOST,
    Outcome.PROTOCOL_ERROR,
    Outcome.ABORTED,
    Outcome.EMPTY,
    Outcome.UNFINISHED,
    Outcome.ERROR_EVENT,
    Outcome.FIRST_BYTE_TIMEOUT,
    Outcome.IDLE_TIMEOUT,
    Outcome.TRUNCATED,
}

ELSEWHERE_AFTER = {
    Outcome.REFUSED,
    Outcome.MISDIRECTED,
    Outcome.NO_MODEL,
    Outcome.TOO_LONG,
    Outcome.SILENT,
    Outcome.FULL,
    Outcome.LIMITED,
    Outcome.SERVER_ERROR,
    Outcome.CONNECT_FAILED,
    Outcome.CONNECT_TIMEOUT,
    Outcome.UNRESOLVED,
    Outcome.CONNECTION_LOST,
    Outcome.PROTOCOL_ERROR,
    Outcome.ABORTED,
    Outcome.EMPTY,
    Outcome.UNFINISHED,
    Outcome.ERROR_EVENT,
    Outcome.SERVER_DOWN,
    *DOUBTFUL,
}


UNSENT = {Outcome.CONNECT_FAILED, Outcome.CONNECT_TIMEOUT, Outcome.UNRESOLVED}


@pytest.mark.parametrize("outcome", list(Outcome))
def test_retry_rules_every_outcome_says_what_it_counts_against(outcome):
    assert RULES[outcome].counts_against_server is (outcome in BLAMED)


@pytest.mark.parametrize("outcome", list(Outcome))
def test_decide_every_outcome_gives_next_step(outcome):
    expected = ELSEWHERE if outcome in ELSEWHERE_AFTER else NO
    assert after(outcome) is (SAME if outcome is Outcome.STALE else expected)


@pytest.mark.parametrize("outcome", sorted(ELSEWHERE_AFTER, key=str))
def test_decide_no_server_or_attempt_left_ends(outcome):
    assert after(outcome, candidates_left=False) is NO
    assert after(outcome, attempts=3) is ELSEWHERE
    assert after(outcome, attempts=4) is NO
    assert after(outcome, attempts=1, max_retries=0) is NO


def test_decide_unrepeatable_request_is_not_retried_once_sent():
    refused = {*NOT_COMPUTED, Outcome.LIMITED}
    sent = ELSEWHERE_AFTER - refused - UNSENT
    for outcome in sent | {Outcome.STALE}:
        assert after(outcome, replayable=False) is NO
    for outcome in ELSEWHERE_AFTER - sent:
        assert after(outcome, replayable=False) is ELSEWHERE


def test_decide_stale_connection_is_retried_once():
    assert after(Outcome.STALE, candidates_left=False, tokens=0, attempts=4) is SAME


def test_decide_request_that_crashed_two_servers_ends():
    for outcome in BREAKS_SERVERS:
        assert after(outcome, broken=1) is ELSEWHERE
        assert after(outcome, broken=2) is NO
    assert after(Outcome.CONNECT_FAILED, broken=2) is NO


def test_decide_after_a_second_doubtful_answer_asks_no_third_server():
    for outcome in DOUBTFUL:
        assert after(outcome, doubtful=1) is ELSEWHERE
        assert after(outcome, doubtful=2) is NO
    assert after(Outcome.CONNECTION_LOST, doubtful=2) is ELSEWHERE


def test_classify_status_gateways_codes_are_server_errors():
    for status in (500, 502, 504, 506, 507, 511, 520, 521, 525, 530, 598, 599):
        assert classify_status(status, has_body=True) is Outcome.SERVER_ERROR
    for status in (429, 503, 529):
        assert classify_status(status, has_body=True) is Outcome.FULL
        assert classify_status(status, has_body=False) is Outcome.SERVER_ERROR
    for status in (200, 400, 404, 408, 422, 499, 501, 505, 508):
        assert classify_status(status, has_body=True) is Outcome.ANSWERED


def test_decide_request_on_two_servers_going_down_counts_as_crashing():
    assert Outcome.SERVER_DOWN in BREAKS_SERVERS
    assert Outcome.FULL not in BREAKS_SERVERS
    assert Outcome.CONNECT_FAILED not in BREAKS_SERVERS


def test_budget_pays_for_retries_but_not_for_busy():
    for outcome in ELSEWHERE_AFTER - NOT_COMPUTED:
        assert after(outcome, tokens=0.9) is NO
        assert after(outcome, tokens=1.0) is ELSEWHERE
    for outcome in NOT_COMPUTED:
        assert after(outcome, tokens=0.0) is ELSEWHERE


def test_budget_pays_only_for_retries_that_happen():
    budget = RetryBudget()
    for changes in ({"candidates_left": False}, {"attempts": 9}, {"replayable": False}):
        decide(Outcome.CONNECTION_LOST, standing(**changes), 3, budget)
    assert budget.tokens == 10.0
    decide(Outcome.CONNECTION_LOST, standing(), 3, budget)
    assert budget.tokens == 9.0


@pytest.mark.parametrize("before", [0, 1000])
def test_budget_absorbs_crash_of_two_of_three_servers(before):
    budget = RetryBudget()
    for _ in range(before):
        budget.requested(1)
        budget.answered()
    for in_flight in range(50):
        budget.requested(in_flight + 1)
    assert all(budget.withdraw() for _ in range(34))


@pytest.mark.parametrize("requests", [100, 500, 2000])
def test_budget_bounds_retry_storm(requests):
    """All fail: at most a fifth more attempts than requests, plus three (scorecard F13)."""
    budget = RetryBudget()
    attempts = 0
    for _ in range(requests):
        attempts += 1
        budget.requested(10)
        attempts += budget.withdraw()
    assert attempts <= 1.2 * requests + 3
    assert attempts == requests + 10


def test_budget_half_failing_allows_a_fifth_of_successes():
    budget = RetryBudget()
    replays = 0
    for number in range(2000):
        budget.requested(4)
        if number % 2 == 0 or budget.withdraw():
            replays += number % 2
            budget.answered()
    assert replays <= 0.2 * 2000 + 10


def test_budget_depth_is_bounded_by_requests_in_flight():
    budget = RetryBudget()
    budget.requested(40)
    assert budget.tokens == 40
    assert all(budget.withdraw() for _ in range(40))
    assert not budget.withdraw()
    budget.requested(1)
    assert budget.tokens == 0
    for _ in range(5 * 10):
        budget.answered()
    assert budget.tokens == pytest.approx(10)


@given(st.lists(st.integers(0, 100) | st.sampled_from(["withdraw", "answered"]), max_size=100))
def test_budget_debt_stays_within_bounds(steps):
    budget = RetryBudget()
    for step in steps:
        before = budget.tokens
        if step == "withdraw":
            assert budget.withdraw() is (before >= 1)
        elif step == "answered":
            budget.answered()
        else:
            budget.requested(step)
            assert budget.tokens <= max(10.0, step)
        assert 0 <= budget.owed <= budget.depth


@pytest.mark.parametrize(
    ("status", "has_body", "outcome"),
    [
        (200, True, Outcome.ANSWERED),
        (204, False, Outcome.ANSWERED),
        (400, True, Outcome.ANSWERED),
        (401, True, Outcome.ANSWERED),
        (404, True, Outcome.ANSWERED),
        (408, True, Outcome.ANSWERED),
        (422, True, Outcome.ANSWERED),
        (499, True, Outcome.ANSWERED),
        (501, True, Outcome.ANSWERED),
        (505, True, Outcome.ANSWERED),
        (429, True, Outcome.FULL),
        (503, True, Outcome.FULL),
        (503, False, Outcome.SERVER_ERROR),
        (500, True, Outcome.SERVER_ERROR),
        (502, True, Outcome.SERVER_ERROR),
        (504, False, Outcome.SERVER_ERROR),
    ],
)
def test_classify_status_returns_outcome(status, has_body, outcome):
    assert classify_status(status, has_body) is outcome


def test_classify_status_429_for_client_key_is_not_servers():
    assert classify_status(429, True, own_key=True) is Outcome.LIMITED
    assert classify_status(503, True, own_key=True) is Outcome.FULL
    assert not RULES[Outcome.LIMITED].counts_against_server
    assert after(Outcome.LIMITED, tokens=1.0) is ELSEWHERE
    assert after(Outcome.LIMITED, tokens=0.0) is NO
