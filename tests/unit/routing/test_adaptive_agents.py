"""The adaptive policy for agents: adapters, working sets, full KV caches and unequal servers."""

from __future__ import annotations

from collections import Counter, OrderedDict
from random import Random
from typing import Any

import pytest

from support.fleet_makers import gauges, make_fleet
from vllm_router.fleet.model_seeds import seed_of_name
from vllm_router.fleet.server import Lease, Server
from vllm_router.routing.adapters import (
    PRIOR_WEIGHT,
    WAIT_PENALTY,
    AdapterServers,
    LoadedAdapters,
    SwapCost,
    with_adapters,
)
from vllm_router.routing.large_score_cache import LARGE
from vllm_router.routing.policies import PolicySettings
from vllm_router.routing.policies.adaptive import Adaptive
from vllm_router.routing.prompt.blocks import Prompt, hash_blocks
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.routing.server_estimate import ServerEstimate
from vllm_router.routing.working_sets import MAX_CONVERSATIONS, WorkingSets, overflow

CONTEXT = bytes(n * n % 251 for n in range(40_000))
ADAPTERS = ("lora-a", "lora-b", "lora-c", "lora-d", "lora-e")


class Fleet:
    """Three servers with a base model and adapters, and the policy."""

    def __init__(self, count: int = 3, kv_tokens: int = 400_000, **settings: float) -> None:
        self.now = 100.0
        self.fleet = make_fleet(
            [
                {"url": f"http://{n}.test:1", "name": f"s{n}", "max_concurrent_requests": 8}
                for n in range(count)
            ]
        )
        self.policy = Adaptive(Random(1), PolicySettings(**settings))
        cards: dict[str, dict[str, Any]] = {"base": {"id": "base", "parent": None}}
        cards |= {name: {"id": name, "parent": "base"} for name in ADAPTERS}
        self.servers = tuple(self.fleet.servers.values())
        for server in self.servers:
            server.listed(cards, self.now)
            self.scrape(server, kv_tokens=kv_tokens)
        self.fleet.settle(self.now)

    def scrape(self, server: Server, running: float = 0.0, **figures: Any) -> None:
        server.scraped(gauges(running, **figures), self.now, server.in_flight)

    def candidates(self, model: str) -> tuple[Server, ...]:
        return self.fleet.candidates(model, self.now)

    def pick(self, info: RoutingInfo) -> Server:
        return self.policy.pick(self.candidates(info.model or ""), info, self.now)[0]

    def send(self, info: RoutingInfo, server: Server | None = None) -> Lease:
        note: object = None
        if server is None:
            server, note = self.policy.pick(self.candidates(info.model or ""), info, self.now)
        lease = server.lease(self.now)
        self.policy.leased(lease, note, info, self.now)
        return lease

    def serve(self, info: RoutingInfo, server: Server | None = None) -> Server:
        lease = self.send(info, server)
        lease.release()
        self.policy.ended(lease, self.now, failed=False)
        return lease.server

    def parts(self, info: RoutingInfo, server: Server) -> dict[str, float]:
        rows = self.policy.explain(self.candidates(info.model or ""), info, self.now)
        return next(row.parts for row in rows if row.server is server)


def asking(model: str, text: bytes = b"", **marks: int) -> RoutingInfo:
    hashes = hash_blocks(text, seed=seed_of_name(model))
    return RoutingInfo(model, stream=True, prompt=Prompt(hashes, len(text), **marks))


# -- adapters ----------------------------------------------------------------------------------


def test_adapter_prefix_does_not_count_for_another_adapter_or_base():
    it = Fleet()
    it.serve(asking("lora-a", CONTEXT), it.servers[0])
    assert it.parts(asking("lora-a", CONTEXT), it.servers[0])["cached_tokens"] > 9000
    for other in ("lora-b", "base"):
        assert it.parts(asking(other, CONTEXT), it.servers[0])["cached_tokens"] == 0


