"""What each event changes in a server, and which events the fleet hears of."""

from __future__ import annotations

import math

import pytest

from support.fleet_makers import detail, eject, gauges, make_config, shown_state
from support.watched_server import NEVER, Watched, watched
from vllm_router.fleet.refusals import FORGET_AFTER, RequestKind
from vllm_router.fleet.server import (
    ChangeLog,
    Server,
)
from vllm_router.fleet.state import State


def logged(server: Server) -> int:
    return len(server.change_log.servers)


# -- configuration -----------------------------------------------------------------------------


def test_server_new_has_nothing_known():
    server = Watched(weight=2.5, max_in_flight=3)
    assert (server.capacity, server.weighted_capacity, server.cap) == (4, 10.0, 3)
    assert (server.in_flight, server.served, server.restarts, server.leases) == (0, 0, 0, set())
    assert (server.joined, server.draining, server.at_cap) == (False, False, False)
    assert (server.last_byte_at, server.recovered_at, server.went_down_at) == (NEVER, NEVER, NEVER)
    assert (server.backoff_until, server.checked_at, server.state_since) == (0.0, None, 0.0)
    assert (server.state, server.state_reason.text) == (State.UNKNOWN, "not probed yet")
    assert shown_state(server, 0.0) == (State.UNKNOWN, "not probed yet")
    assert server.usable is False
    assert repr(server) == "<Server a unknown 0/4>"
    assert Watched().cap == math.inf
    assert server.load_estimate.weighted_capacity == 10.0


def test_server_at_cap_gets_no_other_request():
    server = watched(max_in_flight=2)
    first = server.lease(1.0)
    assert server.at_cap is False
    server.lease(1.0)
    assert server.at_cap is True
    first.release()
    assert server.at_cap is False


@pytest.mark.parametrize(
    ("then", "kept"),
    [({}, True), ({"weight": 2.0}, True), ({"api_key": "k"}, False), ({"models": ["m"]}, False)],
)
def test_server_new_configuration_clears_refusals_that_it_may_end(then, kept):
    server = watched()
    server.accepted_elsewhere("/v1/x", 0, "404", 1.0, body=1, sure=True)
    server.reported()
    other = Watched(health_check_rise=7, slow_start=3, metrics_interval=2, **then)
    settings = make_config(1, health_check_rise=7, slow_start=3, metrics_interval=2).settings
    old = server.config
    server.apply(other.config, settings)
    assert server.reported()
    assert bool(server.refusals.known) is kept
    assert (server.config is old) is (then == {})
    assert (
        server.weighted_capacity
        == server.load_estimate.weighted_capacity
        == other.capacity * (then.get("weight", 1.0))
    )
    assert server.active_health.rules.rise == server.passive_health.rules.rise == 7
    assert (server.load_estimate.slow_start, server.load_estimate.stale_after) == (3, 6)
    assert logged(server) == 1


def test_server_without_active_checks_is_trusted_at_once_and_after_a_reload():
    server = Watched(enable_active_health_check=False)
    assert (server.usable, server.active_health.reason.text) == (True, "")
    server = Watched()
    assert server.usable is False
    server.apply(server.config, make_config(1, enable_active_health_check=False).settings)
    assert (server.usable, server.active_health.reason.text) == (True, "")


# -- leases ------------------------------------------------------------------------------------


def test_lease_is_counted_until_it_is_released():
    server = watched()
    lease = server.lease(3.0)
    assert server.leases == {lease}
    assert (lease.taken_at, lease.last_byte_at) == (3.0, 3.0)
    assert (lease.trial, lease.committed) == (False, False)
    assert (lease.interrupt, lease.reservation) == (None, None)
    assert (server.in_flight, server.running, logged(server)) == (1, 1, 1)
    lease.release()
    assert (server.in_flight, server.served, server.leases, logged(server)) == (0, 1, set(), 2)
    assert server.running == 0
    assert not server.reported()


@pytest.mark.parametrize(
    ("committed", "last_byte", "output"),
    [(True, 5.0, 5.0), (True, 3.0, 4.0), (False, 5.0, 4.0)],
)
def test_lease_end_dates_output_of_committed_responses(committed, last_byte, output):
    server = watched()
    server.activity.output_at = 4.0
    lease = server.lease(1.0)
    lease.committed, lease.last_byte_at = committed, last_byte
    lease.release()
    assert server.activity.output_at == output


