"""Candidates for a request, and the effect of a reload on the servers."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from support.fleet_makers import come_up, eject, gauges, go_down, make_config, make_fleet
from vllm_router.config.schema import Config
from vllm_router.fleet.fleet import MAX_DRAINED, SETTLED_AT_ONCE, Fleet
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State
from vllm_router.routing.policies import POLICIES
from vllm_router.routing.prompt.routing_info import RoutingInfo


def names(servers) -> str:
    return "".join(server.name for server in servers)


def of(fleet: Fleet, name: str):
    return fleet.servers[name]


# -- configuration -----------------------------------------------------------------------------


def test_fleet_reload_keeps_state_of_unchanged_servers():
    fleet = make_fleet(2)
    a, b = of(fleet, "a"), of(fleet, "b")
    lease = a.lease(0.0)
    eject(b, 0.0)
    change = fleet.apply(make_config(3))
    assert (names(change.kept), names(change.added), names(change.removed)) == ("ab", "c", "")
    assert of(fleet, "a") is a
    assert a.in_flight == 1
    assert b.passive_health.ejected
    assert fleet.probed is False
    lease.release()


def test_fleet_removed_server_drains_until_last_request():
    fleet = make_fleet(2)
    b = of(fleet, "b")
    lease = b.lease(0.0)
    fleet.apply(make_config(1))
    assert names(fleet.candidates("m", 0.0)) == "a"
    assert fleet.gone() == []
    assert names(fleet.leaving) == "b"
    assert fleet.in_flight == 1
    assert b.state is State.DRAINING
    lease.release()
    assert fleet.gone() == [b]
    assert fleet.leaving == []


def test_fleet_server_readded_while_draining_keeps_its_state():
    fleet = make_fleet(2)
    b = of(fleet, "b")
    lease = b.lease(0.0)
    fleet.apply(make_config(1))
    fleet.apply(make_config(2))
    assert of(fleet, "b") is b
    assert fleet.leaving == []
    assert sorted(names(fleet.candidates("m", 0.0))) == ["a", "b"]
    assert b.in_flight == 1
    lease.release()


def test_fleet_server_readded_while_draining_takes_its_new_settings():
    fleet = make_fleet(2)
    b = of(fleet, "b")
    lease = b.lease(0.0)
    fleet.apply(make_config(1))
    renamed = [
        {"url": "http://a.test:1", "name": "b"},
        {"url": b.url, "name": "z", "weight": 3.0, "max_concurrent_requests": 5},
    ]
    change = fleet.apply(make_config(renamed))
    assert change.added == (b,)
    assert sorted(fleet.servers) == ["b", "z"]
    assert of(fleet, "z") is b
    assert (b.capacity, b.weighted_capacity) == (5, 15)
    lease.release()


def test_fleet_identifies_server_by_url_and_allows_new_name():
    fleet = make_fleet(1)
    a = of(fleet, "a")
    fleet.apply(make_config([{"url": "http://a.test:1/", "name": "zebra"}]))
    assert of(fleet, "zebra") is a


def test_fleet_drain_by_operator_survives_reload():
    fleet = make_fleet(2)
    of(fleet, "b").drain(on=True)
    fleet.apply(make_config(2, request_timeout=5))
    assert names(fleet.candidates("m", 0.0)) == "a"


def found(*names: str) -> Config:
    """A configuration whose servers are found by a discovery source."""
    config = make_config([{"url": f"http://{name}.test:1", "name": name} for name in names])
    servers = [msgspec.structs.replace(server, source="dns") for server in config.servers]
    return msgspec.structs.replace(config, servers=tuple(servers))


@pytest.mark.parametrize("busy", [False, True])
def test_fleet_drain_by_operator_outlasts_absence_from_source(busy):
    fleet = Fleet(found("a", "b"))
    b = of(fleet, "b")
    lease = b.lease(0.0) if busy else None
    for draining in (True, False):
        of(fleet, "b").drain(on=draining)
        fleet.apply(found("a"))
        fleet.gone()
        fleet.apply(found("a", "b"))
        assert of(fleet, "b").draining is draining
    if lease is not None:
        lease.release()


def test_fleet_drains_of_absent_servers_are_bounded():
    fleet = Fleet(found("a"))
    for number in range(MAX_DRAINED + 1):
        fleet.apply(found(f"c{number}"))
        of(fleet, f"c{number}").drain(on=True)
    fleet.apply(found("a"))
    for number, draining in ((0, False), (2, True), (MAX_DRAINED, True)):
        fleet.apply(found(f"c{number}"))
        assert of(fleet, f"c{number}").draining is draining


# -- candidates --------------------------------------------------------------------------------


def test_candidates_are_probed_healthy_servers():
    fleet = make_fleet(3, up=False)
    assert fleet.candidates("m", 0.0) == ()
    come_up(of(fleet, "a"), 0.0)
    assert names(fleet.candidates("m", 0.0)) == "a"
    come_up(of(fleet, "b"), 0.0)
    assert names(fleet.candidates("m", 0.0)) == "ab"
    assert not fleet.probed
    go_down(of(fleet, "c"), 0.0)
    assert fleet.probed
    go_down(of(fleet, "a"), 0.0)
    assert names(fleet.candidates("m", 0.0)) == "b"


def test_candidates_are_cached_while_nothing_changes():
    fleet = make_fleet(2)
    assert fleet.candidates("m", 0.0) is fleet.candidates("m", 1.0)


def test_candidates_exclude_draining_and_sleeping_servers():
    fleet = make_fleet(3)
    fleet.candidates("m", 0.0)
    of(fleet, "a").drain(on=True)
    assert names(fleet.candidates("m", 0.0)) == "bc"
    of(fleet, "b").scraped(gauges(0, asleep=True), 0.0, leases=0)
    assert names(fleet.candidates("m", 0.0)) == "c"
    of(fleet, "a").drain(on=False)
    of(fleet, "b").scraped(gauges(0), 0.0, leases=0)
    assert names(fleet.candidates("m", 0.0)) == "abc"


def test_candidates_exclude_full_server_until_its_time():
    fleet = make_fleet(2)
    of(fleet, "a").refused(10.0, 5.0)
    assert names(fleet.candidates("m", 10.0)) == "b"
    assert names(fleet.candidates("m", 14.9)) == "b"
    assert names(fleet.candidates("m", 15.0)) == "ab"


def test_candidates_all_full_includes_them():
    fleet = make_fleet(2)
    for server in fleet.servers.values():
        server.refused(10.0, 5.0)
    assert names(fleet.candidates("m", 10.0)) == "ab"


def test_candidates_exclude_ejected_server_until_probation():
    fleet = make_fleet(2, auto_recovery_threshold=5)
    eject(of(fleet, "a"), 10.0)
    assert names(fleet.candidates("m", 14.9)) == "b"
    assert names(fleet.candidates("m", 15.0)) == "ab"
    trial = of(fleet, "a").lease(15.0)
    assert trial.trial
    assert names(fleet.candidates("m", 15.0)) == "b"
    trial.release()
    assert names(fleet.candidates("m", 15.0)) == "ab"


def test_candidates_all_ejected_includes_them():
    fleet = make_fleet(3)
    for server in fleet.servers.values():
        eject(server, 10.0)
    assert names(fleet.candidates("m", 10.0)) == "abc"
    assert names(fleet.candidates(None, 10.0)) == "abc"


def test_candidates_panic_includes_servers_of_the_model_only():
    fleet = make_fleet(2)
    of(fleet, "b").listed({"other": {"id": "other"}}, 0.0)
    eject(of(fleet, "a"), 0.0)
    assert names(fleet.candidates("m", 0.0)) == "a"
    assert names(fleet.candidates("other", 0.0)) == "b"


def test_candidates_panic_excludes_down_servers():
    fleet = make_fleet(2)
    eject(of(fleet, "a"), 0.0)
    go_down(of(fleet, "a"), 0.0)
    eject(of(fleet, "b"), 0.0)
    assert names(fleet.candidates("m", 0.0)) == "b"


# -- those not tried yet -----------------------------------------------------------------------


def test_candidates_exclude_tried_servers():
    fleet = make_fleet(3)
    a, b = of(fleet, "a"), of(fleet, "b")
    assert names(fleet.others("m", 0.0, [a])) == "bc"
    assert names(fleet.others("m", 0.0, [a, b])) == "c"
    assert fleet.others("m", 0.0, list(fleet.servers.values())) == ()


def test_candidates_after_failure_include_full_server():
    fleet = make_fleet(2)
    of(fleet, "b").refused(0.0, 5.0)
    assert names(fleet.candidates("m", 0.0)) == "a"
    assert names(fleet.others("m", 0.0, [of(fleet, "a")])) == "b"


def test_others_only_ejected_server_left_is_returned():
    fleet = make_fleet(3)
    a, b, c = fleet.servers.values()
    eject(b, 0.0)
    assert names(fleet.others("m", 0.0, [a])) == "c"
    assert names(fleet.others("m", 0.0, [a, c])) == "b"
    eject(a, 0.0)
    assert names(fleet.others("m", 0.0, [c])) == "ab"


def test_others_full_server_precedes_ejected_one():
    fleet = make_fleet(3)
    a, b, c = fleet.servers.values()
    eject(b, 0.0)
    c.refused(0.0, 5.0)
    assert names(fleet.others("m", 0.0, [a])) == "c"


def test_others_down_server_is_excluded():
    fleet = make_fleet(2)
    a, b = fleet.servers.values()
    eject(b, 0.0)
    go_down(b, 0.0)
    assert fleet.others("m", 0.0, [a]) == ()


def test_candidates_silent_probation_repeats_at_growing_intervals():
    fleet = make_fleet(2, auto_recovery_threshold=5)
    a = of(fleet, "a")
    eject(a, 10.0)
    now, gaps = 15.0, []
    for _ in range(8):
        assert names(fleet.candidates("m", now)) == "ab"
        a.lease(now)
        assert names(fleet.candidates("m", now)) == "b"
        began = now
        while names(fleet.candidates("m", now)) == "b":
            now += 0.5
        gaps.append(now - began)
    assert gaps == [2, 4, 8, 16, 32, 60, 60, 60]


def test_candidates_after_long_panic_first_probation_is_soon():
    fleet = make_fleet(2, auto_recovery_threshold=5)
    a, b = fleet.servers.values()
    eject(a, 10.0)
    eject(b, 10.0)
    for _ in range(3000):
        a.lease(11.0)
    b.answered(12.0, trial=True)
    assert names(fleet.candidates("m", 14.9)) == "b"
    assert names(fleet.candidates("m", 15.0)) == "ab"


# -- models ------------------------------------------------------------------------------------


def test_candidates_have_the_model_listed():
    fleet = make_fleet(2)
    of(fleet, "b").listed({"m": {"id": "m"}, "adapter": {"id": "adapter"}}, 0.0)
    assert names(fleet.candidates("m", 0.0)) == "ab"
    assert names(fleet.candidates("adapter", 0.0)) == "b"
    assert fleet.candidates("unknown", 0.0) == ()
    assert names(fleet.candidates(None, 0.0)) == "ab"
    assert fleet.public_models() == ["adapter", "m"]
    assert fleet.knows("adapter")
    assert not fleet.knows("unknown")


def test_candidates_with_new_adapter_are_found_at_once():
    fleet = make_fleet(1)
    assert fleet.candidates("adapter", 0.0) == ()
    of(fleet, "a").listed({"m": {}, "adapter": {}}, 1.0)
    assert names(fleet.candidates("adapter", 1.0)) == "a"


def test_candidates_without_list_are_used_only_if_no_list_has_model():
    fleet = make_fleet(2, up=False)
    come_up(of(fleet, "a"), 0.0)
    b = of(fleet, "b")
    b.active_health.up = True
    assert names(fleet.candidates("m", 0.0)) == "a"
    assert names(fleet.candidates("unknown", 0.0)) == "b"


def test_models_of_down_server_are_known_but_unavailable():
    fleet = make_fleet(1)
    go_down(of(fleet, "a"), 0.0)
    assert fleet.knows("m")
    assert fleet.candidates("m", 0.0) == ()


def test_models_unknown_names_are_not_remembered():
    """Names come from clients: a thousand names of a megabyte each must not stay in memory."""
    fleet = make_fleet(2)
    fleet.candidates("m", 0.0)
    fleet.candidates(None, 0.0)
    before = fleet.cached_models
    for number in range(100):
        fleet.candidates(f"unknown-{number}", 0.0)
    assert fleet.cached_models == before


def test_model_cards_of_several_servers_use_longest_context():
    fleet = make_fleet(3)
    of(fleet, "a").listed({"m": {"id": "m", "max_model_len": 1}}, 0.0)
    of(fleet, "b").listed({"m": {"id": "m", "max_model_len": 2}, "x": {"id": "x"}}, 0.0)
    of(fleet, "c").listed({"down": {"id": "down"}}, 0.0)
    go_down(of(fleet, "c"), 0.0)
    assert fleet.model_cards() == [{"id": "m", "max_model_len": 2}, {"id": "x"}]
    of(fleet, "b").drain(on=True)
    assert fleet.model_cards() == [{"id": "m", "max_model_len": 1}]


def test_model_cards_configured_model_has_one_without_engine():
    fleet = make_fleet([{"url": "http://a.test:1", "name": "a", "models": ["x"]}])
    assert fleet.model_cards() == [{"id": "x", "object": "model"}]


# -- transitions and times ---------------------------------------------------------------------


def test_fleet_transition_is_announced_once_without_requests():
    fleet, changes = make_fleet(1, auto_recovery_threshold=5), []
    fleet.on_transition.append(changes.append)
    a = of(fleet, "a")
    a.refused(10.0, 2.0)
    fleet.settle(10.0)
    fleet.settle(11.0)
    fleet.settle(12.0)
    fleet.settle(13.0)
    assert [change.new for change in changes] == [State.FULL, State.UP]
    eject(a, 20.0)
    fleet.settle(20.0)
    fleet.settle(30.0)
    assert [change.new for change in changes[2:]] == [State.EJECTED]
    assert changes[2].reason.text == "3 requests in a row failed"


def test_fleet_retry_after_is_next_possible_change():
    fleet = make_fleet(2, auto_recovery_threshold=5)
    assert fleet.retry_after("m", 0.0) == 1.0
    of(fleet, "a").refused(10.0, 30.0)
    assert fleet.retry_after("m", 10.0) == 30.0
    eject(of(fleet, "b"), 10.0)
    assert fleet.retry_after("m", 10.0) == 5.0
    assert fleet.retry_after("m", 14.5) == 1.0
    assert fleet.retry_after("unknown", 10.0) == 1.0


def test_fleet_counts_servers_by_state():
    fleet = make_fleet(3)
    eject(of(fleet, "a"), 0.0)
    fleet.settle(0.0)
    assert fleet.count(State.UP) == 2
    assert fleet.count(State.UP, State.EJECTED) == 3


# -- with the policy ---------------------------------------------------------------------------


def spread(fleet: Fleet, requests: int) -> dict[str, int]:
    """The share of each server in a burst of simultaneous requests."""
    policy = POLICIES["least_load"](Random(5))
    leases = []
    for _ in range(requests):
        server = policy.pick(fleet.candidates("m", 0.0), RoutingInfo("m"), 0.0)[0]
        leases.append(server.lease(0.0))
    counts = {server.name: server.in_flight for server in fleet.servers.values()}
    for lease in leases:
        lease.release()
    return counts


def test_fleet_burst_on_idle_servers_spreads_evenly():
    fleet = make_fleet(3)
    assert spread(fleet, 30) == {"a": 10, "b": 10, "c": 10}
    for server in fleet.servers.values():
        server.scraped(gauges(0), 0.0, leases=0)
    assert spread(fleet, 30) == {"a": 10, "b": 10, "c": 10}


def test_fleet_burst_spreads_by_capacity():
    fleet = make_fleet(
        [
            {"url": "http://a.test:1", "name": "a", "max_concurrent_requests": 3},
            {"url": "http://b.test:1", "name": "b", "max_concurrent_requests": 5},
        ]
    )
    counts = spread(fleet, 40)
    assert counts["a"] == pytest.approx(15, abs=1)
    assert counts["b"] == pytest.approx(25, abs=1)


# -- many servers ------------------------------------------------------------------------------


def thousand() -> Fleet:
    servers = [{"url": f"http://10.0.{n // 250}.{n % 250}:1", "name": f"s{n}"} for n in range(1000)]
    fleet = make_fleet(servers)
    while fleet._changed:
        fleet.settle(0.0)
    return fleet


def test_settle_visits_changed_servers_only(monkeypatch):
    fleet = thousand()
    seen: list[str] = []
    update = Server.update_state
    monkeypatch.setattr(
        Server, "update_state", lambda self, now: seen.append(self.name) or update(self, now)
    )
    go_down(fleet.servers["s7"], 1.0)
    fleet.settle(1.0)
    eject(fleet.servers["s9"], 2.0)
    fleet.settle(2.0)
    assert seen == ["s7", "s9"]
    fleet.settle(3.0)
    fleet.settle(2.0 + fleet.settings.auto_recovery_threshold)  # its probation is due
    assert seen == ["s7", "s9", "s9"]


def test_settle_many_changes_is_sliced_and_candidates_do_not_wait():
    fleet = thousand()
    states: list[str] = []
    fleet.on_transition.append(lambda change: states.append(change.server))
    for server in fleet.servers.values():
        if server.name != "s999":
            go_down(server, 1.0)
    assert [server.name for server in fleet.candidates("m", 1.0)] == ["s999"]
    assert len(states) == SETTLED_AT_ONCE
    for _ in range(1000 // SETTLED_AT_ONCE):
        fleet.settle(1.0)
    assert states == [f"s{number}" for number in range(999)]
