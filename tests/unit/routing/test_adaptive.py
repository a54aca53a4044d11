"""The adaptive policy: each term of its score, its guards, and its estimates."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fleet_makers import come_up, eject, gauges, go_down, make_fleet
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import ChangeLog, Lease, Server
from vllm_router.routing.policies import POLICIES, PolicySettings
from vllm_router.routing.policies.adaptive import Adaptive
from vllm_router.routing.prompt.blocks import Prompt, hash_blocks
from vllm_router.routing.prompt.routing_info import RoutingInfo

CONTEXT = bytes(n * n % 251 for n in range(40_000))


class Situation:
    """Some servers of equal capacity, and the policy."""

    def __init__(self, count: int = 3, capacity: int = 4, seed: int = 1, **settings: float) -> None:
        self.fleet: Fleet = make_fleet(
            [
                {"url": f"http://{n}.test:1", "name": f"s{n}", "max_concurrent_requests": capacity}
                for n in range(count)
            ]
        )
        self.policy = Adaptive(Random(seed), PolicySettings(**settings))
        self.servers = tuple(self.fleet.servers.values())
        self.now = 100.0
        self.measured: dict[Server, tuple[float, float]] = {}

    def pick(self, facts: RoutingInfo) -> Server:
        return self.policy.pick(self.candidates, facts, self.now)[0]

    @property
    def candidates(self) -> tuple[Server, ...]:
        return self.fleet.candidates("m", self.now)

    def send(self, facts: RoutingInfo, server: Server | None = None) -> Lease:
        note: object = None
        if server is None:
            server, note = self.policy.pick(self.candidates, facts, self.now)
        lease = server.lease(self.now)
        self.policy.leased(lease, note, facts, self.now)
        return lease

    def end(self, lease: Lease, *, failed: bool = False) -> None:
        lease.release()
        self.policy.ended(lease, self.now, failed=failed)

    def serve(self, facts: RoutingInfo, server: Server) -> None:
        """A request that is answered at once, and leaves only its cached blocks."""
        self.end(self.send(facts, server))

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def parts(self, facts: RoutingInfo, server: Server) -> dict[str, float]:
        rows = self.policy.explain(self.candidates, facts, self.now)
        return next(row.parts for row in rows if row.server is server)

    def scores(self, facts: RoutingInfo) -> dict[str, float]:
        rows = self.policy.explain(self.candidates, facts, self.now)
        return {row.server.name: row.score for row in rows}


def asking(text: bytes = b"", *, stream: bool = True, **marks: int) -> RoutingInfo:
    return RoutingInfo("m", stream=stream, prompt=Prompt(hash_blocks(text), len(text), **marks))


NOTHING = asking()
LONG = asking(CONTEXT)


# -- the score ---------------------------------------------------------------------------------


def test_adaptive_without_information_equals_least_load():
    a, b, c = (it := Situation()).servers
    for server, leases in ((a, 2), (b, 1), (c, 3)):
        for _ in range(leases):
            it.send(NOTHING, server)
    it.wait(1.0)
    assert it.scores(NOTHING) == {"s0": 3 / 4, "s1": 2 / 4, "s2": 4 / 4}
    assert it.pick(NOTHING) is b


def test_adaptive_waiting_requests_count_half():
    a, b, _ = (it := Situation()).servers
    a.scraped(gauges(2, 4), it.now, 0)
    b.scraped(gauges(3, 0), it.now, 0)
    scores = it.scores(NOTHING)
    assert (scores["s0"], scores["s1"]) == (5 / 4, 4 / 4)


def test_adaptive_queued_prompt_tokens_count_until_first_byte():
    a, _, _ = (it := Situation()).servers
    lease = it.send(asking(b"x" * 8000), a)
    it.wait(1.0)
    assert it.parts(NOTHING, a)["queued_tokens"] == 2000
    assert it.scores(NOTHING)["s0"] == (1 + 1 + 2 * 2000 / 1000) / 4
    it.policy.first_byte(lease)
    it.policy.first_byte(lease)
    assert it.parts(NOTHING, a)["queued_tokens"] == 0
    it.end(lease)
    assert it.parts(NOTHING, a)["queued_tokens"] == 0


def test_adaptive_json_counts_as_decoding_after_mean_first_token_time():
    a, _, _ = (it := Situation()).servers
    a.scraped(gauges(0, first_token_sum=0.0, first_token_count=0.0), it.now, 0)
    it.pick(NOTHING)
    it.wait(1.0)
    a.scraped(gauges(0, first_token_sum=40.0, first_token_count=20.0), it.now, 0)
    it.pick(NOTHING)
    it.send(asking(b"x" * 8000, stream=False), a)
    it.wait(1.8)
    assert it.parts(NOTHING, a)["queued_tokens"] == 2000
    it.wait(0.5)
    assert it.parts(NOTHING, a)["queued_tokens"] == 0


def test_adaptive_first_token_time_of_a_clock_that_was_set_keeps_no_prompts():
    a, _, _ = (it := Situation()).servers
    a.scraped(gauges(0, first_token_sum=0.0, first_token_count=0.0), it.now, 0)
    it.pick(NOTHING)
    it.wait(1.0)
    a.scraped(gauges(0, first_token_sum=1.7e9, first_token_count=1.0), it.now, 0)
    it.pick(NOTHING)
    it.send(asking(b"x" * 8000, stream=False), a)
    it.wait(400.0)
    assert it.parts(NOTHING, a)["queued_tokens"] == 0
    assert not it.policy._estimates[a].due


def test_adaptive_only_uncached_tokens_are_queued():
    a, _, _ = (it := Situation()).servers
    it.serve(LONG, a)
    it.send(LONG, a)
    assert it.parts(NOTHING, a)["queued_tokens"] < 0.05 * 10_000


def test_adaptive_request_goes_to_server_with_cached_prefix():
    _, b, _ = (it := Situation()).servers
    it.serve(LONG, b)
    assert it.pick(LONG) is b
    assert it.parts(LONG, b)["cached_tokens"] > 9500
    assert it.parts(LONG, it.servers[0])["waste_tokens"] > 9500


def test_adaptive_score_equals_documented_formula():
    a, b, _ = (it := Situation(tokens_per_request=500.0, waste_growth=0.25)).servers
    it.serve(asking(CONTEXT[:8192]), b)
    for letter in (b"y", b"z"):
        it.send(asking(letter * 4000), a)
    a_score = it.scores(asking(CONTEXT[:8192]))["s0"]
    assert a_score == pytest.approx((1 + 2 + (2 * 2000 + 2048 * (1 + 0.25 * 2)) / 500) / 4)


STEPS = st.tuples(
    st.sampled_from(["send", "send elsewhere", "begin", "end", "fail", "scrape", "wait", "out"]),
    st.integers(0, 5),
    st.integers(0, 3),
)


@given(st.lists(STEPS, max_size=60), st.booleans())
def test_adaptive_score_is_always_sum_of_explained_terms(
    steps: list[tuple[str, int, int]], others: bool
):
    """Scores are updated by events; the explained terms are computed when requested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChangeLog, "MAX_LENGTH", 7)  # so that some changes are missed
        it = Situation(count=6)
        leases: list[Lease] = []
        texts = [asking(CONTEXT[: 700 * n], conversation=n, shared=512) for n in (0, 1, 3, 9)]
        for what, place, text in steps:
            server, facts = it.servers[place], texts[text]
            if what == "send":
                leases.append(it.send(facts))
            elif what == "send elsewhere":
                server.lease(it.now)  # by another policy
            elif what == "scrape":
                server.scraped(gauges(place + (50 if others else 0), text), it.now, 0)
            elif what == "out":
                server.refused(it.now, None)
            elif what == "wait":
                it.wait(0.03 + text)
            elif leases:
                lease = leases[place % len(leases)]
                if what == "begin":
                    it.policy.first_byte(lease)
                else:
                    leases.remove(lease)
                    it.end(lease, failed=what == "fail")
            for row in it.policy.explain(it.candidates, facts, it.now):
                assert row.score == pytest.approx(score_of(row.parts), rel=1e-6)


