"""Fleets of several processes that count their leases together, and follow one leader."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from random import Random
from time import perf_counter

import msgspec
import pytest

from support.fleet_makers import come_up, eject, gauges, go_down, make_config
from vllm_router.config.auth import AuthConfig, KeyConfig
from vllm_router.config.schema import Config
from vllm_router.config.types import digest_of
from vllm_router.errors import ConfigError, Refused
from vllm_router.fleet.capacity import EQUAL_SHARE
from vllm_router.fleet.refusals import RequestKind
from vllm_router.fleet.server import Lease, Server
from vllm_router.fleet.state import State
from vllm_router.routing.policies import POLICIES
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.runtime.workers.fleet import FollowingFleet, LeadingFleet, counted_in
from vllm_router.runtime.workers.messages import ServerStates, Verdict, decode_from_leader, encode
from vllm_router.runtime.workers.shared_counters import (
    COLUMNS,
    CounterView,
    SharedCounters,
    columns_for,
)
from vllm_router.runtime.workers.shared_server import state_of


class Router:
    """The fleets of a leader and two workers, and the messages between them."""

    def __init__(self, fileno: int, config: Config) -> None:
        self.fileno = fileno
        self.news: list[Server] = []
        self.verdicts: list[Verdict] = []
        self.leader = LeadingFleet(
            config, CounterView(SharedCounters(fileno, 3), 0), self.news.append
        )
        self.workers = [self.worker(config, 1), self.worker(config, 2)]
        for server in self.leader.servers.values():
            come_up(server, 0.0)
        self.tell(0.0)

    def worker(self, config: Config, number: int) -> FollowingFleet:
        return FollowingFleet(
            config, CounterView(SharedCounters(self.fileno, 3), number), self.verdicts.append
        )

    def tell(self, now: float) -> None:
        """The leader's messages, encoded and decoded."""
        self.leader.settle(now)
        message = decode_from_leader(
            encode(ServerStates([state_of(server) for server in self.news]))
        )
        assert isinstance(message, ServerStates)
        self.news.clear()
        for worker in self.workers:
            for state in message.servers:
                worker.follow(state, now)
            worker.settle(now)

    def apply(self, config: Config, now: float) -> None:
        self.leader.apply(config)
        for worker in self.workers:
            worker.apply(config)
        self.news += self.leader.all_servers()
        self.tell(now)


@pytest.fixture
def board() -> Iterator[int]:
    fileno = SharedCounters.create(3)
    yield fileno
    os.close(fileno)


@pytest.fixture
def router(board: int) -> Router:
    return Router(board, make_config(3))


# -- leases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["least_load", "adaptive"])
def test_workers_burst_over_two_spreads_as_evenly_as_over_one(router: Router, policy: str):
    policies = [POLICIES[policy](Random(seed)) for seed in (1, 2)]
    leases: Counter[str] = Counter()
    facts = RoutingInfo("m")
    for number in range(60):
        fleet = router.workers[number % 2]
        server, note = policies[number % 2].pick(fleet.candidates("m", 1.0), facts, 1.0)
        policies[number % 2].leased(server.lease(1.0), note, facts, 1.0)
        leases[server.name] += 1
    assert leases == {"a": 20, "b": 20, "c": 20}


def test_workers_use_capacity_that_leader_has_learnt(router: Router):
    (worker, _) = router.workers
    for second in range(6):
        router.leader.servers["a"].scraped(gauges(10, 2), 2.0 + second, 0)
        router.leader.servers["b"].scraped(gauges(40, 2), 2.0 + second, 0)
    for name in ("a", "b"):
        worker.follow(state_of(router.leader.servers[name]), 8.0)
    shares = [worker.servers[name].weighted_capacity for name in ("a", "b")]
    assert shares == [EQUAL_SHARE / 4, EQUAL_SHARE]


