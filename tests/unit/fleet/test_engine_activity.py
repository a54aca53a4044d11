"""Silence, stand-still and signs of work of one engine, driven with numbers as time."""

from __future__ import annotations

import math

import pytest

from support.fleet_makers import detail, gauges
from vllm_router.fleet.engine_activity import EngineActivity
from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.load import LoadEstimate
from vllm_router.fleet.reason import NONE
from vllm_router.fleet.silence import LONGEST, STILL_FOR, Silence, StandStill

# -- the suspicion ---------------------------------------------------------------------------------


def test_silence_new_has_no_suspicion_and_no_trial():
    silence = Silence()
    assert (silence.since, silence.reason.text, silence.trial) == (None, "", False)
    assert silence.admits(0.0) is True
    assert silence.start_trial(100.0) is False
    assert silence.trial is False
    assert silence.clear() is False


def test_silence_second_suspicion_counts_only_once_a_trial_is_due():
    silence = Silence()
    assert silence.suspect(1.0, 2.0, detail("first"), 5.0) is True
    assert silence.suspect(2.0, 6.9, detail("second"), 5.0) is False
    assert (silence.since, silence.until, silence.reason.text) == (1.0, 7.0, "first")
    assert silence.suspect(3.0, 7.0, detail("second"), 5.0) is True
    assert (silence.since, silence.until, silence.reason.text) == (1.0, 17.0, "second")


def test_silence_hold_grows_up_to_longest_or_to_longer_first_hold():
    for hold, last in ((5.0, LONGEST), (90.0, 90.0)):
        silence, now = Silence(), 0.0
        for _ in range(20):
            silence.suspect(0.0, now, NONE, hold)
            lasted, now = silence.until - now, silence.until
        assert lasted == last


def test_silence_trial_starts_only_when_due_and_blocks_others():
    silence = Silence()
    silence.suspect(0.0, 0.0, NONE, 5.0)
    assert silence.start_trial(4.9) is False
    assert silence.trial is False
    assert silence.admits(4.9) is False
    assert silence.admits(5.0) is True
    assert silence.start_trial(5.0) is True
    assert silence.admits(5.0) is False
    silence.suspect(0.0, 6.0, detail("the trial stayed silent"), 5.0)
    assert silence.trial is False


def test_silence_cleared_forgets_rounds_trial_and_reason():
    silence = Silence()
    silence.suspect(0.0, 0.0, NONE, 5.0)
    silence.suspect(0.0, 5.0, detail("why"), 5.0)
    silence.start_trial(15.0)
    assert silence.clear() is True
    assert (silence.since, silence.trial, silence.reason.text) == (None, False, "")
    # Before the trial of the old suspicion was due: a new one begins all the same.
    assert silence.suspect(11.0, 12.0, NONE, 5.0) is True
    assert (silence.since, silence.until) == (11.0, 17.0)


def test_stand_still_lasts_from_first_scrape_until_reset():
    still = StandStill()
    assert still.lasts(10.0, 0.0, (1.0, 0.0), own=False) == 0.0
    assert still.lasts(13.0, 10.0, (1.0, 0.0), own=False) == 3.0
    still.reset()
    assert still.lasts(14.0, 0.0, (1.0, 0.0), own=False) == 0.0


@pytest.mark.parametrize(
    ("life", "gauges_then", "own", "lasts"),
    [
        (10.5, (1.0, 0.0), True, 0.0),  # the engine has worked since
        (10.0, (2.0, 0.0), False, 0.0),  # other clients come and go
        (10.0, (2.0, 0.0), True, 3.0),  # our own requests move the gauges
        (10.0, (1.0, 0.0), True, 3.0),
    ],
)
def test_stand_still_ends_with_work_or_with_others_gauges(life, gauges_then, own, lasts):
    still = StandStill()
    still.lasts(10.0, 0.0, (1.0, 0.0), own=own)
    assert still.lasts(13.0, life, gauges_then, own=own) == lasts
    assert still.lasts(14.0, life, gauges_then, own=own) == lasts + 1.0


# -- progress and pauses ---------------------------------------------------------------------------


def scraped(metrics: EngineMetrics, at: float) -> LoadEstimate:
    load = LoadEstimate()
    load.take_scrape(metrics, at, 0)
    return load


def test_activity_first_scrape_shows_no_progress():
    activity, load = EngineActivity(), LoadEstimate()
    assert activity.note_progress(gauges(1, prompt_tokens=5), load) is False
    load.scraped_at = 1.0
    assert activity.note_progress(gauges(1, prompt_tokens=5), load) is False
    load.metrics, load.scraped_at = gauges(1, prompt_tokens=4), None
    assert activity.note_progress(gauges(1, prompt_tokens=5), load) is False
    assert activity.progress_at == activity.life_at == -math.inf