def test_lease_of_ejected_server_is_a_trial_until_it_ends():
    server = watched()
    eject(server, 1.0)
    assert server.reported()
    lease = server.lease(20.0)
    assert lease.trial is True
    assert server.reported()
    assert server.passive_health.trial is True
    lease.release()
    assert server.reported()
    assert server.passive_health.trial is False


def test_lease_of_silent_server_is_a_trial_once_one_is_due():
    server = watched(auto_recovery_threshold=5)
    server.silence.suspect(0.0, 1.0, detail("why"), 5.0)
    early = server.lease(5.9)
    assert (early.trial, server.reported()) == (False, False)
    trial = server.lease(6.0)
    assert (trial.trial, server.reported(), server.silence.trial) == (True, True, True)
    early.release()
    assert (server.reported(), server.silence.trial) == (False, True)
    trial.release()
    assert (server.reported(), server.silence.trial) == (True, False)


def test_lease_trial_whose_result_is_known_changes_nothing_at_its_end():
    server = watched()
    eject(server, 1.0)
    trial = server.lease(20.0)
    server.answered(21.0, trial=True)
    server.reported()
    trial.release()
    assert not server.reported()


def test_change_log_begins_anew_only_beyond_its_limit():
    server = watched()
    seen = server.change_log.servers
    for _ in range(ChangeLog.MAX_LENGTH):
        server.mark_changed()
    assert server.change_log.servers is seen
    assert len(seen) == ChangeLog.MAX_LENGTH
    server.mark_changed()
    assert server.change_log.servers == []
    seen = server.change_log.servers
    for _ in range(ChangeLog.MAX_LENGTH // 2):
        server.lease(1.0).release()
    assert server.change_log.servers is seen
    server.lease(1.0)
    assert server.change_log.servers == []


# -- load --------------------------------------------------------------------------------------


def test_server_advance_updates_the_load_while_it_changes():
    server = watched(slow_start=10)
    server.recovered_at = 100.0
    assert server.advance(105.0) is True
    assert server.load_estimate.effective == pytest.approx(1 / 2 - 1 / 4)
    assert server.advance(110.0) is False
    assert server.load_estimate.effective == 0.0


def test_server_fast_error_is_logged_only_with_a_penalty():
    server = watched()
    server.record_fast_error(1.0, 5.0, 0.0)
    assert logged(server) == 0
    server.record_fast_error(1.0, 0.0, 0.0)
    assert logged(server) == 1
    assert server.load_estimate.effective == pytest.approx(0.25)


def test_scrape_with_lower_counters_is_a_new_process():
    server = watched()
    server.accepted_elsewhere("/v1/x", 0, "404", 1.0, body=1, sure=True)
    server.silence.suspect(0.0, 1.0, detail("why"), 5.0)
    server.load_estimate.stuck = 1.0
    server.scraped(gauges(1, prompt_tokens=9), 2.0, 0)
    assert (server.restarts, server.recovered_at) == (0, NEVER)
    assert server.refusals.known
    server.reported()
    server.scraped(gauges(1, prompt_tokens=3), 4.0, 0)
    assert (server.restarts, server.recovered_at, server.went_down_at) == (1, 4.0, 4.0)
    assert (server.refusals.known, server.silence.since) == ({}, None)
    assert server.load_estimate.stuck == 0.0
    assert server.reported()
    server.scraped(gauges(1, prompt_tokens=1), 5.0, 0)
    assert server.restarts == 2


def test_scrape_reports_only_sleep_and_waking():
    server = watched()
    server.scraped(gauges(1, 2), 1.0, 3)
    assert not server.reported()
    assert (server.load_estimate.leases_at_scrape, logged(server)) == (3, 1)
    for asleep, reported in ((True, True), (True, False), (False, True), (False, False)):
        server.scraped(gauges(0, asleep=asleep), 2.0, 0)
        assert server.reported() is reported
        assert server.asleep is asleep


def test_scrape_with_work_ends_a_pause():
    server = watched()
    server.pause(on=True, now=1.0)
    server.scraped(gauges(1, prompt_tokens=1), 2.0, 0)
    server.reported()
    server.scraped(gauges(1, prompt_tokens=1), 3.0, 0)
    assert server.paused_at == 1.0
    assert not server.reported()
    server.scraped(gauges(1, prompt_tokens=2), 4.0, 0)
    assert server.paused_at is None
    assert server.recovered_at == 4.0
    assert server.reported()


def test_pause_and_resume_are_reported_once():
    server = watched()
    for on, reported in ((False, False), (True, True), (True, False), (False, True)):
        server.pause(on=on, now=5.0)
        assert server.reported() is reported
        assert server.recovered_at == (5.0 if not on and reported else NEVER)


def test_expire_reports_ended_refusals_only():
    server = watched()
    server.expire(10_000.0)
    assert not server.reported()
    server.accepted_elsewhere("/v1/x", 0, "404", 0.0, body=1, sure=True)
    server.reported()
    server.expire(FORGET_AFTER)
    assert not server.reported()
    server.expire(6.0 + FORGET_AFTER)
    assert server.reported()
    assert not server.refusals.known


def test_expire_drops_metrics_older_than_allowed():
    server = watched(metrics_interval=1)
    server.scraped(gauges(5), 10.0, 0)
    server.expire(13.0)
    assert server.load_estimate.fresh is True
    server.expire(13.1)
    assert server.load_estimate.fresh is False
    count = logged(server)
    server.expire(20.0)
    assert logged(server) == count


# -- models and refusals -----------------------------------------------------------------------


def test_server_model_list_reports_changes():
    server = watched()
    server.listed({"m": {"id": "m"}}, 1.0)
    assert not server.reported()
    server.listed({"m": {"id": "m", "max_model_len": 8}}, 1.0)
    assert server.reported()
    assert (server.models, server.lengths) == (("m",), {"m": 8})
    assert server.unlist("other") is False
    assert not server.reported()
    assert server.unlist("m") is True
    assert server.reported()
    assert server.models == ()


def test_server_model_list_ends_refusals_of_models():
    server = Watched(models=["m"])
    server.listed({"m": {"id": "m"}}, 1.0)
    server.accepted_elsewhere("model m", 0, "404", 1.0, body=1, sure=True)
    server.reported()
    server.listed({"m": {"id": "m"}}, 2.0)
    assert not server.reported()
    server.listed({}, 3.0)
    assert server.reported()
    assert not server.refusals.known


def test_server_refusals_report_each_change_once():
    server = watched(auto_recovery_threshold=5)
    asked = RequestKind("/v1/x", "m", 10)
    server.accepted_elsewhere("/v1/x", 0, "403", 0.0, body=1, sure=False)
    assert not server.reported()
    server.accepted_elsewhere("/v1/x", 0, "404", 0.0, body=1, sure=True)
    assert server.reported()
    assert server.refusals.moments() == [5.0]
    server.refused_again("/v1/x", 4.0)
    assert not server.reported()
    server.refused_again("/v1/x", 5.0)
    assert server.reported()
    assert server.refusals.moments() == [15.0]
    assert server.current_state(6.0)[0] is State.REFUSING
    server.accepted(RequestKind("/v1/y", "m", 10))
    assert not server.reported()
    server.accepted(asked)
    assert server.reported()
    assert server.current_state(6.0)[0] is State.UP


@pytest.mark.parametrize(
    ("length", "model", "tokens", "longer_than", "fits"),
    [
        (None, "m", 10_000, 0, True),
        (100, "m", 100, 0, True),
        (100, "m", 101, 0, False),
        (100, "other", 101, 0, True),
        (100, None, 101, 0, True),
        (100, "m", 0, 99, True),
        (100, "m", 0, 100, False),
        (None, "m", 0, 1, False),
        (100, None, 0, 1, False),
    ],
)
def test_server_fits_by_context_length(length, model, tokens, longer_than, fits):
    server = watched()
    server.listed({"m": {"id": "m", **({"max_model_len": length} if length else {})}}, 1.0)
    assert server.fits(RequestKind("/v1/x", model, 10), 1.0, tokens, longer_than) is fits
    server.accepted_elsewhere("/v1/x", 0, "404", 1.0, body=1, sure=True)
    assert server.fits(RequestKind("/v1/x", model, 10), 2.0, tokens, longer_than) is False