def test_workers_see_leases_of_all(router: Router):
    one, two = router.workers
    kept = one.servers["a"].lease(1.0)
    two.servers["a"].lease(1.0)
    for fleet in (router.leader, one, two):
        fleet.refresh_leases()
        assert fleet.servers["a"].in_flight == 2
        assert fleet.servers["a"].load_estimate.relative == pytest.approx(2 / EQUAL_SHARE)
        assert fleet.in_flight == 2
    kept.release()
    two.refresh_leases()
    assert two.servers["a"].in_flight == 1


def test_workers_leases_of_dead_worker_are_removed(router: Router, board: int):
    router.workers[0].servers["a"].lease(1.0)
    router.workers[1].servers["a"].lease(1.0)
    router.leader.refresh_leases()
    SharedCounters(board, 3).clear(1)
    router.leader.refresh_leases()
    assert router.leader.servers["a"].in_flight == 1


def test_workers_successor_of_dead_worker_sees_leases_of_others(router: Router):
    router.workers[1].servers["b"].lease(1.0)
    again = router.worker(make_config(3), 1)
    again.refresh_leases()
    assert [server.in_flight for server in again.servers.values()] == [0, 1, 0]


def test_workers_scrape_is_corrected_by_leases_of_all(router: Router):
    leases: list[Lease] = [fleet.servers["a"].lease(1.0) for fleet in router.workers]
    router.leader.refresh_leases()
    server = router.leader.servers["a"]
    server.scraped(gauges(running=5.0), 1.0, server.in_flight)
    router.tell(1.0)
    leases += [router.workers[0].servers["a"].lease(1.1)]
    router.workers[1].refresh_leases()
    assert router.workers[1].servers["a"].running == 6.0
    for lease in leases:
        lease.release()
    router.workers[1].refresh_leases()
    assert router.workers[1].servers["a"].running == 3.0


def test_workers_older_than_leader_find_their_slots_later(board: int):
    early = FollowingFleet(
        make_config(1), CounterView(SharedCounters(board, 3), 1), lambda verdict: None
    )
    early.servers["a"].lease(1.0)
    leader = LeadingFleet(
        make_config(1), CounterView(SharedCounters(board, 3), 0), lambda server: None
    )
    early.use_columns()
    leader.refresh_leases()
    assert leader.servers["a"].in_flight == 1
    assert early.servers["a"].in_flight == 1


def test_workers_removed_server_stays_until_last_lease_ends(router: Router):
    lease = router.workers[0].servers["a"].lease(1.0)
    servers = [{"url": f"http://{name}.test:1", "name": name} for name in "bc"]
    router.apply(make_config(servers), 2.0)
    for fleet in (router.leader, *router.workers):
        assert fleet.gone() == []
        assert [server.name for server in fleet.leaving] == ["a"]
    lease.release()
    for fleet in (router.leader, *router.workers):
        assert [server.name for server in fleet.gone()] == ["a"]


def test_workers_returning_server_counts_from_zero(router: Router):
    servers = [{"url": f"http://{name}.test:1", "name": name} for name in "bc"]
    router.apply(make_config(servers), 2.0)
    for fleet in (router.leader, *router.workers):
        fleet.gone()
    router.apply(make_config(3), 3.0)
    router.workers[0].servers["a"].lease(3.0)
    router.leader.refresh_leases()
    assert router.leader.servers["a"].in_flight == 1
    assert router.leader.servers["b"].in_flight == 0


# -- state ------------------------------------------------------------------------------------


def test_workers_receive_state_found_by_leader(router: Router):
    for worker in router.workers:
        assert {s.state for s in worker.servers.values()} == {State.UP}
        assert worker.probed
        assert worker.knows("m")
    go_down(router.leader.servers["b"], 2.0)
    router.tell(2.0)
    for worker in router.workers:
        assert worker.servers["b"].state is State.DOWN
        assert [s.name for s in worker.candidates("m", 2.0)] == ["a", "c"]


