"""Requests that a server refuses and others accept.

When a refusal is believed, and when it ends.
"""

from __future__ import annotations

import pytest

from support.fleet_makers import come_up, go_down, make_config, make_fleet
from vllm_router.fleet.refusals import DOUBTS, FORGET_AFTER, MAX_REFUSALS, Refusals, RequestKind
from vllm_router.fleet.state import State

ROUTE = "/v1/responses"


def asked(size: int = 100, path: str = ROUTE, model: str | None = "m") -> RequestKind:
    return RequestKind(path, model, size)


def refuse(refusals: Refusals, now: float, *, name: str = ROUTE, size: int = 0, body: int = 1):
    return refusals.refused(name, size, "404", now, hold=5.0, body=body, sure=True)


def doubt(refusals: Refusals, now: float, body: int) -> bool:
    return refusals.refused(ROUTE, 0, "403", now, hold=5.0, body=body, sure=False)


def test_refusals_certain_refusal_covers_its_route_for_a_time():
    refusals = Refusals()
    assert refuse(refusals, 10.0)
    assert refusals.refuses(asked(), 10.0)
    assert not refusals.refuses(asked(path="/v1/completions"), 10.0)
    assert refusals.refuses(asked(), 14.9)
    assert not refusals.refuses(asked(), 15.0)
    assert refusals.reason().text == "refuses /v1/responses, which other servers accept: 404"


def test_refusals_failed_probation_lasts_longer_up_to_a_minute():
    refusals = Refusals()
    refuse(refusals, 0.0)
    now, holds = 5.0, []
    for _ in range(15):
        assert refusals.refused_again(ROUTE, now, hold=5.0)
        assert not refusals.refused_again(ROUTE, now + 1, hold=5.0)
        until = max(refusals.moments())
        holds.append(until - now)
        now = until
    assert holds[:3] == [10.0, 15.0, 20.0]
    assert holds[-1] == 60.0


def test_refusals_success_ends_refusal():
    refusals = Refusals()
    refuse(refusals, 0.0)
    assert refusals.answered(asked())
    assert not refusals.known


def test_refusals_of_large_bodies_let_small_ones_pass():
    refusals = Refusals()
    refuse(refusals, 0.0, size=5_000)
    refuse(refusals, 6.0, size=3_000)
    assert refusals.refuses(asked(3_000), 7.0)
    assert not refusals.refuses(asked(2_999), 7.0)
    assert not refusals.answered(asked(2_000))
    assert refusals.answered(asked(4_000))
    assert not refusals.known


def test_refusals_doubtful_refusal_needs_different_requests_in_a_row():
    refusals = Refusals()
    for _ in range(10):
        assert not doubt(refusals, 1.0, body=1)
    for body in range(2, DOUBTS):
        assert not doubt(refusals, 1.0, body=body)
    assert not refusals.refuses(asked(), 1.0)
    assert doubt(refusals, 1.0, body=DOUBTS)
    assert refusals.refuses(asked(), 1.0)


def test_refusals_doubtful_refusal_is_reset_by_success():
    refusals = Refusals()
    for body in range(20):
        assert not doubt(refusals, 1.0, body=body)
        if body % 2:
            refusals.answered(asked())


def test_refusals_are_bounded_and_expire():
    refusals = Refusals()
    for number in range(MAX_REFUSALS * 3):
        refuse(refusals, float(number), name=f"/v1/{number}")
    assert len(refusals.known) == MAX_REFUSALS
    assert refusals.refuses(asked(path=f"/v1/{MAX_REFUSALS * 3 - 1}"), MAX_REFUSALS * 3.0)
    assert not refusals.expire(200.0)
    assert refusals.expire(200.0 + FORGET_AFTER)
    assert not refusals.known


def test_refusals_new_refusal_has_its_properties_and_is_shown_once_confirmed():
    refusals = Refusals()
    assert doubt(refusals, 1.0, body=1) is False
    (refusal,) = refusals.all()
    assert (refusal.what, refusal.words, refusal.size) == (ROUTE, "403", 0)
    assert (refusal.at, refusal.until, refusal.times, refusal.seen) == (1.0, 0.0, 0, 1)
    assert (refusals.reason().text, refusals.count(), refusals.moments()) == ("", 0, [0.0])
    assert refusals.active(0.5) == ()
    refuse(refusals, 2.0, size=10)
    assert (refusal.at, refusal.until, refusal.times) == (2.0, 7.0, 1)
    assert refusals.count() == 1
    assert refusals.active(6.9) == ((ROUTE, 0),)
    assert refusals.active(7.0) == ()