@pytest.mark.parametrize("system", range(7))
@pytest.mark.parametrize("whole", range(3))
def test_adaptive_server_is_charged_for_uncached_tokens(system: int, whole: int):
    it = Situation(count=6)
    for server in it.servers[:system]:
        it.serve(asking(CONTEXT[:4096]), server)
    for server in it.servers[3 : 3 + whole]:
        it.serve(asking(CONTEXT[:16_384]), server)
    it.send(NOTHING, it.servers[1])
    rows = {row.server: row for row in it.policy.explain(it.candidates, LONG, it.now)}
    for place, server in enumerate(it.servers):
        cached = 4096 if 3 <= place < 3 + whole else 1024 if place < system else 0
        assert rows[server].parts["cached_tokens"] == cached
        best = 4096 if whole else 1024 if system else 0
        assert rows[server].parts["waste_tokens"] == best - cached
        assert rows[server].score == pytest.approx(score_of(rows[server].parts))


def test_adaptive_documentation_example_holds():
    a, b, c = (it := Situation(capacity=8)).servers
    prompt = bytes(n * n % 253 for n in range(32_000))
    it.serve(asking(prompt[: 4 * 6144]), a)
    for _ in range(2):
        it.send(NOTHING, a)
    it.send(asking(b"x" * 2000), c)
    rows = {row.server: row for row in it.policy.explain(it.candidates, asking(prompt), it.now)}
    assert [rows[server].parts["load"] for server in (a, b, c)] == [2, 0, 1]
    assert [rows[server].parts["waste_tokens"] for server in (a, b, c)] == [0, 6144, 6144]
    scores = [round(rows[server].score, 3) for server in (a, b, c)]
    assert scores == [0.375, 0.893, 1.527]
    documented = (Path(__file__).parents[3] / "docs" / "routing.md").read_text()
    assert all(str(score) in documented for score in scores)
    for _ in range(4):
        it.send(NOTHING, a)
    assert it.pick(asking(prompt)) is b