def test_activity_progress_is_dated_at_the_earlier_scrape():
    activity = EngineActivity()
    load = scraped(gauges(1, prompt_tokens=4), 3.0)
    assert activity.note_progress(gauges(1, prompt_tokens=4), load) is False
    assert activity.progress_at == -math.inf
    assert activity.note_progress(EngineMetrics(prompt_tokens=5), load) is False
    assert activity.progress_at == -math.inf
    assert activity.note_progress(gauges(1, prompt_tokens=5), load) is False
    assert activity.progress_at == 3.0
    activity.output_at = 2.0
    assert activity.life_at == 3.0
    activity.output_at = 4.0
    assert activity.life_at == 4.0


@pytest.mark.parametrize(("paused_at", "works"), [(2.9, True), (3.0, False), (3.1, False)])
def test_activity_paused_engine_works_again_only_after_the_pause(paused_at, works):
    activity = EngineActivity()
    activity.pause(on=True, now=paused_at)
    load = scraped(gauges(1, prompt_tokens=4), 3.0)
    assert activity.note_progress(gauges(1, prompt_tokens=5), load) is works


def test_activity_pause_is_a_change_once_and_resume_ends_silence():
    activity = EngineActivity()
    assert activity.pause(on=False, now=1.0) is False
    assert activity.pause(on=True, now=2.0) is True
    assert activity.pause(on=True, now=3.0) is False
    assert activity.paused_at == 2.0
    activity.silence.suspect(0.0, 3.0, NONE, 5.0)
    assert activity.pause(on=False, now=4.0) is True
    assert activity.paused_at is None
    assert activity.silence.since is None
    activity.silence.suspect(0.0, 5.0, NONE, 5.0)
    activity.pause(on=True, now=6.0)
    assert activity.silence.since == 0.0
    activity.reset()
    assert (activity.silence.since, activity.paused_at) == (None, None)


# -- counters that stand still -----------------------------------------------------------------


def still_after(activity: EngineActivity, load: LoadEstimate, *, own: bool, seconds: float) -> bool:
    assert activity.stands_still(load, 100.0, own=own) is False
    return activity.stands_still(load, 100.0 + seconds, own=own)


WORKING = gauges(2, 1, prompt_tokens=4)


@pytest.mark.parametrize(
    ("metrics", "own", "still"),
    [
        (WORKING, True, True),
        (WORKING, False, True),
        (gauges(0, 1, prompt_tokens=4), False, True),
        (gauges(1, 0, prompt_tokens=4), False, True),
        (gauges(1, None, prompt_tokens=4), False, True),
        (gauges(0, 0, prompt_tokens=4), True, True),
        (gauges(0, 0, prompt_tokens=4), False, False),  # idle
        (gauges(0, None, prompt_tokens=4), False, False),
        (EngineMetrics(prompt_tokens=4), True, False),  # no load on the page
        (gauges(2, 1), True, False),  # no counters
        (gauges(2, 1, prompt_tokens=4, asleep=True), True, False),
    ],
)
def test_activity_stands_still_only_with_requests_and_counters(metrics, own, still):
    load = scraped(metrics, 100.0)
    assert still_after(EngineActivity(), load, own=own, seconds=STILL_FOR) is still
    assert still_after(EngineActivity(), load, own=own, seconds=STILL_FOR - 0.1) is False


def test_activity_load_that_is_stuck_is_no_request():
    load = scraped(WORKING, 100.0)
    load.stuck = 3.0
    assert still_after(EngineActivity(), load, own=False, seconds=20.0) is False
    assert still_after(EngineActivity(), load, own=True, seconds=20.0) is True
    load.stuck = 2.0
    assert still_after(EngineActivity(), load, own=False, seconds=20.0) is True


def test_activity_without_scrape_or_while_paused_does_not_stand_still():
    assert still_after(EngineActivity(), LoadEstimate(), own=True, seconds=20.0) is False
    activity = EngineActivity()
    activity.pause(on=True, now=90.0)
    assert still_after(activity, scraped(WORKING, 100.0), own=True, seconds=20.0) is False


@pytest.mark.parametrize("gap", ["old metrics", "idle"])
def test_activity_stand_still_begins_anew_after_a_gap(gap):
    activity, load = EngineActivity(), scraped(WORKING, 100.0)
    assert activity.stands_still(load, 100.0, own=False) is False
    if gap == "old metrics":
        load.fresh = False
    else:
        load.take_scrape(gauges(0, 0, prompt_tokens=4), 105.0, 0)
    assert activity.stands_still(load, 105.0, own=False) is False
    assert activity.stands_still(load, 111.0, own=False) is False
    load.take_scrape(WORKING, 112.0, 0)
    assert activity.stands_still(load, 112.0, own=False) is False
    assert activity.stands_still(load, 121.9, own=False) is False
    assert activity.stands_still(load, 122.0, own=False) is True