@pytest.mark.parametrize("text", [b"", CONTEXT[:3000]])
def test_adapter_stays_where_it_is_loaded(text: bytes):
    it = Fleet()
    homes = {name: it.serve(asking(name, text)) for name in ADAPTERS[:3]}
    for _ in range(20):
        for name, home in homes.items():
            assert it.serve(asking(name, text)) is home


def test_adapter_spreads_when_its_server_is_overloaded():
    it = Fleet()
    home = it.serve(asking("lora-a"))
    sent = Counter(it.send(asking("lora-a")).server for _ in range(40))
    assert len(sent) == 3
    assert sent[home] >= 10


def test_adapter_running_by_metrics_is_loaded():
    it = Fleet()
    it.now += 1.0
    it.scrape(it.servers[2], max_adapters=2, adapters=("lora-e",))
    assert it.pick(asking("lora-e")) is it.servers[2]
    parts = it.parts(asking("lora-e"), it.servers[2])
    assert parts["adapter_tokens"] == 5000
    assert parts["waste_tokens"] == 0
    assert it.parts(asking("lora-e"), it.servers[0])["waste_tokens"] == 5000


def test_adapters_loaded_are_bounded_by_slots():
    loaded = LoadedAdapters()
    for name in ADAPTERS:
        loaded.begin(name)
        loaded.end(name)
    assert held(loaded) == [False, True, True, True, True]
    loaded.slots = 1
    loaded.report(["lora-b"])
    assert held(loaded) == [False, True, False, False, False]


def held(loaded: LoadedAdapters) -> list[bool]:
    return [name in loaded for name in ADAPTERS]


def test_adapters_with_running_requests_keep_their_slots():
    loaded = LoadedAdapters()
    loaded.slots = 2
    for name in ("lora-a", "lora-b", "lora-b"):
        loaded.begin(name)
    assert loaded.is_full
    loaded.begin("lora-c")
    loaded.begin("lora-d")
    loaded.end("lora-d")  # given up while it waited
    loaded.end("lora-b")
    assert held(loaded) == [True, True, False, False, False]
    loaded.end("lora-b")
    assert held(loaded) == [True, False, True, False, False]
    assert loaded.is_full
    loaded.end("lora-c")
    assert not loaded.is_full
    loaded.begin("lora-e")
    assert held(loaded) == [True, False, False, False, True]


def test_adapters_that_the_server_reports_need_their_slots():
    """Other routers send requests, too."""
    loaded = LoadedAdapters()
    loaded.slots = 2
    loaded.begin("lora-a")
    loaded.report(["lora-a", "lora-b"])
    assert held(loaded) == [True, True, False, False, False]
    assert loaded.is_full
    assert not loaded.is_awaited
    assert not loaded.begin("lora-c")
    assert loaded.is_awaited
    loaded.end("lora-a")  # reported, but it was ours
    assert held(loaded) == [False, True, True, False, False]
    assert not loaded.is_awaited
    loaded.report(["lora-c", "lora-d"], ["lora-e"])
    assert loaded.is_awaited
    loaded.report([])
    loaded.end("lora-c")
    assert not loaded.is_full


def test_adapter_that_the_server_runs_did_not_wait():
    """Another one's requests have ended earlier than we know."""
    loaded = LoadedAdapters()
    loaded.slots = 1
    loaded.report(["lora-a"])
    assert not loaded.begin("lora-b")
    loaded.report(["lora-b"])
    assert held(loaded)[:2] == [False, True]
    assert loaded.running["lora-b"] == 1
    assert not loaded.is_awaited


def test_adapter_that_waits_by_the_server_is_not_loaded():
    """Another router's requests got the slot."""
    loaded = LoadedAdapters()
    loaded.slots = 1
    assert loaded.begin("lora-a")
    loaded.report(["lora-b"], ["lora-a"])
    assert held(loaded)[:2] == [False, True]
    assert loaded.is_awaited
    assert not loaded.begin("lora-a")
    loaded.end("lora-a")
    loaded.end("lora-a")
    assert not loaded.is_awaited