def score_of(parts: dict[str, float], per_request: float = 1000.0, growth: float = 0.5) -> float:
    """The documented formula."""
    load = parts["load"]
    tokens = 2 * parts["queued_tokens"] + parts["waste_tokens"] * (1 + growth * min(load, 32))
    tokens += parts["lost_tokens"] + parts["delayed_tokens"]
    share = parts["share"] * parts["slow_start"]
    requests = 1 + load - parts["home"] + parts["kv_pressure"] + tokens / per_request
    return parts["slow"] * requests / share


def test_adaptive_pick_reads_changed_servers_only():
    it = Situation(count=50)
    it.send(NOTHING)
    board = it.policy._cache(it.candidates, "m", it.now)
    measured = []
    patch = pytest.MonkeyPatch()
    patch.setattr(type(board), "_measure", lambda self, place: measured.append(place))
    try:
        it.servers[7].lease(it.now)
        it.pick(NOTHING)
        it.pick(NOTHING)
    finally:
        patch.undo()
    assert measured == [7]


def test_adaptive_prefix_never_overrides_large_load_difference():
    a, _, _ = (it := Situation(capacity=8)).servers
    it.serve(LONG, a)
    for _ in range(2):
        it.send(NOTHING, a)
    assert it.pick(LONG) is a
    for _ in range(4):
        it.send(NOTHING, a)
    assert it.pick(LONG) is not a


def test_adaptive_hot_prefix_spreads():
    it = Situation(count=4, capacity=8)
    picked = Counter(it.send(asking(CONTEXT[:8000])).server.name for _ in range(64))
    assert len(picked) == 4
    assert max(picked.values()) <= 32


def test_adaptive_burst_spreads_evenly():
    it = Situation(count=4, capacity=8)
    picked = Counter(it.send(NOTHING).server.name for _ in range(40))
    assert set(picked.values()) == {10}


def test_adaptive_load_spreads_by_capacity():
    fleet = make_fleet(
        [
            {"url": "http://big.test:1", "name": "big", "max_concurrent_requests": 30},
            {"url": "http://small.test:1", "name": "small", "max_concurrent_requests": 10},
        ]
    )
    policy = Adaptive(Random(1))
    picked: Counter[str] = Counter()
    for _ in range(40):
        server = policy.pick(fleet.candidates("m", 1.0), NOTHING, 1.0)[0]
        policy.leased(server.lease(1.0), None, NOTHING, 1.0)
        picked[server.name] += 1
    assert picked == {"big": 30, "small": 10}


# -- guards ------------------------------------------------------------------------------------


def measure(
    it: Situation,
    latencies: dict[Server, float],
    steps: int = 10,
    running: float = 0.0,
    idle: Server | None = None,
) -> None:
    """Two scrapes a second, with 100 tokens a second per server at its latency."""
    for _ in range(steps):
        for server, latency in latencies.items():
            seconds, tokens = it.measured.get(server, (0.0, 0.0))
            it.measured[server] = seconds, tokens = seconds + 50 * latency, tokens + 50
            scraped = gauges(
                0 if server is idle else running,
                token_latency_sum=seconds,
                token_latency_count=tokens,
            )
            server.scraped(scraped, it.now, 0)
        it.pick(NOTHING)
        it.wait(0.5)


def test_adaptive_five_times_slower_server_gets_a_fifth_or_less():
    a, b, c = (it := Situation()).servers
    measure(it, {a: 0.05, b: 0.01, c: 0.01})
    assert it.parts(NOTHING, a)["slow"] == pytest.approx(5.0, rel=0.35)
    assert it.parts(NOTHING, b)["slow"] == 1.0
    assert it.scores(NOTHING)["s0"] > 3 * it.scores(NOTHING)["s1"]
    for _ in range(30):
        measure(it, {a: 0.05, b: 0.01, c: 0.01})
    assert it.parts(NOTHING, a)["slow"] == pytest.approx(25.0, rel=0.2)
    assert it.parts(NOTHING, b)["slow"] == 1.0


