"""What checks, results of requests and silence change in a server."""

from __future__ import annotations

import pytest

from support.fleet_makers import come_up, detail, eject, gauges, go_down, shown_state
from support.watched_server import NEVER, Watched, watched
from vllm_router.fleet.active_health import Check
from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.server import (
    CHECK_BACKOFF,
    FLOW_SECONDS,
    MAX_FLOW_SECONDS,
    Lease,
    Server,
)
from vllm_router.fleet.silence import LEFT_AFTER, STILL_FOR, TRIAL_PATIENCE
from vllm_router.fleet.state import State

# -- checks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "response_seconds", "flows"),
    [
        (FLOW_SECONDS, 0.0, True),
        (FLOW_SECONDS + 0.1, 0.0, False),
        (20.0, 10.0, True),
        (20.1, 10.0, False),
        (MAX_FLOW_SECONDS, 100.0, True),
        (MAX_FLOW_SECONDS + 0.1, 100.0, False),
    ],
)
@pytest.mark.parametrize("sign", ["bytes", "counters"])
def test_check_answered_busy_means_full_while_responses_flow(age, response_seconds, flows, sign):
    server = watched(health_check_consecutive_failures=1)
    server.load_estimate.response_seconds = response_seconds
    if sign == "bytes":
        server.last_byte_at = 100.0
    else:
        server.activity.progress_at = 100.0
    now = 100.0 + age
    assert server.checked(Check.BUSY, 0.1, now) is not flows
    assert server.usable is flows
    assert server.backoff_until == (now + CHECK_BACKOFF if flows else 0.0)


def test_check_answered_busy_is_a_failure_after_a_failed_request():
    server = watched(health_check_consecutive_failures=1)
    server.last_byte_at = 100.0
    server.failed(100.0, trial=False, jitter=1.0)
    assert server.checked(Check.BUSY, 0.1, 100.0) is True


def test_check_timeout_counts_unless_bytes_came_since_the_one_before():
    server = watched(now=9.0, health_check_consecutive_failures=1)
    server.checked(Check.GOOD, 1.0, 10.0)
    server.last_byte_at = 9.0
    assert server.checked(Check.TIMEOUT, 2.0, 12.0, detail("slow")) is False
    assert (server.usable, server.checked_at) == (True, 12.0)
    server.last_byte_at = 9.9
    assert server.checked(Check.TIMEOUT, 2.0, 14.0, detail("slow")) is True
    assert (server.usable, server.went_down_at) == (False, 14.0)
    assert shown_state(server, 14.0) == (State.DOWN, "slow (1 checks in a row)")


def test_check_first_one_that_times_out_takes_server_down():
    server = Watched()
    assert server.checked(Check.TIMEOUT, 2.0, 2.0, detail("slow")) is True
    assert shown_state(server, 2.0) == (State.DOWN, "slow")


def test_scrape_before_the_first_check_changes_nothing():
    server = Watched()
    assert server.scrape_reached(True, 1.0) is False
    assert not server.reported()
    assert server.state is State.UNKNOWN


def test_check_that_takes_server_down_reports_and_its_return_clears():
    server = watched(health_check_rise=1)
    server.refused(1.0, 100.0)
    server.accepted_elsewhere("/v1/x", 0, "404", 1.0, body=1, sure=True)
    eject(server, 1.0)
    server.reported()
    assert server.checked(Check.GOOD, 0.1, 1.5) is False
    assert not server.reported()
    assert server.scrape_reached(True, 1.6) is False
    assert not server.reported()
    assert [server.scrape_reached(False, 2.0, detail("refused")) for _ in range(3)] == [
        False,
        False,
        True,
    ]
    assert server.reported()
    assert server.went_down_at == 2.0
    assert shown_state(server, 2.0) == (State.DOWN, "refused (3 checks in a row)")
    assert server.backoff_until == 101.0
    assert server.checked(Check.GOOD, 0.1, 3.0) is False
    assert server.reported()
    assert (server.usable, server.backoff_until, server.recovered_at) == (True, 0.0, 3.0)
    assert server.passive_health.ejected is False
    assert not server.refusals.known


@pytest.mark.parametrize(("metrics", "restarts"), [(True, 0), (False, 1)])
def test_check_return_is_taken_for_a_restart_without_metrics(metrics, restarts):
    server = watched(health_check_rise=1)
    if metrics:
        server.scraped(gauges(0), 1.0, 0)
    go_down(server, 2.0)
    come_up(server, 3.0)
    assert (server.restarts, server.recovered_at) == (restarts, 3.0)


def test_check_first_one_is_no_return():
    server = watched(now=5.0)
    assert (server.recovered_at, server.went_down_at, server.restarts) == (NEVER, NEVER, 0)


