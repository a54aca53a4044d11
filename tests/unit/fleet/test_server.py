"""One server's live state: its load, its leases, and its state over time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fleet_makers import come_up, eject, gauges, go_down, make_config, make_fleet
from vllm_router.fleet.active_health import Check
from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.server import MAX_BACKOFF, ChangeLog, Server
from vllm_router.fleet.state import State


def make_server(capacity: int = 4, changes: list[Server] | None = None, **settings) -> Server:
    config = make_config(
        [{"url": "http://a.test:1", "name": "a", "max_concurrent_requests": capacity}], **settings
    )
    note = changes.append if changes is not None else lambda server: None
    return Server(config.servers[0], config.settings, note)


# -- load --------------------------------------------------------------------------------------


def test_load_without_metrics_is_own_leases():
    server = make_server(capacity=4)
    leases = [server.lease(0.0) for _ in range(3)]
    assert (server.load, server.running, server.waiting) == (0.75, 3, 0)
    for lease in leases:
        lease.release()
    assert (server.load, server.in_flight, server.served) == (0.0, 0, 3)


def test_load_scrape_includes_other_clients_and_halves_waiting():
    server = make_server(capacity=4)
    server.scraped(gauges(4, 2), 0.0, leases=0)
    assert server.load == (4 + 0.5 * 2) / 4


def test_load_is_corrected_by_leases_since_scrape():
    server = make_server(capacity=1)
    old = [server.lease(0.0) for _ in range(2)]
    server.scraped(gauges(6), 1.0, leases=2)
    new = [server.lease(1.1) for _ in range(3)]
    assert server.load == 9
    for lease in old:
        lease.release()
    assert server.load == 7
    for lease in new:
        lease.release()
    assert server.load == 4


def test_load_burst_counts_while_gauges_are_idle():
    server = make_server(capacity=1)
    burst = [server.lease(0.0) for _ in range(30)]
    # Gauges lag by up to 41 ms: the scrape was sent while all 30 were on their way.
    server.scraped(gauges(0), 0.02, leases=30)
    assert server.load == 30
    for lease in burst:
        lease.release()
    assert server.load == 0


def test_load_waiting_is_capped_by_plausible_count():
    server = make_server(capacity=1)
    leases = [server.lease(0.0) for _ in range(8)]
    server.scraped(gauges(0, 8), 0.0, leases=8)
    for lease in leases:
        lease.release()
    assert (server.running, server.waiting, server.load) == (0, 0, 0)


def test_load_stale_metrics_do_not_count():
    server = make_server(capacity=1, metrics_interval=0.5)
    server.scraped(gauges(9), 10.0, leases=0)
    server.expire(11.5)
    assert server.load == 9
    server.expire(11.6)
    assert (server.load, server.load_estimate.fresh) == (0, False)
    server.scraped(gauges(2), 12.0, leases=0)
    assert server.load == 2


def test_metrics_age_before_first_scrape_is_infinite():
    server = make_server()
    assert server.load_estimate.age(5.0) == float("inf")
    server.scraped(gauges(0), 3.0, leases=0)
    assert server.load_estimate.age(5.0) == 2.0


def test_load_page_without_load_falls_back_to_leases():
    """A server that comes back with --disable-log-stats must not keep its old figures."""
    server = make_server(capacity=1)
    server.scraped(gauges(9, asleep=True), 0.0, leases=0)
    server.scraped(EngineMetrics(), 0.5, leases=0)
    assert (server.load, server.load_estimate.fresh) == (0, False)
    assert server.metrics is None


@given(
    st.lists(
        st.one_of(
            st.just("lease"),
            st.integers(0, 9).map(lambda n: ("release", n)),
            st.tuples(st.floats(0, 50), st.floats(0, 50)),
        ),
        max_size=40,
    )
)
def test_load_is_at_least_own_leases_at_waiting_weight(steps):
    server, leases = make_server(capacity=2), []
    for step in steps:
        if step == "lease":
            leases.append(server.lease(0.0))
        elif step[0] == "release":
            if leases:
                leases.pop(step[1] % len(leases)).release()
        else:
            server.scraped(gauges(*step), 0.0, leases=server.in_flight)
        assert server.in_flight == len(leases) == len(server.leases)
        assert server.load >= 0.5 * len(leases) / 2
        assert server.running >= 0
        assert server.waiting >= 0


# -- models ------------------------------------------------------------------------------------


def test_server_with_unread_model_list_may_serve_any_model():
    server = make_server()
    assert server.serves("whatever")
    server.listed({"m": {"id": "m"}}, 0.0)
    assert server.serves("m")
    assert not server.serves("whatever")


def test_server_configured_models_precede_listed_ones():
    config = make_config([{"url": "http://a.test:1", "name": "a", "models": ["x"]}])
    server = Server(config.servers[0], config.settings, lambda server: None)
    server.listed({"m": {"id": "m"}}, 0.0)
    assert server.models == ("x",)
    server.apply(make_config([{"url": "http://a.test:1", "name": "a"}]).servers[0], config.settings)
    assert server.models is None
    server.listed({"m": {"id": "m"}}, 1.0)
    assert server.models == ("m",)


def test_server_unchanged_model_list_is_no_change():
    changes: list[Server] = []
    server = make_server(changes=changes)
    server.listed({"m": {"id": "m"}}, 0.0)
    changes.clear()
    server.listed({"m": {"id": "m"}}, 1.0)
    assert not changes
    server.listed({"m": {"id": "m"}, "adapter": {"id": "adapter"}}, 2.0)
    assert changes


# -- states ------------------------------------------------------------------------------------


def states(server: Server, now: float) -> State:
    return server.current_state(now)[0]


def test_server_state_is_the_most_important_one():
    server = make_server(auto_recovery_threshold=5)
    assert states(server, 0.0) is State.UNKNOWN
    come_up(server, 0.0)
    assert states(server, 0.0) is State.UP
    server.refused(0.0, None)
    assert states(server, 0.0) is State.FULL
    eject(server, 0.0)
    assert states(server, 0.0) is State.EJECTED
    server.scraped(gauges(0, asleep=True), 0.0, leases=0)
    assert states(server, 0.0) is State.ASLEEP
    go_down(server, 0.0)
    assert states(server, 0.0) is State.DOWN
    server.drain(on=True)
    assert states(server, 0.0) is State.DRAINING


def test_server_transition_is_reported_once():
    server = make_server()
    come_up(server, 1.0)
    change = server.update_state(1.0)
    assert change is not None
    assert (change.server, change.old, change.new) == ("a", State.UNKNOWN, State.UP)
    assert server.update_state(2.0) is None
    assert server.state_since == 1.0


@pytest.mark.parametrize(
    ("retry_after", "until"),
    [(None, 11.0), (0.0, 11.0), (5.0, 15.0), (1e6, 10.0 + MAX_BACKOFF)],
)
def test_server_refusal_makes_it_full_for_stated_time(retry_after, until):
    server = make_server()
    come_up(server, 0.0)
    server.refused(10.0, retry_after)
    assert states(server, until - 0.01) is State.FULL
    assert states(server, until) is State.UP
    assert not server.passive_health.ejected


def test_server_second_refusal_does_not_shorten_first():
    server = make_server()
    server.refused(0.0, 10.0)
    server.refused(1.0, 1.0)
    assert server.backoff_until == 10.0


def test_server_asleep_or_draining_is_not_usable():
    server = make_server()
    assert not server.usable
    come_up(server, 0.0)
    assert server.usable
    server.drain(on=True)
    assert not server.usable
    server.drain(on=False)
    server.scraped(gauges(0, asleep=True), 0.0, leases=0)
    assert not server.usable
    server.scraped(gauges(0), 0.0, leases=0)
    assert server.usable


def test_server_page_without_metrics_ends_unobservable_sleep():
    server = make_server()
    come_up(server, 0.0)
    server.scraped(gauges(0, asleep=True), 0.0, leases=0)
    server.scraped(EngineMetrics(), 1.0, leases=0)
    assert server.usable


# -- evidence ----------------------------------------------------------------------------------


def test_server_check_timeout_is_ignored_while_bytes_arrive():
    server = make_server(health_check_consecutive_failures=1)
    come_up(server, 100.0)
    server.last_byte_at = 110.5
    assert not server.checked(Check.TIMEOUT, 2.0, 112.0)
    assert server.active_health.up
    assert not server.checked(
        Check.TIMEOUT, 2.0, 114.0
    )  # bytes since the start of the previous check
    assert server.checked(Check.TIMEOUT, 2.0, 116.0)
    assert not server.active_health.up


def test_server_at_clock_zero_has_no_recent_bytes():
    server = make_server(health_check_consecutive_failures=1)
    come_up(server, 0.0)
    assert server.checked(Check.TIMEOUT, 2.0, 2.0)


def test_server_refused_port_counts_despite_bytes():
    server = make_server(health_check_consecutive_failures=1)
    come_up(server, 0.0)
    server.last_byte_at = 112.0
    assert server.checked(Check.UNREACHABLE, 0.0, 112.0)


def test_server_good_probe_does_not_end_ejection():
    server = make_server()
    come_up(server, 0.0)
    eject(server, 1.0)
    for _ in range(10):
        server.checked(Check.GOOD, 0.01, 2.0)
    assert states(server, 2.0) is State.EJECTED


def test_server_restart_clears_ejection_and_full():
    server = make_server()
    come_up(server, 0.0)
    eject(server, 1.0)
    server.refused(1.0, 100.0)
    go_down(server, 2.0)
    come_up(server, 3.0)
    assert states(server, 3.0) is State.UP


def test_server_lease_while_ejected_is_probation_and_frees_it():
    server = make_server(auto_recovery_threshold=5)
    come_up(server, 0.0)
    assert not server.lease(0.0).trial
    eject(server, 1.0)
    trial = server.lease(6.0)
    assert trial.trial
    assert not server.passive_health.admits(6.0)
    trial.release()
    assert server.passive_health.admits(6.0)


def test_server_without_active_checks_is_up_until_failures():
    server = make_server(enable_active_health_check=False)
    assert server.usable
    eject(server, 1.0)
    assert states(server, 1.0) is State.EJECTED


def test_server_capacity_and_name_follow_configuration():
    server = make_server(capacity=4)
    lease = server.lease(0.0)
    config = make_config([{"url": "http://a.test:1", "name": "z", "max_concurrent_requests": 2}])
    server.apply(config.servers[0], config.settings)
    assert (server.name, server.capacity, server.load) == ("z", 2, 0.5)
    lease.release()


def test_server_change_log_restarts_after_many_changes():
    """Else it would hold an entry for every change of a load."""
    fleet = make_fleet(2)
    server = fleet.servers["a"]
    seen = server.change_log.servers
    for _ in range(3 * ChangeLog.MAX_LENGTH):
        server.mark_changed()
        assert len(server.change_log.servers) <= ChangeLog.MAX_LENGTH
    assert server.change_log.servers is not seen
    assert server.change_log is fleet.servers["b"].change_log


def test_server_damped_and_asleep_is_not_used():
    """Requests to a sleeping engine hang."""
    fleet = make_fleet(1, health_check_rise=1)
    server = fleet.servers["a"]
    for now in (1.0, 2.0):
        go_down(server, now)
        server.checked(Check.GOOD, 0.01, now)
    assert server.damped
    server.scraped(gauges(0, asleep=True), 2.0, leases=0)
    assert not server.damped
    assert fleet.candidates("m", 2.0) == ()