def test_adaptive_long_prompt_does_not_count_squared():
    a, b, c = (it := Situation()).servers
    measure(it, {a: 0.01, b: 0.01, c: 0.01})
    measure(it, {a: 0.04, b: 0.01, c: 0.01}, steps=8)
    assert 1.0 < it.parts(NOTHING, a)["slow"] < 4.0


def test_adaptive_computing_a_long_prompt_is_no_slowness():
    """Its other conversations stay: elsewhere they would be computed anew."""
    a, b, c = (it := Situation()).servers
    measure(it, {a: 0.01, b: 0.01, c: 0.01})
    it.serve(LONG, a)
    lease = it.send(asking(bytes(n * n % 251 for n in range(200_000))), a)
    measure(it, {a: 0.05, b: 0.01, c: 0.01}, steps=40)
    assert it.parts(NOTHING, a)["slow"] == 1.0
    assert it.parts(LONG, a)["cached_tokens"] > 3000
    it.policy.first_byte(lease)
    it.end(lease)
    measure(it, {a: 0.05, b: 0.01, c: 0.01}, steps=40)
    assert it.parts(NOTHING, a)["slow"] > 3.0


def test_adaptive_few_long_steps_of_many_requests_are_no_slowness():
    """Three steps with prompts in them are 600 tokens on a server that runs 200 requests."""
    a, b, c = (it := Situation()).servers

    def scrape(steps: dict[Server, tuple[int, float]]) -> None:
        for server, (count, seconds) in steps.items():
            total, tokens = it.measured.get(server, (0.0, 0.0))
            total, tokens = total + 200 * count * seconds, tokens + 200 * count
            it.measured[server] = total, tokens
            figures = gauges(200.0, token_latency_sum=total, token_latency_count=tokens)
            server.scraped(figures, it.now, 0)
        it.pick(NOTHING)
        it.wait(0.5)

    scrape({a: (1, 0.03), b: (1, 0.03), c: (1, 0.03)})
    scrape({a: (3, 0.15), b: (15, 0.03), c: (15, 0.03)})
    assert it.parts(NOTHING, a)["slow"] < 2.0
    for _ in range(4):
        scrape({a: (3, 0.15), b: (15, 0.03), c: (15, 0.03)})
    assert it.parts(NOTHING, a)["slow"] > 2.0


def test_adaptive_server_that_always_computes_long_prompts_is_slow_in_the_end():
    a, b, c = (it := Situation()).servers
    measure(it, {a: 0.01, b: 0.01, c: 0.01})
    it.send(asking(bytes(n * n % 251 for n in range(200_000))), a)
    measure(it, {a: 0.05, b: 0.01, c: 0.01}, steps=59)
    assert it.parts(NOTHING, a)["slow"] == 1.0
    measure(it, {a: 0.05, b: 0.01, c: 0.01}, steps=40)
    assert it.parts(NOTHING, a)["slow"] > 3.0


def test_adaptive_server_that_computes_one_context_after_another_is_not_slow():
    """It only has much to do, such as the contexts of many new agents."""
    a, b, c = (it := Situation()).servers
    measure(it, {a: 0.01, b: 0.01, c: 0.01})
    leases = []
    for number in range(20):
        context = bytes((n * n + number) % 251 for n in range(200_000))
        leases.append(it.send(asking(context), a))
        measure(it, {a: 0.05, b: 0.01, c: 0.01}, steps=5)
        if number:
            it.policy.first_byte(leases[number - 1])
            it.end(leases[number - 1])
    assert it.parts(NOTHING, a)["slow"] == 1.0


def test_adaptive_short_pause_is_no_speed_sample():
    a, b, c = (it := Situation()).servers
    measure(it, {a: 0.01, b: 0.01, c: 0.01}, steps=1)
    measure(it, {a: 1.0, b: 0.01, c: 0.01}, steps=1)
    measure(it, {a: 0.01, b: 0.01, c: 0.01}, steps=12)
    assert it.parts(NOTHING, a)["slow"] == 1.0


def test_adaptive_idle_slow_server_is_not_rated_fast():
    a, b, c = (it := Situation()).servers
    for _ in range(10):
        measure(it, {a: 0.05, b: 0.01, c: 0.01}, running=20)
    before = it.parts(NOTHING, a)["slow"]
    measure(it, {a: 0.01, b: 0.01, c: 0.01}, running=20, idle=a)
    assert it.parts(NOTHING, a)["slow"] > 0.5 * before
    measure(it, {a: 0.01, b: 0.01, c: 0.01}, steps=200, running=20)
    assert it.parts(NOTHING, a)["slow"] == 1.0