def test_check_of_damped_server_reports_each_time_until_it_fails():
    server = watched(health_check_rise=1)
    for now in (1.0, 2.0):
        go_down(server, now)
        server.reported()
        server.checked(Check.GOOD, 0.1, now)
        assert server.reported()
    assert server.damped is True
    server.checked(Check.GOOD, 0.1, 2.1)
    assert server.reported()
    server.drain(on=True)
    assert server.damped is False
    server.drain(on=False)
    assert server.damped is True
    server.reported()
    server.checked(Check.UNHEALTHY, 0.1, 2.2)
    assert server.reported()
    assert server.damped is False
    server.checked(Check.UNHEALTHY, 0.1, 2.3)
    assert not server.reported()


# -- results of requests -----------------------------------------------------------------------


def test_answer_dates_the_last_byte_and_does_not_date_it_back():
    server = watched()
    server.answered(5.0, trial=False)
    server.answered(4.0, trial=False)
    assert (server.last_byte_at, server.recovered_at) == (5.0, NEVER)
    assert not server.reported()


def test_answer_to_a_trial_ends_ejection():
    server = watched()
    eject(server, 1.0)
    server.reported()
    server.answered(8.0, trial=False)
    assert (server.passive_health.ejected, server.reported()) == (True, False)
    server.answered(9.0, trial=True)
    assert (server.passive_health.ejected, server.reported(), server.recovered_at) == (
        False,
        True,
        9.0,
    )


def test_answer_ends_silence_only_with_output_since_its_start():
    server = watched()
    server.silence.suspect(4.0, 5.0, detail("why"), 5.0)
    server.activity.output_at = 4.0
    server.answered(6.0, trial=False)
    assert server.silence.since == 4.0
    assert not server.reported()
    server.activity.output_at = 4.1
    server.answered(7.0, trial=False)
    assert (server.silence.since, server.recovered_at) == (None, 7.0)
    assert server.reported()


def test_failures_eject_by_their_properties():
    server = watched(failure_threshold=2, auto_recovery_threshold=5)
    for _ in range(3):
        server.failed(1.0, trial=False, jitter=1.0, body=1)
    server.failed(1.0, trial=False, jitter=1.0, body=2, odd=True)
    server.failed(1.0, trial=False, jitter=1.0, body=3, allowed=False)
    assert not server.passive_health.ejected
    assert not server.reported()
    server.answered_elsewhere(9, 1.0, jitter=1.0, allowed=True)
    server.answered_elsewhere(3, 1.0, jitter=1.0, allowed=False)
    assert not server.reported()
    server.failed(2.0, trial=False, jitter=1.2, body=4)
    assert server.reported()
    assert server.passive_health.until == pytest.approx(8.0)
    server.failed(8.0, trial=True, jitter=1.0)
    assert server.passive_health.until == 18.0


def test_failures_answered_elsewhere_eject():
    server = watched(failure_threshold=2)
    for _ in range(2):
        server.failed(1.0, trial=False, jitter=1.0, body=1)
    server.answered_elsewhere(1, 1.0, jitter=1.0, allowed=True)
    assert server.reported()
    assert server.passive_health.ejected


def test_eject_and_drain_are_reported():
    server = watched()
    server.eject(1.0, 1.0, detail("test"))
    assert server.reported()
    assert shown_state(server, 1.0) == (State.EJECTED, "test")
    server.lease(1.0)
    server.drain(on=True)
    assert server.reported()
    assert shown_state(server, 1.0) == (State.DRAINING, "draining, 1 in flight")
    server.drain(on=False)
    assert server.reported()


# -- silence -----------------------------------------------------------------------------------


def leased(server: Server, last_byte: float, *, committed: bool) -> Lease:
    lease = server.lease(0.0)
    lease.last_byte_at, lease.committed = last_byte, committed
    return lease


def test_output_is_from_committed_leases_or_finished_ones():
    server = watched()
    assert server.last_output() == NEVER
    server.activity.output_at = 3.0
    leased(server, 9.0, committed=False)
    assert server.last_output() == 3.0
    leased(server, 5.0, committed=True)
    leased(server, 4.0, committed=True)
    assert server.last_output() == 5.0
    assert (server.output_since(4.9), server.output_since(5.0)) == (True, False)
    server.activity.progress_at = 6.0
    assert (server.output_since(5.9), server.output_since(6.0)) == (True, False)


def test_starved_request_makes_server_silent_unless_another_had_output():
    server = watched(auto_recovery_threshold=5)
    server.activity.output_at = 2.0
    server.request_starved(1.9, 4.0, detail("why"))
    assert (server.silence.since, server.reported()) == (None, False)
    server.request_starved(2.0, 4.0, detail("why"))
    assert (server.silence.since, server.silence.until, server.reported()) == (2.0, 9.0, True)
    assert shown_state(server, 4.0) == (State.SILENT, "why")
    server.request_starved(2.0, 5.0, detail("why"))
    assert not server.reported()


@pytest.mark.parametrize(
    ("first_token", "response", "stream", "needed"),
    [
        (0.0, 0.0, True, LEFT_AFTER),
        (0.0, 9.0, True, LEFT_AFTER),
        (2.0, 9.0, True, 6.0),
        (2.0, 0.5, False, LEFT_AFTER),
        (2.0, 9.0, False, 9.0),
    ],
)
def test_evidence_is_a_longer_wait_than_usual(first_token, response, stream, needed):
    server = watched()
    server.load_estimate.first_token_seconds = first_token
    server.load_estimate.response_seconds = response
    assert server.is_evidence(needed, stream=stream) is True
    assert server.is_evidence(needed - 0.01, stream=stream) is False