def test_workers_are_notified_when_server_goes_down(router: Router):
    server = router.leader.servers["b"]
    go_down(server, 2.0)
    state = state_of(server)
    worker = router.workers[0]
    assert worker.follow(state, 2.0) is worker.servers["b"]
    assert worker.follow(state, 2.1) is None


def test_workers_failures_reach_leader_and_eject_for_all(router: Router):
    for fleet in [*router.workers, router.workers[0]]:
        fleet.failed(fleet.servers["c"], 5.0, trial=False, jitter=1.0)
    assert not router.workers[0].servers["c"].passive_health.ejected
    assert [verdict.what for verdict in router.verdicts] == ["failed"] * 3
    eject(router.leader.servers["c"], 5.0)
    router.tell(5.0)
    for worker in router.workers:
        assert worker.servers["c"].state is State.EJECTED
        assert [s.name for s in worker.candidates("m", 5.0)] == ["a", "b"]


def test_workers_probation_is_one_request_of_one_worker(router: Router):
    server = router.leader.servers["c"]
    eject(server, 5.0)
    router.tell(5.0)
    later = server.passive_health.until + 0.1
    worker = router.workers[0]
    lease = worker.servers["c"].lease(later)
    assert lease.trial
    assert worker.servers["c"] not in worker.candidates("m", later)
    router.news.append(server)
    router.tell(later)  # a scrape in the meantime does not let a second one through
    assert worker.servers["c"] not in worker.candidates("m", later)


def test_workers_refusal_applies_at_once_and_is_reported(router: Router):
    one, two = router.workers
    one.servers["a"].refused(1.0, 5.0)
    assert one.servers["a"] not in one.candidates("m", 1.1)
    assert two.servers["a"] in two.candidates("m", 1.1)
    assert router.verdicts == [
        Verdict("refused", router.leader.servers["a"].url, 1.0, retry_after=5.0)
    ]


def test_workers_refusal_seen_by_one_is_shared_and_ended_by_one(router: Router):
    one, other = router.workers
    asked = RequestKind("/v1/responses", "m", 10)
    one.accepted_elsewhere(
        one.servers["a"], asked.path, 0, "404: no such route", 5.0, body=7, sure=True
    )
    (verdict,) = router.verdicts
    assert (verdict.what, verdict.name, verdict.words) == (
        "accepted_elsewhere",
        asked.path,
        "404: no such route",
    )
    router.leader.accepted_elsewhere(
        router.leader.servers["a"],
        verdict.name,
        verdict.size,
        verdict.words,
        verdict.at,
        body=7,
        sure=True,
    )
    router.tell(5.0)
    for worker in router.workers:
        assert worker.servers["a"].state is State.REFUSING
        assert [s.name for s in worker.fitting("m", 5.0, (), asked)] == ["b", "c"]
    router.verdicts.clear()
    other.accepted(other.servers["a"], asked)
    (verdict,) = router.verdicts
    assert verdict.asked == asked
    router.leader.accepted(router.leader.servers["a"], asked)
    router.tell(6.0)
    assert [worker.servers["a"].state for worker in router.workers] == [State.UP, State.UP]


def test_workers_context_lengths_are_shared(router: Router):
    router.leader.servers["a"].listed({"m": {"id": "m", "max_model_len": 100}}, 1.0)
    router.leader.servers["b"].listed({"m": {"id": "m", "max_model_len": 900}}, 1.0)
    router.tell(1.0)
    asked = RequestKind("/v1/completions", "m", 10)
    for worker in router.workers:
        assert worker.lengths_differ
        assert [s.name for s in worker.fitting("m", 1.0, (), asked, tokens=200)] == ["b", "c"]


def test_workers_drain_names_and_models_are_shared(router: Router):
    router.leader.servers["a"].drain(on=True)
    come_up(router.leader.servers["b"], 2.0, "m", "lora")
    router.tell(2.0)
    worker = router.workers[0]
    assert worker.servers["a"].state is State.DRAINING
    assert [s.name for s in worker.candidates("lora", 2.0)] == ["b"]