def test_adaptive_faster_of_two_servers_is_reference():
    a, b = (it := Situation(count=2)).servers
    measure(it, {a: 0.05, b: 0.01})
    assert it.parts(NOTHING, b)["slow"] == 1.0
    assert it.parts(NOTHING, a)["slow"] > 3


def test_adaptive_small_speed_differences_do_not_count():
    a, b, c = (it := Situation()).servers
    measure(it, {a: 0.012, b: 0.010, c: 0.009})
    assert {it.parts(NOTHING, server)["slow"] for server in it.servers} == {1.0}


def test_adaptive_frozen_time_does_not_make_server_slow():
    """The missing tokens come when it continues, and took as long as it was frozen."""
    a, b, c = (it := Situation()).servers
    measure(it, {a: 0.01, b: 0.01, c: 0.01})
    go_down(a, it.now)
    it.wait(10.0)
    it.fleet.settle(it.now)
    come_up(a, it.now)
    it.measured[a] = it.measured[a][0] + 170.0, it.measured[a][1] + 17
    it.wait(0.2)
    measure(it, {a: 0.01, b: 0.01, c: 0.01}, steps=1)
    assert it.parts(NOTHING, a)["slow"] == 1.0
    measure(it, {a: 0.05, b: 0.01, c: 0.01})
    assert it.parts(NOTHING, a)["slow"] > 3


def test_adaptive_slow_server_is_tried_again_after_idle_time():
    a, b, c = (it := Situation()).servers
    measure(it, {a: 0.05, b: 0.01, c: 0.01})
    before = it.parts(NOTHING, a)["slow"]
    for step in range(240):
        for server in (b, c):
            total = 50.0 * (step + 12)
            server.scraped(
                gauges(0, token_latency_sum=0.01 * total, token_latency_count=total), it.now, 0
            )
        assert a.metrics is not None
        a.scraped(a.metrics, it.now, 0)
        it.pick(NOTHING)
        it.wait(0.5)
    assert it.parts(NOTHING, a)["slow"] == 1.0 < before


def test_adaptive_prefix_never_overrides_slow_server():
    a, b, c = (it := Situation()).servers
    measure(it, {a: 0.05, b: 0.01, c: 0.01}, steps=40)
    it.serve(LONG, a)
    assert it.pick(LONG) is not a


def test_adaptive_prefix_survives_a_long_prefill():
    a, b, c = (it := Situation()).servers
    measure(it, {a: 0.01, b: 0.01, c: 0.01}, steps=20)
    it.serve(LONG, a)
    measure(it, {a: 0.03, b: 0.01, c: 0.01}, steps=6)
    assert it.parts(LONG, a)["slow"] > 1.1
    assert it.pick(LONG) is a


def test_adaptive_prefix_never_overrides_failing_server():
    a, _, _ = (it := Situation()).servers
    it.serve(LONG, a)
    assert it.pick(LONG) is a
    it.end(it.send(LONG, a), failed=True)
    assert it.pick(LONG) is not a


def test_adaptive_prefix_never_overrides_refusing_server():
    a, _, _ = (it := Situation()).servers
    it.serve(LONG, a)
    a.refused(it.now, None)
    assert it.pick(LONG) is not a


def test_adaptive_error_penalty_halves_every_five_seconds():
    a, _, _ = (it := Situation()).servers
    it.end(it.send(NOTHING, a), failed=True)
    assert it.parts(NOTHING, a)["recent_errors"] == 8
    it.wait(5.0)
    assert it.parts(NOTHING, a)["recent_errors"] == pytest.approx(4)
    it.end(it.send(NOTHING, a), failed=True)
    assert it.parts(NOTHING, a)["recent_errors"] == pytest.approx(12)
    it.wait(60.0)
    assert it.parts(NOTHING, a)["recent_errors"] == 0


def test_adaptive_fast_failing_server_gets_few_requests_before_ejection():
    it = Situation(count=4)
    a = it.servers[0]
    picked = []
    for _ in range(200):
        lease = it.send(NOTHING)
        picked.append(lease.server)
        it.end(lease, failed=lease.server is a)
        it.wait(0.05)
    assert picked.count(a) <= 4


def test_adaptive_server_without_prefix_caching_gets_no_credit():
    a, _, _ = (it := Situation()).servers
    for _ in range(40):
        a.scraped(gauges(0, prefix_hits=0.0), it.now, 0)
        it.serve(asking(CONTEXT[:20_000]), a)
        it.wait(0.2)
        it.pick(NOTHING)
    assert it.parts(asking(CONTEXT[:20_000]), a)["cached_tokens"] == 0


