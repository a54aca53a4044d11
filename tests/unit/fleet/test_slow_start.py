"""Servers that have come back, and servers that fail fast, attract no extra load in any policy."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from itertools import count
from random import Random

import pytest

from support.fleet_makers import come_up, eject, gauges, go_down, make_config, make_fleet
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.state import State
from vllm_router.routing.policies import POLICIES, Policy
from vllm_router.routing.prompt.blocks import Prompt, hash_blocks
from vllm_router.routing.prompt.routing_info import RoutingInfo

SERVICE = 0.2


def described(number: int, capacity: int = 20) -> list[dict]:
    return [
        {"url": f"http://{name}.test:1", "name": name, "max_concurrent_requests": capacity}
        for name in "abcdef"[:number]
    ]


def asking(number: int) -> RoutingInfo:
    text = b"%d" % number * 200
    prompt = Prompt(hash_blocks(text), len(text), None, 0, 0, hash(text) & 0xFFFFFFFF)
    return RoutingInfo("m", stream=True, session=str(number), prompt=prompt)


class Loop:
    """Closed-loop clients; `seconds` is how long a server takes for a request."""

    def __init__(self, fleet: Fleet, name: str, clients: int = 50) -> None:
        self.fleet = fleet
        self.policy: Policy = POLICIES[name](Random(3))
        self.now = 100.0
        self.seconds: Callable[[str], float] = lambda _: SERVICE
        self.bad: set[str] = set()
        self.served: Counter[str] = Counter()
        self._numbers = count()
        self._due: list = [(self.now + n * SERVICE / clients, n, None) for n in range(clients)]
        heapq.heapify(self._due)

    def run(self, seconds: float) -> Counter[str]:
        """The number of requests of each server in this time."""
        self.served = Counter()
        end = self.now + seconds
        while self._due[0][0] <= end:
            self.now, number, lease = heapq.heappop(self._due)
            if lease is not None:
                server, took = lease.server, self.now - lease.taken_at
                lease.release()
                self.policy.ended(lease, self.now, failed=False)
                server.answered(self.now, trial=lease.trial)
                if server.name in self.bad:
                    self.fleet.record_error(server, self.now, took)
                else:
                    self.fleet.record_success(server, took)
            facts = asking(next(self._numbers))
            server = self.policy.pick(self.fleet.candidates("m", self.now), facts, self.now)[0]
            lease = server.lease(self.now)
            self.policy.leased(lease, None, facts, self.now)
            self.policy.first_byte(lease)
            self.served[server.name] += 1
            heapq.heappush(self._due, (self.now + self.seconds(server.name), number, lease))
        self.now = end
        return self.served

    def share(self, name: str, seconds: float) -> float:
        served = self.run(seconds)
        return served[name] / served.total()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("clients", [6, 50])
def test_slow_start_after_down_raises_share_gradually(policy, clients):
    fleet = make_fleet(described(3), now=100.0)
    a = fleet.servers["a"]
    go_down(a, 100.0)
    loop = Loop(fleet, policy, clients)
    assert loop.share("a", 5.0) == 0.0
    come_up(a, loop.now)
    first = loop.share("a", 1.0)
    ramp = loop.share("a", 9.0)
    assert first <= 0.2
    assert 3 * ramp <= 1.25
    assert loop.share("a", 10.0) == pytest.approx(1 / 3, abs=0.07)


@pytest.mark.parametrize("policy", POLICIES)
def test_slow_start_applies_to_added_server(policy):
    fleet = make_fleet(described(2), now=100.0)
    loop = Loop(fleet, policy)
    loop.run(2.0)
    fleet.apply(make_config(described(3)))
    come_up(fleet.servers["c"], loop.now)
    assert loop.share("c", 1.0) <= 0.2
    assert loop.share("c", 10.0) <= 1.25 / 3


@pytest.mark.parametrize("how", ["ejected", "asleep", "restarted"])
def test_slow_start_applies_after_every_kind_of_absence(how):
    fleet = make_fleet(described(2), now=100.0, metrics_interval=1000)
    a = fleet.servers["a"]
    if how == "ejected":
        eject(a, 100.0)
        trial = a.lease(120.0)
        trial.release()
        a.answered(120.0, trial=True)
    elif how == "asleep":
        a.scraped(gauges(0, asleep=True), 100.0, 0)
        assert [server.name for server in fleet.candidates("m", 110.0)] == ["b"]
        a.scraped(gauges(0), 120.0, 0)
    else:
        a.scraped(gauges(0, prompt_tokens=5000.0), 100.0, 0)
        a.scraped(gauges(0, prompt_tokens=10.0), 120.0, 0)
    fleet.candidates("m", 120.0)
    assert a.load_estimate.slow_start_factor == 0.1
    fleet.candidates("m", 125.0)
    assert a.load_estimate.slow_start_factor == pytest.approx(0.5)
    fleet.candidates("m", 130.0)
    assert a.load_estimate.slow_start_factor == 1.0
    assert not a.load_estimate.advancing
    assert a.load_estimate.effective == a.load


def test_slow_start_is_skipped_when_router_starts():
    fleet = make_fleet(described(3), now=100.0)
    fleet.candidates("m", 100.0)
    assert {server.load_estimate.slow_start_factor for server in fleet.servers.values()} == {1.0}


def test_slow_start_can_be_disabled():
    fleet = make_fleet(described(2), now=100.0, slow_start=0)
    a = fleet.servers["a"]
    go_down(a, 100.0)
    come_up(a, 101.0)
    fleet.candidates("m", 101.0)
    assert a.load_estimate.slow_start_factor == 1.0


def test_slow_start_never_leaves_a_request_without_server():
    for name in POLICIES:
        fleet = make_fleet(described(2), now=100.0)
        for server in fleet.servers.values():
            go_down(server, 100.0)
            come_up(server, 101.0)
        loop = Loop(fleet, name)
        loop.now = 101.0
        assert set(loop.run(1.0)) == {"a", "b"}


def test_slow_start_does_not_change_reported_load():
    fleet = make_fleet(described(2), now=100.0)
    a = fleet.servers["a"]
    go_down(a, 100.0)
    come_up(a, 101.0)
    fleet.candidates("m", 101.0)
    assert a.state is State.UP
    assert a.load == 0.0
    assert a.load_estimate.effective > 0.0


# -- errors that come fast ---------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["adaptive", "least_load", "power_of_two", "prefix"])
def test_error_penalty_instant_400s_keep_fair_share(policy):
    """Scorecard F11: within 15 % of the fair share."""
    fleet = make_fleet(described(3, capacity=3), now=100.0)
    loop = Loop(fleet, policy)
    loop.run(2.0)
    loop.bad.add("a")
    loop.seconds = lambda name: 0.001 if name == "a" else SERVICE * 1.2
    loop.run(1.0)
    assert 3 * loop.share("a", 5.0) == pytest.approx(1.0, abs=0.15)
    loop.bad.clear()
    loop.seconds = lambda _: SERVICE
    loop.run(2.0)
    assert 3 * loop.share("a", 5.0) == pytest.approx(1.0, abs=0.15)
    assert fleet.servers["a"].load_estimate.error_penalty == 0.0


def test_error_penalty_same_errors_on_all_servers_change_nothing():
    fleet = make_fleet(described(3, capacity=3), now=100.0)
    loop = Loop(fleet, "least_load")
    loop.run(2.0)
    loop.bad.update("abc")
    loop.seconds = lambda _: 0.001
    served = loop.run(0.5)
    assert [served[name] / served.total() for name in "abc"] == pytest.approx([1 / 3] * 3, abs=0.03)


def test_error_penalty_is_zero_for_error_as_slow_as_response():
    fleet = make_fleet(described(1), now=100.0)
    a = fleet.servers["a"]
    fleet.record_success(a, 0.5)
    fleet.record_error(a, 100.0, 0.6)
    assert (a.load_estimate.error_penalty, a.load_estimate.advancing) == (0.0, False)
    fleet.record_error(a, 100.0, 0.0)
    assert a.load_estimate.error_penalty == pytest.approx(1.0)
    fleet.candidates("m", 100.5)
    assert a.load_estimate.error_penalty == pytest.approx(0.3679, abs=0.001)


def test_error_penalty_late_report_does_not_turn_time_back():
    """A client read the end of a large refusal only after a minute."""
    fleet = make_fleet(described(1), now=100.0)
    a = fleet.servers["a"]
    fleet.record_success(a, 0.05)
    fleet.record_error(a, 160.0, 0.0)
    fleet.record_error(a, 100.0, 0.0)
    assert a.load_estimate.error_penalty == pytest.approx(2.0)
    fleet.candidates("m", 170.0)
    assert a.load_estimate.error_penalty == 0.0
