"""Requests that a server refuses and others accept: when a refusal is believed, and when it
ends.
"""

from __future__ import annotations

from support.fleet_makers import come_up, go_down, make_config, make_fleet
from vllm_router.fleet.refusals import DOUBTS, FORGET_AFTER, MAX_REFUSALS, Asked, Refusals
from vllm_router.fleet.state import State

ROUTE = "/v1/responses"


def asked(size: int = 100, path: str = ROUTE, model: str | None = "m") -> Asked:
    return Asked(path, model, size)


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
    assert refusals.reason() == "refuses /v1/responses, which other servers accept: 404"


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
    assert "/v1/responses" in a.state_reason
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