def test_adaptive_prompts_in_prefill_do_not_lower_trust():
    a, b, c = (it := Situation()).servers
    leases = []
    for _ in range(40):
        a.scraped(gauges(0, prefix_hits=0.0), it.now, a.in_flight)
        leases.append(it.send(asking(CONTEXT[:20_000]), a))
        leases += [it.send(NOTHING, server) for server in (b, c)]
        it.wait(0.2)
        it.pick(NOTHING)
    assert it.parts(asking(CONTEXT[:20_000]), a)["cached_tokens"] > 4000
    for lease in leases:
        it.end(lease)


def test_adaptive_server_with_confirming_counters_keeps_credit():
    a, _, _ = (it := Situation()).servers
    for step in range(40):
        a.scraped(gauges(0, prefix_hits=4000.0 * step), it.now, 0)
        it.serve(asking(CONTEXT[:20_000]), a)
        it.wait(0.2)
        it.pick(NOTHING)
    assert it.parts(asking(CONTEXT[:20_000]), a)["cached_tokens"] > 4000


# -- returning servers -------------------------------------------------------------------------


def test_adaptive_returning_server_gets_share_slowly():
    it = Situation(count=2, capacity=8)
    a, b = it.servers
    for _ in range(8):
        it.send(NOTHING, b)
    go_down(a, it.now)
    it.fleet.settle(it.now)
    it.wait(5.0)
    come_up(a, it.now)
    at_once = Counter(it.send(NOTHING).server.name for _ in range(4))
    assert at_once["s0"] <= 1
    it.wait(10.0)
    later = Counter(it.send(NOTHING).server.name for _ in range(6))
    assert later["s0"] == 6


def test_adaptive_first_probe_is_no_return():
    it = Situation()
    assert {it.parts(NOTHING, server)["slow_start"] for server in it.servers} == {1.0}


@pytest.mark.parametrize("how", ["ejected", "restarted"])
def test_adaptive_old_errors_do_not_keep_returning_server_away(how):
    a, b, _ = (it := Situation()).servers
    for _ in range(12):
        it.end(it.send(NOTHING, a), failed=True)
    it.wait(1.0)
    assert it.parts(NOTHING, a)["recent_errors"] > 50
    if how == "ejected":
        eject(a, it.now)
        it.wait(6.0)
        assert it.parts(NOTHING, a)["recent_errors"] == 0.0
        for server in (b, *it.servers[2:]):
            it.send(NOTHING, server)
        assert it.pick(NOTHING) is a
    else:
        go_down(a, it.now)
        it.wait(1.0)
        it.fleet.settle(it.now)
        come_up(a, it.now)
        assert it.parts(NOTHING, a)["recent_errors"] == 0.0


def test_adaptive_ejected_server_returns_slowly_after_probation():
    a, _, _ = (it := Situation()).servers
    eject(a, it.now)
    it.wait(6.0)
    lease = a.lease(it.now)
    lease.release()
    a.answered(it.now, trial=lease.trial)
    assert a in it.candidates
    assert it.parts(NOTHING, a)["slow_start"] == 0.1
    it.wait(5.0)
    assert it.parts(NOTHING, a)["slow_start"] == pytest.approx(0.5)


def test_adaptive_restarted_server_has_nothing_cached():
    a, _, _ = (it := Situation()).servers
    a.scraped(gauges(0, prompt_tokens=5000.0), it.now, 0)
    it.serve(LONG, a)
    assert it.parts(LONG, a)["cached_tokens"] > 0
    a.scraped(gauges(0, prompt_tokens=10.0), it.now + 0.5, 0)
    it.wait(1.0)
    assert it.parts(LONG, a)["cached_tokens"] == 0


# -- several routers ---------------------------------------------------------------------------


def crowd(it: Situation, running: float = 6.0) -> None:
    """Gauges show more requests than we sent."""
    for _ in range(20):
        for server in it.servers:
            server.scraped(gauges(running), it.now, server.in_flight)
        it.pick(NOTHING)
        it.wait(0.5)


def test_adaptive_estimated_load_of_other_routers_is_added():
    it = Situation(capacity=32)
    a, _, _ = it.servers
    for server in it.servers:
        for _ in range(3):
            it.send(NOTHING, server)
    crowd(it)
    for server in it.servers:
        server.scraped(gauges(6), it.now, 3)
    it.pick(NOTHING)
    it.wait(0.2)
    it.send(NOTHING, a)
    it.send(NOTHING, a)
    assert it.parts(NOTHING, a)["others"] == pytest.approx(0.5 * 1 * 2, rel=0.05)