def test_adapter_that_waits_for_the_next_step_awaits_no_slot():
    """Its request had just come; there is a slot."""
    loaded = LoadedAdapters()
    loaded.slots = 2
    loaded.begin("lora-a")
    loaded.begin("lora-b")
    loaded.end("lora-b")
    loaded.begin("lora-c")
    loaded.report(["lora-a"], ["lora-a", "lora-c"])
    assert held(loaded)[0:3:2] == [True, True]
    assert not loaded.is_awaited


def test_adapters_of_other_processes_need_their_slots():
    loaded = LoadedAdapters()
    loaded.slots = 2
    loaded.begin("lora-a")
    loaded.set_elsewhere({"lora-a": 2, "lora-b": 1})
    assert held(loaded) == [True, True, False, False, False]
    assert loaded.requests("lora-a") == 3
    assert loaded.own == {"lora-a": 1}
    assert loaded.is_full
    assert not loaded.begin("lora-c")
    loaded.report(["lora-a", "lora-b"], ["lora-c"])
    loaded.set_elsewhere({"lora-a": 2})
    assert held(loaded)[1:3] == [False, True]
    loaded.set_elsewhere({"lora-a": 2, "lora-b": 1})
    assert loaded.is_awaited  # by the other process both run, and there are two slots
    loaded.set_elsewhere({})
    loaded.end("lora-a")
    assert not loaded.is_full


def test_adapter_is_loaded_where_no_other_is_evicted():
    """Else few adapters evict each other on the one server that has no other traffic."""
    it = Fleet(count=3)
    for server in it.servers:
        it.scrape(server, max_adapters=2)
    seen: dict[str, set[Server]] = {}
    for _ in range(5):
        for busy in it.servers[:2] * 5:
            it.serve(asking("base", CONTEXT, conversation=1), busy)
        for name in ADAPTERS[:4]:
            seen.setdefault(name, set()).add(it.serve(asking(name, CONTEXT, conversation=1)))
            it.now += 1.0
    assert [len(servers) for servers in seen.values()] == [1] * 4
    assert len(set.union(*seen.values())) > 1


def test_adapter_tokens_count_twice_where_others_have_no_slot_left():
    it = Fleet(count=3)
    for server in it.servers:
        it.scrape(server, max_adapters=2)
    home, _, occupied = it.servers
    it.serve(asking("lora-a"), home)
    assert it.parts(asking("lora-a"), home)["adapter_tokens"] == 5000  # all have a slot left
    it.serve(asking("lora-b"), occupied)
    it.serve(asking("lora-c"), occupied)
    parts = [it.parts(asking("lora-a"), server) for server in it.servers]
    assert [one["adapter_tokens"] for one in parts] == [10_000, 5000, 0]
    assert [one["waste_tokens"] for one in parts] == [0, 5000, 10_000]
    assert it.pick(asking("lora-d")) is not occupied


def test_adapter_keeps_the_server_with_most_requests_of_all_processes():
    index = AdapterServers()
    one, other, third = (LoadedAdapters(1 << place, index) for place in range(3))
    for server in (one, other, third):
        server.slots = 1
    for server in (one, one, other):
        server.begin("lora-a")
    third.begin("lora-b")
    third.begin("lora-c")
    assert index.slots_for("lora-a", 0b111) == (0b011, 0b110)
    other.set_elsewhere({"lora-a": 5})
    assert index.slots_for("lora-a", 0b111) == (0b011, 0b101)