def test_trial_patience_is_twice_the_usual_response_time():
    server = watched()
    assert server.trial_patience() == TRIAL_PATIENCE
    server.load_estimate.response_seconds = 3.0
    assert server.trial_patience() == 6.0


def watch(server: Server, seconds: float, page: EngineMetrics, start: float = 100.0) -> None:
    for now in (start, start + seconds):
        server.scraped(page, now, server.in_flight)
        server.look_for_silence(now)


def test_stand_still_with_own_requests_is_silence():
    server = watched(auto_recovery_threshold=5)
    server.lease(99.0)
    watch(server, STILL_FOR, gauges(1, prompt_tokens=5))
    assert (server.silence.since, server.silence.until) == (100.0, 115.0)
    assert server.silence.reason.text == "no token for 10 s while 1 requests wait on it"
    assert server.load_estimate.stuck == 0.0
    assert server.reported()


def test_stand_still_without_own_requests_makes_gauges_stuck_until_they_fall():
    server = watched(auto_recovery_threshold=5)
    watch(server, STILL_FOR, gauges(2, 1, prompt_tokens=5))
    assert (server.silence.since, server.silence.until) == (100.0, 110.0)
    assert server.silence.reason.text == "its load stands still at 3"
    assert (server.load_estimate.stuck, server.load) == (3.0, 0.0)
    assert server.reported()
    server.scraped(gauges(1, 1, prompt_tokens=5), 111.0, 0)
    server.look_for_silence(111.0)
    assert (server.load_estimate.stuck, server.load) == (2.0, 0.0)
    server.scraped(gauges(2, 2, prompt_tokens=5), 112.0, 0)
    server.look_for_silence(112.0)
    assert server.load_estimate.stuck == 2.0


@pytest.mark.parametrize("page", [gauges(2), EngineMetrics(), None])
def test_stand_still_of_server_without_counters_is_not_judged(page):
    server = watched()
    if page is not None:
        watch(server, 50.0, page)
    server.look_for_silence(160.0)
    assert server.silence.since is None
    assert not server.reported()


def test_stand_still_with_metrics_out_of_date_keeps_stuck_requests():
    server = watched(metrics_interval=1)
    server.load_estimate.stuck = 5.0
    server.scraped(gauges(1, prompt_tokens=5), 1.0, 0)
    server.expire(9.0)
    server.look_for_silence(9.0)
    assert server.load_estimate.stuck == 5.0


def test_silence_ends_on_a_scrape_interval_with_output():
    server = watched()
    server.silence.suspect(4.0, 5.0, detail("why"), 5.0)
    server.look_for_silence(6.0)
    assert server.silence.since == 4.0
    assert not server.reported()
    server.activity.output_at = 6.0
    server.look_for_silence(7.0)
    assert (server.silence.since, server.recovered_at) == (None, 7.0)
    assert server.reported()


# -- state -------------------------------------------------------------------------------------


def test_state_of_paused_silent_and_full_server_has_reasons():
    server = watched()
    server.refused(1.0, 5.0)
    assert server.reported()
    assert shown_state(server, 5.9) == (State.FULL, "it refused a request as too busy")
    assert shown_state(server, 6.0) == (State.UP, "")
    server.pause(on=True, now=1.0)
    assert shown_state(server, 1.0) == (
        State.PAUSED,
        "its engine was paused through the router: POST /resume",
    )
    server.scraped(gauges(0, asleep=True), 2.0, 0)
    assert shown_state(server, 2.0) == (State.ASLEEP, "the engine sleeps")


@pytest.mark.parametrize(("joined", "recovered"), [(False, NEVER), (True, 3.0)])
def test_state_of_joined_server_starts_slowly_when_first_known(joined, recovered):
    server = Watched()
    server.joined = joined
    come_up(server, 3.0)
    change = server.update_state(3.0)
    assert change is not None
    assert (change.server, change.old, change.new, change.reason.text) == (
        *("a", State.UNKNOWN, State.UP),
        "",
    )
    assert (server.recovered_at, server.state_since, server.state) == (recovered, 3.0, State.UP)
    server.refused(4.0, 9.0)
    server.update_state(5.0)
    assert (server.recovered_at, server.state_since) == (recovered, 5.0)
    assert server.state_reason.text == "it refused a request as too busy"


def test_state_after_sleep_starts_slowly():
    server = watched()
    server.scraped(gauges(0, asleep=True), 2.0, 0)
    server.update_state(2.0)
    assert (server.state, server.recovered_at) == (State.ASLEEP, NEVER)
    server.scraped(gauges(0), 3.0, 0)
    server.update_state(4.0)
    assert (server.state, server.recovered_at) == (State.UP, 4.0)