def test_adaptive_single_router_adds_no_estimate():
    it = Situation(capacity=32)
    for server in it.servers:
        for _ in range(6):
            it.send(NOTHING, server)
    crowd(it)
    it.send(NOTHING, it.servers[0])
    assert it.parts(NOTHING, it.servers[0])["others"] == 0


def test_adaptive_routers_agree_on_server_of_new_conversation():
    facts = asking(b"hello " * 50, conversation=12345)
    homes = set()
    for seed in range(6):
        it = Situation(count=4, capacity=32, seed=seed)
        crowd(it)
        homes.add(it.pick(facts).name)
    assert len(homes) == 1


def test_adaptive_guesses_no_server_where_other_routers_tell():
    facts = asking(b"hello " * 50, conversation=12345)
    picked = set()
    for seed in range(20):
        it = Situation(count=4, capacity=32, seed=seed)
        crowd(it)
        it.policy.hear_routers(True)
        picked.add(it.pick(facts).name)
        it.policy.hear_routers(False)
        assert {it.pick(facts).name for _ in range(5)} == {it.pick(facts).name}
    assert len(picked) > 1


def test_adaptive_later_turns_keep_server_across_routers():
    first = asking(CONTEXT[:8000], conversation=777)
    later = asking(CONTEXT[:12_000], conversation=777, earlier=8000)
    one, other = Situation(count=4, capacity=32), Situation(count=4, capacity=32, seed=2)
    for it in (one, other):
        crowd(it)
    home = one.send(first).server.name
    assert other.pick(later).name == home
    parts = other.parts(later, other.pick(later))
    assert (parts["cached_tokens"], parts["home"]) == (2000.0, 0.0)  # 4 bytes per token
    assert parts["uncached_tokens"] == 3000.0  # none is known to be cached


def test_adaptive_busy_affinity_server_is_passed_over():
    facts = asking(b"hello " * 50, conversation=12345)
    it = Situation(count=4, capacity=32)
    crowd(it)
    home = it.pick(facts)
    for _ in range(10):
        it.send(NOTHING, home)
    assert it.pick(facts) is not home


@pytest.mark.parametrize("why", ["slow", "failing", "recovering"])
def test_adaptive_unhealthy_affinity_server_attracts_no_load(why: str):
    """It has hardly any load, and its score is multiplied: a negative score would grow."""
    it = Situation(count=4, capacity=32)
    a, b, c, d = it.servers
    crowd(it)
    facts = next(
        facts
        for facts in (asking(b"hello " * 50, conversation=n) for n in range(1, 99))
        if it.pick(facts) is a
    )
    if why == "slow":
        for _ in range(8):
            measure(it, {a: 0.05, b: 0.01, c: 0.01, d: 0.01}, running=12, idle=a)
    elif why == "failing":
        it.end(it.send(facts, a), failed=True)
        for server in it.servers:
            server.scraped(gauges(6 if server is not a else 0), it.now, 0)
    else:
        go_down(a, it.now)
        it.fleet.settle(it.now)
        come_up(a, it.now)
        a.scraped(gauges(0), it.now, 0)
    assert it.parts(facts, b)["others"] >= 0
    assert it.policy._cache(it.candidates, "m", it.now).has_peers
    assert {row.score > 0 for row in it.policy.explain(it.candidates, facts, it.now)} == {True}
    assert it.parts(facts, a)["home"] == 0


# -- explained ---------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [False, True])
def test_adaptive_score_consists_of_shown_terms(others: bool):
    it = Situation(count=4, capacity=8)
    a, b, c, d = it.servers
    for _ in range(4):
        measure(it, {a: 0.05, b: 0.01, c: 0.01, d: 0.012})
    if others:
        crowd(it)
    it.serve(LONG, b)
    it.serve(asking(CONTEXT[:4000]), c)
    it.send(asking(CONTEXT[:3000]), b)
    it.end(it.send(NOTHING, d), failed=True)
    it.wait(1.0)
    opening = asking(b"another text " * 200, conversation=9)
    for facts in (LONG, NOTHING, opening):
        shown = it.policy.explain(it.candidates, facts, it.now)
        assert [row.score for row in shown] == sorted(row.score for row in shown)
        for row in shown:
            assert row.score == pytest.approx(score_of(row.parts)), row.server
        before = it.pick(facts)
        assert it.scores(facts)[before.name] == pytest.approx(shown[0].score)
    assert any(it.parts(opening, one)["home"] for one in it.servers) is others
    assert it.parts(LONG, b)["cached_tokens"] > it.parts(LONG, c)["cached_tokens"] > 0


# -- accounts ----------------------------------------------------------------------------------