def test_adapter_slots_of_server_that_left_do_not_count_for_next_with_its_bit():
    index = AdapterServers()
    gone = LoadedAdapters(1, index)
    gone.slots = 1
    gone.set_elsewhere({"lora-a": 1, "lora-b": 1})
    assert gone.is_full
    assert gone.is_awaited
    gone.leave()
    new = LoadedAdapters(1, index)
    assert not new.is_full
    assert index.slots_for("lora-c", 1) == (0, 0)
    new.begin("lora-c")
    other = LoadedAdapters(2, index)
    other.begin("lora-c")
    assert index.slots_for("lora-c", 3) == (3, 0)


def test_adapter_goes_where_no_slot_is_needed_by_other_routers():
    it = Fleet(count=2)
    it.now += 1.0
    it.scrape(it.servers[0], max_adapters=2, adapters=("lora-d", "lora-e"))
    it.scrape(it.servers[1], running=30.0, max_adapters=2, adapters=("lora-d",))
    assert it.pick(asking("lora-a")) is it.servers[1]
    assert it.parts(asking("lora-a"), it.servers[0])["adapter_wait"] == WAIT_PENALTY
    assert it.parts(asking("lora-d"), it.servers[0])["adapter_wait"] == 0


def test_adapters_of_stuck_gauges_need_no_slots():
    """After many aborts an idle engine shows requests, and their adapters (vllm#29928)."""
    it = Fleet(count=2)
    server = it.servers[0]
    it.now += 1.0
    it.scrape(server, running=1.0, max_adapters=1, adapters=("lora-d",))
    assert it.parts(asking("lora-a"), server)["adapter_wait"] == WAIT_PENALTY
    server.load_estimate.stuck = 1.0
    it.now += 1.0
    it.scrape(server, running=1.0, max_adapters=1, adapters=("lora-d",))
    assert it.parts(asking("lora-a"), server)["adapter_wait"] == 0


def test_adapters_of_new_process_need_no_slots():
    loaded = LoadedAdapters()
    loaded.slots = 1
    loaded.begin("lora-a")
    loaded.begin("lora-b")
    loaded.clear()
    loaded.end("lora-a")
    loaded.end("lora-b")
    loaded.begin("lora-c")
    assert held(loaded) == [False, False, True, False, False]
    loaded.end("lora-c")
    assert not loaded.is_full


def test_adapter_waits_for_no_slot_while_another_server_has_one():
    it = Fleet(count=2)
    for server in it.servers:
        it.scrape(server, max_adapters=1)
    home, other = it.servers
    it.send(asking("lora-a"), home)
    for _ in range(12):  # it has much more to do, but no need for its slot is in sight here
        it.send(asking("lora-b"), other)
    assert it.pick(asking("lora-b")) is other
    parts = it.parts(asking("lora-b"), home)
    assert parts["adapter_wait"] == WAIT_PENALTY
    assert it.parts(asking("lora-b"), other)["adapter_wait"] == 0
    assert it.parts(asking("base"), home)["adapter_wait"] == 0


def test_adapter_with_one_slot_too_many_gives_it_up_for_waiting_requests():
    """The hot adapter has two servers, and the one without a slot gets the second in time."""
    it = Fleet(count=2)
    for server in it.servers:
        it.scrape(server, max_adapters=1)
    home, other = it.servers
    for server in (home, home, home, other):
        hot = it.send(asking("lora-a"), server)
    assert it.parts(asking("lora-a"), other)["adapter_wait"] == 0
    assert it.send(asking("lora-b")).server is other
    assert it.parts(asking("lora-a"), other)["adapter_wait"] == WAIT_PENALTY
    assert [it.send(asking("lora-a")).server for _ in range(5)] == [home] * 5
    it.policy.ended(hot, it.now, failed=False)
    assert it.parts(asking("lora-b"), other)["adapter_wait"] == 0
    assert it.parts(asking("lora-b"), home)["adapter_wait"] == WAIT_PENALTY