def test_refusals_request_sent_before_confirmation_does_not_prolong():
    refusals = Refusals()
    refuse(refusals, 0.0)
    assert refuse(refusals, 4.9) is False
    assert refusals.moments() == [5.0]
    assert refuse(refusals, 5.0) is True
    assert refusals.moments() == [15.0]


def test_refusals_hold_longer_than_the_longest_is_kept():
    refusals = Refusals()
    for now in (0.0, 90.0):
        assert refusals.refused(ROUTE, 0, "", now, hold=90.0, body=1, sure=True)
        assert refusals.moments() == [now + 90.0]


def test_refusals_doubts_must_follow_each_other_within_a_minute():
    refusals = Refusals()
    for number in range(6):
        assert doubt(refusals, 60.0 * number, body=number) is False
    assert doubt(refusals, 359.9, body=7) is False
    assert doubt(refusals, 400.0, body=7) is False  # the same again
    assert doubt(refusals, 459.9, body=8) is True


def test_refusals_confirmed_doubt_is_renewed_by_one_request():
    refusals = Refusals()
    for body in range(DOUBTS):
        doubt(refusals, 1.0, body=body)
    assert doubt(refusals, 6.0, body=DOUBTS - 1) is True


def test_refusals_refused_again_only_counts_for_confirmed_trials():
    refusals = Refusals()
    assert refusals.refused_again(ROUTE, 9.0, hold=5.0) is False
    doubt(refusals, 0.0, body=1)
    assert refusals.refused_again(ROUTE, 9.0, hold=5.0) is False
    refuse(refusals, 10.0)
    assert refusals.refused_again(ROUTE, 14.9, hold=5.0) is False
    assert refusals.refused_again(ROUTE, 15.0, hold=5.0) is True
    assert refusals.moments() == [25.0]


def test_refusals_answer_ends_doubt_silently_and_confirmed_refusal_with_a_change():
    refusals = Refusals()
    doubt(refusals, 0.0, body=1)
    assert refusals.answered(asked(path="/v1/other")) is False
    assert len(refusals.all()) == 1
    assert refusals.answered(asked()) is False
    assert refusals.all() == ()
    refuse(refusals, 0.0)
    assert refusals.answered(asked()) is True


def test_refusals_of_a_model_concern_requests_that_name_it():
    refusals = Refusals()
    refuse(refusals, 0.0, name="model m")
    assert refusals.refuses(asked(), 1.0) is True
    assert refusals.refuses(asked(model="other"), 1.0) is False
    assert refusals.refuses(asked(model=None), 1.0) is False
    refuse(refusals, 0.0)
    assert refusals.refuses(asked(model=None), 1.0) is True


def test_refusals_of_models_end_when_the_model_list_changes_them():
    refusals = Refusals()
    for name in ("model kept", "model gone", "model new", ROUTE):
        refuse(refusals, 0.0, name=name)
    assert refusals.relisted({"kept", "gone"}, {"kept", "new"}) is True
    assert set(refusals.known) == {"model kept", ROUTE}
    assert refusals.relisted({"kept"}, {"kept"}) is False
    assert set(refusals.known) == {"model kept", ROUTE}


def test_refusals_expire_after_their_last_trial():
    refusals = Refusals()
    refuse(refusals, 0.0)
    assert refusals.expire(5.0 + FORGET_AFTER) is False
    assert refusals.expire(5.1 + FORGET_AFTER) is True
    doubt(refusals, 10.0, body=1)
    assert refusals.expire(10.0 + FORGET_AFTER) is False
    assert refusals.expire(10.1 + FORGET_AFTER) is True
    assert refusals.expire(10_000.0) is False


def test_refusals_replaced_and_cleared():
    theirs, refusals = Refusals(), Refusals()
    assert refusals.clear() is False
    refuse(theirs, 0.0)
    refuse(refusals, 0.0, name="/v1/other")
    refusals.replace(theirs.all())
    assert refusals.known == theirs.known
    assert refusals.clear() is True
    assert refusals.known == {}