def test_adaptive_accounts_balance_when_all_requests_end():
    it = Situation()
    leases = [it.send(asking(CONTEXT[: 500 * n], stream=n % 2 == 0)) for n in range(30)]
    for lease in leases:
        it.end(lease)
    assert all(it.parts(NOTHING, server)["queued_tokens"] == 0 for server in it.servers)
    assert all(lease.reservation is None for lease in leases)


def test_adaptive_requests_without_choice_leave_no_state():
    """A single free server is taken without asking the policy, perhaps for days."""
    it = Situation(count=1)
    for n in range(1000):
        it.serve(asking(CONTEXT[:n], stream=False), it.servers[0])
        it.wait(1.0)
    assert len(it.policy._estimate(it.servers[0]).due) < 10


def test_adaptive_usage_teaches_token_size():
    it = Situation()
    facts = asking(CONTEXT[:9000])
    for _ in range(300):
        lease = it.send(facts, it.servers[0])
        it.policy.learned(lease, 4500, None)
        it.end(lease)
    it.send(asking(b"z" * 9000), it.servers[1])
    assert it.parts(NOTHING, it.servers[1])["queued_tokens"] == pytest.approx(4500, rel=0.02)


def test_adaptive_removed_server_is_forgotten():
    it = Situation()
    a = it.servers[0]
    it.serve(LONG, a)
    it.policy.forget(a)
    assert it.policy.statistics(a) is None
    it.serve(LONG, a)
    assert it.parts(LONG, it.servers[1])["waste_tokens"] > 0


def test_adaptive_statistics_report_expected_values():
    a, _, _ = (it := Situation()).servers
    for _ in range(3):
        it.serve(asking(CONTEXT[:8192]), a)
    found = it.policy.statistics(a)
    assert (found.prompt_tokens, found.expected_tokens, found.recorded_bytes) == (6144, 4096, 8192)
    assert found.reported_tokens == 0
    lease = it.send(asking(CONTEXT[:8192]), a)
    it.policy.learned(lease, 2048, 2032)
    it.end(lease)
    assert it.policy.statistics(a).reported_tokens == 2032


# -- refusing servers attract no load --------------------------------------------------------------


def share_of_refusing(policy, *, size: int, clients: int = 8, rounds: int = 400) -> float:
    """The share of a server that answers 400 at once among two, under closed-loop clients.

    Successful responses take 2 s, their first token 1 s. All prompts are different.
    """
    fleet = make_fleet(2)
    bad = fleet.servers["a"]
    now, sent = 100.0, Counter()
    waiting: list[tuple[float, Lease]] = []
    for number in range(rounds):
        text = bytes((number * 7 + n * n) % 251 for n in range(64)) * (size // 64)
        facts = asking(text)
        server = policy.pick(fleet.candidates("m", now), facts, now)[0]
        lease = server.lease(now)
        policy.leased(lease, None, facts, now)
        sent[server.name] += 1
        if server is bad:
            lease.release()
            policy.ended(lease, now + 0.002, failed=False, refused=True)
            fleet.record_error(server, now + 0.002, 0.002)
        else:
            waiting.append((now + 2.0, lease))
        now += 2.0 / clients
        for end, running in waiting:
            if running.last_byte_at == running.taken_at and end - 1.0 <= now:
                running.last_byte_at = end - 1.0
                policy.first_byte(running)
        while waiting and waiting[0][0] <= now:
            _, answered = waiting.pop(0)
            answered.release()
            policy.ended(answered, now, failed=False)
            fleet.record_success(answered.server, 2.0)
        fleet.settle(now)
    return sent[bad.name] / rounds


@pytest.mark.parametrize("size", [64, 30_000])
@pytest.mark.parametrize("policy", ["adaptive", "least_load", "power_of_two", "prefix"])
def test_adaptive_instantly_refusing_server_attracts_no_load(policy, size):
    share = share_of_refusing(POLICIES[policy](Random(3)), size=size)
    assert share < 0.62


@pytest.mark.parametrize("policy", ["adaptive", "prefix"])
def test_adaptive_refused_prompt_is_not_indexed(policy):
    it = Situation()
    it.policy = POLICIES[policy](Random(3))
    a, b, _ = it.servers
    shared, question = asking(CONTEXT[:20_000]), asking(CONTEXT)
    it.serve(shared, a)
    lease = it.send(question, a)
    lease.release()
    it.policy.ended(lease, it.now, failed=False, refused=True)
    it.serve(question, b)
    rows = {row.server: row.parts for row in it.policy.explain(it.candidates, question, it.now)}
    cached = "cached_tokens" if policy == "adaptive" else "cached_bytes"
    assert 0 < rows[a][cached] < 0.6 * rows[b][cached]