@pytest.mark.parametrize(
    ("waits", "expected"),
    [
        ((False, False, False), 0b000),  # no request waits: both keep it
        ((False, False, True), 0b101),  # on the third, which has no slot; the second has more
        ((False, True, False), 0b110),  # where none waits
        ((True, True, False), 0b101),
    ],
)
def test_slots_for_adapter_on_two_servers_keeps_one_if_requests_wait(
    waits: tuple[bool, ...], expected: int
):
    index = AdapterServers()
    servers = [LoadedAdapters(1 << place, index) for place in range(len(waits))]
    for one, holds in zip(servers, (1, 2, 0), strict=True):
        one.slots = 1
        for _ in range(holds):
            one.begin("lora-a")
    servers[2].slots = 1 if any(waits) else 2
    servers[2].begin("lora-b")
    for one, waiting in zip(servers, waits, strict=True):
        if waiting:
            assert not one.begin("lora-c")
    assert index.slots_for("lora-a", 0b111) == (0b011, expected)
    assert index.slots_for("lora-a", 0b101) == (0b001, 0b100 if any(waits) else 0)


def test_adapters_of_a_server_that_left_are_on_no_server():
    index = AdapterServers()
    left, other = LoadedAdapters(0b01, index), LoadedAdapters(0b10, index)
    for one in (left, other):
        one.slots = 1
        one.begin("lora-a")
    left.begin("lora-b")
    left.leave()
    assert index.slots_for("lora-a", 0b11) == (0b10, 0)
    assert index.slots_for("lora-b", 0b11) == (0, 0b10)
    left.end("lora-a")  # requests that still ran there
    left.end("lora-b")
    left.begin("lora-c")
    assert index.slots_for("lora-c", 0b11) == (0, 0b10)
    other.end("lora-a")
    assert index.slots_for("lora-c", 0b11) == (0, 0)


def test_adapter_goes_to_no_failing_server_only_for_its_free_slots():
    it = Fleet(count=2)
    for server in it.servers:
        it.scrape(server, max_adapters=1)
    busy, failing = it.servers
    it.send(asking("lora-a"), busy)
    it.policy.ended(it.send(asking("lora-a"), failing), it.now, failed=True)
    it.now += 0.2
    assert it.pick(asking("lora-b")) is busy
    assert it.parts(asking("lora-b"), failing)["adapter_wait"] == WAIT_PENALTY