def test_refusals_at_the_limit_drop_the_one_with_the_earliest_trial():
    refusals = Refusals()
    for number in range(MAX_REFUSALS):
        refuse(refusals, float(MAX_REFUSALS - number), name=f"/v1/{number}")
    assert len(refusals.known) == MAX_REFUSALS
    refuse(refusals, 0.0, name="/v1/more")
    assert f"/v1/{MAX_REFUSALS - 1}" not in refusals.known
    assert len(refusals.known) == MAX_REFUSALS
    assert {"/v1/0", "/v1/more"} <= refusals.known.keys()


@pytest.mark.parametrize(("count", "end"), [(3, ""), (4, "; and 1 more"), (5, "; and 2 more")])
def test_refusals_reason_names_the_first_three(count, end):
    refusals = Refusals()
    for number in range(count):
        refuse(refusals, 0.0, name=f"/v1/{number}", size=7 if number == 1 else 0)
    others = "which other servers accept: 404"
    assert refusals.reason().text == (
        f"refuses /v1/0, {others}; refuses /v1/1 with 7 bytes or more, {others}; "
        f"refuses /v1/2, {others}{end}"
    )


# -- of a server in a fleet ------------------------------------------------------------------------


def names(servers) -> str:
    return "".join(server.name for server in servers)


def refusing_fleet(servers: int = 2):
    fleet = make_fleet(servers)
    a = fleet.servers["a"]
    fleet.accepted_elsewhere(a, ROUTE, 0, "404: no such route", 0.0, body=1, sure=True)
    fleet.settle(0.0)
    return fleet, a


def test_fitting_excludes_server_for_refused_route_only():
    fleet, _ = refusing_fleet()
    assert names(fleet.fitting("m", 1.0, (), asked())) == "b"
    assert fleet.fitting("m", 1.0, (), asked()) is fleet.fitting("m", 1.0, (), asked())
    assert names(fleet.fitting("m", 1.0, (), asked(path="/v1/completions"))) == "ab"
    assert names(fleet.candidates("m", 1.0)) == "ab"
    assert names(fleet.fitting("m", 5.0, (), asked())) == "ab"


def test_fitting_without_other_server_keeps_refusing_one():
    fleet, a = refusing_fleet()
    assert names(fleet.fitting("m", 1.0, [fleet.servers["b"]], asked())) == "a"
    go_down(fleet.servers["b"], 1.0)
    assert names(fleet.fitting("m", 1.0, (), asked())) == "a"
    assert a in fleet.selective


def test_state_refusing_names_cause_and_ends_with_restart_or_new_key():
    fleet, a = refusing_fleet()
    assert a.state is State.REFUSING
    assert "/v1/responses" in a.state_reason.text
    go_down(a, 2.0)
    come_up(a, 3.0)
    come_up(a, 3.0)
    fleet.settle(3.0)
    assert a.state is State.UP
    fleet.accepted_elsewhere(a, ROUTE, 0, "401", 4.0, body=1, sure=True)
    fleet.settle(4.0)
    assert a.state is State.REFUSING
    servers = [{"url": f"http://{name}.test:1", "name": name} for name in "ab"]
    servers[0]["api_key"] = "k"
    fleet.apply(make_config(servers))
    fleet.settle(5.0)
    assert a.state is State.UP


def test_fitting_short_context_is_excluded_only_for_certain_excess():
    fleet = make_fleet(3)
    for name, length in (("a", 1000), ("b", 2000), ("c", None)):
        card = {"id": "m", "max_model_len": length} if length else {"id": "m"}
        fleet.servers[name].listed({"m": card}, 0.0)
    fleet.settle(0.0)
    assert fleet.lengths_differ
    assert names(fleet.fitting("m", 0.0, (), asked(), tokens=1000)) == "abc"
    assert names(fleet.fitting("m", 0.0, (), asked(), tokens=1001)) == "bc"
    assert names(fleet.fitting("m", 0.0, (), asked(), longer_than=1000)) == "b"
    assert fleet.fitting("m", 0.0, (), asked(), longer_than=2000) == ()
    fleet.servers["a"].listed({"m": {"id": "m", "max_model_len": 2000}}, 1.0)
    fleet.settle(1.0)
    assert not fleet.lengths_differ