def test_workers_stale_metrics_are_shared_but_not_used(router: Router):
    server = router.leader.servers["a"]
    server.scraped(gauges(running=5.0), 1.0, 0)
    router.news.clear()
    worker = router.workers[0]
    worker.follow(state_of(server), 100.0)
    assert not worker.servers["a"].load_estimate.fresh
    assert worker.servers["a"].running == 0.0


def test_workers_metrics_of_a_server_scraped_seldom_count_as_long_as_at_the_leader(router: Router):
    server = router.leader.servers["a"]
    server.load_estimate.expect_scrapes(2.5)
    server.scraped(gauges(running=5.0), 1.0, 0)
    worker = router.workers[0]
    worker.follow(state_of(server), 1.0)
    followed = worker.servers["a"]
    for now, running in ((8.0, 5.0), (9.0, 0.0)):
        server.expire(now)
        followed.expire(now)
        assert followed.running == server.running == running


# -- limits of keys ---------------------------------------------------------------------------

AUTH = """
[auth]
keys = [
    { name = "few", key = "sk-few-0123456789abcdef", max_concurrent_requests = 3 },
    { name = "slow", key = "sk-slow-0123456789abcdef", requests_per_minute = 6 },
]
"""


def keys_of(config: Config) -> dict[str, KeyConfig]:
    assert config.auth is not None
    return {key.name: key for key in config.auth.keys}


def admitted(router: Router, key: KeyConfig, count: int) -> int:
    """How many of `count` requests are admitted, by one worker and the other in turns."""
    done = 0
    for number in range(count):
        with contextlib.suppress(Refused):
            router.workers[number % 2].key_limits.enter(key, perf_counter())
            done += 1
    return done


def test_workers_key_concurrency_is_limited_across_all(board: int):
    config = make_config(1, tables=AUTH)
    router = Router(board, config)
    key = keys_of(config)["few"]
    assert admitted(router, key, 10) == 3
    router.workers[0].key_limits.leave(key, 1.0)
    assert admitted(router, key, 4) == 1
    SharedCounters(board, 3).clear(1)  # with two of them
    assert router.workers[1].key_limits.running("few") == 3
    assert admitted(router, key, 10) == 2


def test_workers_key_rate_is_limited_across_all(board: int):
    config = make_config(1, tables=AUTH)
    router = Router(board, config)
    assert admitted(router, keys_of(config)["slow"], 20) == 6
    SharedCounters(board, 3).clear(1)
    assert admitted(router, keys_of(config)["slow"], 20) == 0


def test_workers_key_added_by_reload_is_shared(board: int):
    router = Router(board, make_config(1))
    config = make_config(1, tables=AUTH)
    router.apply(config, 1.0)
    assert admitted(router, keys_of(config)["few"], 10) == 3


def test_workers_rate_limit_ignores_history_of_dead_worker(board: int):
    config = make_config(1, tables=AUTH)
    router = Router(board, config)
    key = keys_of(config)["slow"]
    now = perf_counter()
    for minute in range(10):
        router.workers[1].key_limits.enter(key, now + 60 * minute)
    again = router.worker(config, 1)
    again.key_limits.enter(key, perf_counter())


def test_workers_readded_key_counts_running_requests_of_others(board: int):
    config = make_config(1, tables=AUTH)
    router = Router(board, config)
    key = keys_of(config)["few"]
    assert admitted(router, key, 3) == 3
    router.apply(make_config(1), 1.0)
    for number in (0, 1, 0):
        router.workers[number].key_limits.leave(key, 1.0)
    router.apply(config, 2.0)
    assert [worker.key_limits.running("few") for worker in router.workers] == [0, 0]
    assert admitted(router, key, 10) == 3


def test_workers_rate_limit_not_charged_twice_after_key_readded(board: int):
    config = make_config(1, tables=AUTH)
    router = Router(board, config)
    key = keys_of(config)["slow"]
    for _ in range(5):
        router.workers[0].key_limits.enter(key, perf_counter())
    router.apply(make_config(1), 1.0)
    router.leader.apply(config)
    for worker in reversed(router.workers):
        worker.apply(config)
    for worker in router.workers:
        worker.refresh_leases()
    router.workers[1].key_limits.enter(key, perf_counter())