def test_adapter_in_large_fleet_finds_a_free_slot_behind_the_shortlist():
    it = Fleet(count=LARGE)
    free = it.servers[LARGE // 2]
    for server in it.servers:
        it.scrape(server, max_adapters=1)
        it.send(asking("base" if server is free else "lora-a"), server)
    for _ in range(3):
        it.send(asking("base"), free)
    assert it.pick(asking("lora-b")) is free


def test_swap_cost_learns_nothing_from_requests_that_wait_for_a_slot():
    it = Fleet(count=1)
    it.scrape(it.servers[0], max_adapters=1)
    it.send(asking("lora-a"))
    before = it.parts(asking("lora-a"), it.servers[0])["adapter_tokens"]
    for _ in range(50):
        for model, seconds in (("base", 1.0), ("lora-b", 9.0)):
            lease = it.send(asking(model, CONTEXT))
            lease.last_byte_at = it.now + seconds
            it.policy.first_byte(lease)
    assert before > 0
    assert it.parts(asking("lora-a"), it.servers[0])["adapter_tokens"] == before


def test_adapter_with_a_single_server_needs_a_slot_there():
    it = Fleet(count=1)
    it.scrape(it.servers[0], max_adapters=1)
    lease = it.send(asking("lora-a"), it.servers[0])  # no policy is asked for the only candidate
    assert it.parts(asking("lora-b"), it.servers[0])["adapter_wait"] == WAIT_PENALTY
    it.policy.ended(lease, it.now, failed=False)
    assert it.parts(asking("lora-b"), it.servers[0])["adapter_wait"] == 0


def test_adapters_of_new_process_are_forgotten():
    it = Fleet()
    it.scrape(it.servers[0], prompt_tokens=100.0)
    it.serve(asking("lora-a"), it.servers[0])
    it.now += 1.0
    it.scrape(it.servers[0], prompt_tokens=1.0)
    it.now += 1.0
    assert it.parts(asking("lora-a"), it.servers[0])["adapter_tokens"] == 0


def test_swap_cost_is_learnt_from_first_tokens():
    cost = SwapCost(5000.0)
    for _ in range(200):
        cost.learn(0.1, 2000.0, adapter=True, swapped=False)
        cost.learn(0.9, 2000.0, adapter=True, swapped=True)
    assert cost.per_token == pytest.approx(5e-5)
    assert 12_000 < cost.tokens < 16_000  # 0.8 s at 50 µs per token
    for _ in range(200):
        cost.learn(1e9, 2000.0, adapter=True, swapped=True)
    assert cost.tokens <= 32_000


def test_swap_cost_of_few_swaps_is_their_mean_and_weighs_less_than_of_many():
    cost = SwapCost(5000.0)
    cost.learn(0.1, 2000.0, adapter=False, swapped=False)  # 50 µs per token
    cost.learn(0.3, 2000.0, adapter=True, swapped=True)
    cost.learn(0.5, 2000.0, adapter=True, swapped=True)
    share = 2 / (2 + PRIOR_WEIGHT)  # of the mean of 0.2 and 0.4 s
    assert cost.tokens == pytest.approx(5000.0 + share * (6000.0 - 5000.0))


def test_swap_cost_without_evidence_is_the_prior():
    cost = SwapCost(4000.0)
    cost.learn(0.5, 0.0, adapter=True, swapped=True)
    assert cost.tokens == 4000.0


def test_levels_with_adapters_are_sorted_and_disjoint():
    levels = [(900.0, 0b0011), (300.0, 0b0111)]
    assert with_adapters(levels, 0b1010, 500.0) == [
        (1400.0, 0b0010),
        (900.0, 0b0001),
        (500.0, 0b1000),
        (300.0, 0b0100),
    ]


# -- working sets ------------------------------------------------------------------------------


class Cache:
    """The prefix cache of an engine: block hashes, least recently used first."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.held: OrderedDict[int, None] = OrderedDict()

    def compute(self, hashes: tuple[int, ...]) -> int:
        """The number of leading blocks that were cached."""
        found = next((n for n, one in enumerate(hashes) if one not in self.held), len(hashes))
        for one in reversed(hashes):
            self.held[one] = None
            self.held.move_to_end(one)
        while len(self.held) > self.blocks:
            self.held.popitem(last=False)
        return found


def test_working_sets_spread_sequential_agents_over_idle_servers():
    """Twelve agents one after the other: all fit into the fleet, not into one server."""
    it = Fleet(kv_tokens=32_768)
    system = bytes(n * n % 241 for n in range(8_192))
    texts = [system + Random(n).randbytes(12_000) for n in range(12)]
    caches = {server: Cache(32_768 // 64) for server in it.servers}
    sent: Counter[Server] = Counter()
    hits = asked = 0
    for _ in range(5):
        for number, text in enumerate(texts):
            info = asking("base", text, shared=len(system), conversation=number + 1)
            server = it.serve(info)
            sent[server] += 1
            hashes = hash_blocks(text)
            # Blocks of 512 bytes count twice.
            hits += caches[server].compute(
                hashes[:32] + tuple(h for h in hashes[32:] for _ in "ab")
            )
            asked += len(hashes[:32]) + 2 * len(hashes[32:])
            texts[number] = text + Random(number).randbytes(1_000)
            it.now += 0.5
            for one in it.servers:
                it.scrape(one, kv_tokens=32_768)
    assert max(sent.values()) <= 40
    assert hits / asked > 0.8


def test_working_set_of_single_questions_has_no_weight():
    it = Fleet(kv_tokens=32_768)
    shared = CONTEXT[:8_192]
    for number in range(400):
        it.serve(asking("base", shared + b"%500d" % number, shared=8_192, conversation=number + 1))
        it.now += 0.1
    parts = it.parts(
        asking("base", shared + b"x" * 500, shared=8_192, conversation=999), it.servers[0]
    )
    assert parts["lost_tokens"] < 50


def test_working_set_window_of_zero_ignores_working_sets():
    it = Fleet(kv_tokens=1000, working_set_window=0.0)
    info = asking("base", CONTEXT, conversation=1)
    it.serve(info, it.servers[0])
    assert it.parts(info, it.servers[0])["footprint_tokens"] == 0
    assert it.parts(asking("base", CONTEXT[1:]), it.servers[0])["lost_tokens"] == 0


def estimates(it: Fleet) -> list[ServerEstimate]:
    return [it.policy._estimate(server) for server in it.servers]


def test_working_set_moves_with_its_conversation_and_expires():
    a, b, _ = estimates(Fleet())
    sets = WorkingSets(60.0)
    sets.note(1, a, 1000.0, 0.0)
    sets.note(2, a, 500.0, 10.0)
    sets.note(1, b, 1200.0, 20.0)
    assert (a.footprint, b.footprint, sets.mean) == (500.0, 1200.0, 850.0)
    sets.expire(71.0)
    assert (a.footprint, b.footprint, len(sets)) == (0.0, 1200.0, 1)
    sets.forget(b)
    assert (b.footprint, len(sets), sets.total) == (0.0, 0, 0.0)


def test_working_sets_are_bounded():
    a, *_ = estimates(Fleet())
    sets = WorkingSets(1e9)
    for key in range(MAX_CONVERSATIONS + 100):
        sets.note(key, a, 1.0, 0.0)
    assert len(sets) == MAX_CONVERSATIONS == a.footprint


def test_working_set_is_forgotten_with_its_server_and_its_process():
    it = Fleet()
    it.scrape(it.servers[0], prompt_tokens=100.0)
    info = asking("base", CONTEXT, conversation=1)
    it.serve(info, it.servers[0])
    it.now += 1.0
    assert it.parts(info, it.servers[0])["footprint_tokens"] == 10_000
    it.scrape(it.servers[0], prompt_tokens=1.0)
    it.now += 1.0
    assert it.parts(info, it.servers[0])["footprint_tokens"] == 0
    it.serve(info, it.servers[1])
    it.policy.forget(it.servers[1])
    assert len(it.policy._working_sets) == 0


@pytest.mark.parametrize(("footprint", "share"), [(0, 0), (25, 0), (62.5, 0.5), (100, 1), (900, 1)])
def test_overflow_grows_from_a_quarter_to_the_whole_cache(footprint: float, share: float):
    assert overflow(footprint, 100.0) == pytest.approx(share)


# -- the score ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running", "waiting", "stays"),
    [(190.0, 0.0, True), (240.0, 0.0, True), (180.0, 9.0, True), (400.0, 9.0, False)],
)
def test_cached_prefix_does_not_hold_traffic_on_a_server_with_far_more_load(
    running: float, waiting: float, stays: bool
):
    it = Fleet()
    info = asking("base", CONTEXT[:12_000])
    it.serve(info, it.servers[0])
    for server in it.servers[1:]:
        it.scrape(server, 160.0, kv_tokens=4_000_000)
    it.scrape(it.servers[0], running, waiting=waiting, kv_tokens=4_000_000)
    for _ in range(3):
        it.now += 0.2
        found = it.pick(info)
    assert (found is it.servers[0]) is stays


def test_conversation_stays_where_a_request_waits_behind_a_long_prompt():
    it = Fleet()
    info = asking("base", CONTEXT)
    it.serve(info, it.servers[0])
    for server in it.servers[1:]:
        it.scrape(server, 2.0, kv_tokens=4_000_000)
    it.scrape(it.servers[0], 3.0, waiting=1.0, kv_tokens=4_000_000)
    it.now += 1.0
    assert it.parts(info, it.servers[0])["cached_tokens"] > 0
    assert it.pick(info) is it.servers[0]


def test_recomputing_weighs_more_up_to_the_even_load_of_a_server():
    it = Fleet()
    info = asking("base", CONTEXT[:12_000])
    it.serve(info, it.servers[0])
    for server, running in zip(it.servers, (100.0, 80.0, 60.0), strict=True):
        it.scrape(server, running, kv_tokens=4_000_000)
    it.now += 1.0
    it.pick(info)
    it.now += 1.0
    rows = it.policy.explain(it.candidates("base"), info, it.now)
    found = {row.server: row for row in rows}
    for server, load, counted in zip(it.servers[1:], (80.0, 60.0), (80.0, 60.0), strict=True):
        parts = found[server].parts
        assert parts["load"] == load
        requests = 1 + load + parts["waste_tokens"] / 1000 * (1 + 0.5 * counted)
        assert found[server].score == pytest.approx(requests / parts["share"])


def test_kv_pressure_counts_usage_and_uncached_tokens():
    it = Fleet()
    for usage, server in zip((0.95, 0.80, 0.30), it.servers, strict=True):
        it.scrape(server, kv_usage=usage, kv_tokens=40_000)
    it.now += 1.0
    short, long = asking("base", b"x" * 400), asking("base", CONTEXT)
    assert it.parts(short, it.servers[0])["kv_pressure"] == pytest.approx(20 * 0.1 / 0.15, rel=0.1)
    assert it.parts(short, it.servers[1])["kv_pressure"] == 0
    expected = 20 * (0.80 + 10_000 / 40_000 - 0.85) / 0.15
    assert it.parts(long, it.servers[1])["kv_pressure"] == pytest.approx(expected)
    assert it.parts(long, it.servers[2])["kv_pressure"] == 0
    it.serve(long, it.servers[1])
    assert it.parts(long, it.servers[1])["kv_pressure"] == pytest.approx(0, abs=0.5)
    assert it.pick(short) is not it.servers[0]


def test_server_twice_as_fast_gets_more_without_weights():
    it = Fleet()
    totals = dict.fromkeys(it.servers, (0.0, 0.0))
    for _ in range(40):
        for server, latency in zip(it.servers, (0.010, 0.010, 0.006), strict=True):
            seconds, tokens = totals[server]
            totals[server] = seconds + 400 * latency, tokens + 400
            it.scrape(
                server,
                4.0,
                token_latency_sum=totals[server][0],
                token_latency_count=totals[server][1],
            )
        it.pick(asking("base"))
        it.now += 0.5
    assert it.parts(asking("base"), it.servers[2])["slow"] < 0.85
    assert it.parts(asking("base"), it.servers[0])["slow"] == 1.0


def test_prompt_growth_sends_long_prompts_to_few_servers():
    def picked(growth: float) -> Server:
        it = Fleet(prompt_growth=growth)
        for server, running in zip(it.servers, (6.0, 4.0, 4.0), strict=True):
            it.scrape(server, running, kv_tokens=400_000)
            if server is it.servers[0]:
                continue
            it.policy._estimate(server).queued = 1500.0
        return it.pick(asking("base", CONTEXT))

    assert picked(0.0).name == "s0"
    assert picked(0.5).name != "s0"


def test_explanation_has_footprint_and_cache_of_each_server():
    it = Fleet()
    info = asking("base", CONTEXT, shared=4000, conversation=7)
    it.serve(info, it.servers[0])
    parts = it.parts(info, it.servers[0])
    assert (parts["footprint_tokens"], parts["kv_tokens"]) == (9000.0, 400_000.0)