def test_workers_request_outliving_its_key_does_not_count_for_next(board: int):
    config = make_config(1, tables=AUTH)
    router = Router(board, config)
    key = keys_of(config)["few"]
    worker = router.workers[0]
    worker.key_limits.enter(key, perf_counter())
    router.apply(make_config(1), 1.0)
    router.apply(make_config(3), 2.0)
    leases = [server.lease(2.0) for server in worker.servers.values()]
    worker.key_limits.leave(key, 1.0)
    router.leader.refresh_leases()
    assert [server.in_flight for server in router.leader.servers.values()] == [1, 1, 1]
    assert len(leases) == 3


def test_workers_servers_with_swapped_slots_keep_their_counts(board: int):
    router = Router(board, make_config(2))
    worker = router.workers[0]
    worker.servers["a"].lease(1.0)
    worker.servers["b"].lease(1.0)
    worker.servers["b"].lease(1.0)
    one, other = (worker.servers[name].url for name in "ab")
    shared = SharedCounters(board, 3)
    before = {url: shared.find(url) for url in (one, other)}
    shared.keep(set())
    SharedCounters(board, 3).row(1)[:] = memoryview(bytes(8 * COLUMNS)).cast("q")
    after = {url: shared.assign(url) for url in (one, other)}
    assert before == {one: after[other], other: after[one]}
    worker.use_columns()
    row = shared.row(1)
    assert [row[column] for column in after.values() if column is not None] == [1, 2]


def test_workers_state_is_shared_again_after_reset_by_reload(router: Router):
    server = router.leader.servers["a"]
    worker = router.workers[0]
    worker.apply(make_config([{"url": server.url, "name": "a", "models": ["x"]}]))
    worker.apply(make_config(1))
    assert worker.servers["a"].models is None
    worker.follow(state_of(server), 1.0)
    assert worker.servers["a"].models == ("m",)


def with_keys(number: int) -> Config:
    """A configuration with `number` keys, each for one request at a time."""
    keys = tuple(
        KeyConfig(name=f"k{one}", digest=digest_of(f"k{one}"), max_concurrent_requests=1)
        for one in range(number)
    )
    return msgspec.structs.replace(make_config(1), auth=AuthConfig(keys=keys))


@pytest.mark.parametrize("number", [510, 2_000])
def test_workers_limits_of_many_keys_hold_across_all(number: int):
    config = with_keys(number)
    columns = columns_for(len(counted_in(config)))
    fileno = SharedCounters.create(3, columns)
    try:
        LeadingFleet(
            config, CounterView(SharedCounters(fileno, 3, columns), 0), lambda server: None
        )
        one, other = (
            FollowingFleet(
                config,
                CounterView(SharedCounters(fileno, 3, columns), worker),
                lambda verdict: None,
            )
            for worker in (1, 2)
        )
        assert config.auth is not None
        for key in config.auth.keys:
            one.key_limits.enter(key, 0.0)
        for key in config.auth.keys:
            with pytest.raises(Refused):
                other.key_limits.enter(key, 0.0)
    finally:
        os.close(fileno)


def test_workers_reload_beyond_shared_memory_is_refused(board: int):
    leader = LeadingFleet(
        make_config(1), CounterView(SharedCounters(board, 3), 0), lambda server: None
    )
    leader.check_room(with_keys(COLUMNS // 2 - 1))
    with pytest.raises(ConfigError, match="restart the router"):
        leader.check_room(with_keys(COLUMNS // 2))


def test_workers_key_without_slot_is_logged(board: int, caplog: pytest.LogCaptureFixture):
    LeadingFleet(with_keys(COLUMNS), CounterView(SharedCounters(board, 3), 0), lambda server: None)
    assert "counted per worker" in caplog.text
