"""The contract of every policy, and the simple policies."""

from __future__ import annotations

import copy
from collections import Counter
from random import Random

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from support.fleet_makers import make_fleet
from vllm_router.fleet.server import Server
from vllm_router.lab.simulate.rivals import RIVALS
from vllm_router.routing.policies import POLICIES, POLICY_NAMES, Policy, PolicySettings
from vllm_router.routing.policies.blind import MAX_MODELS
from vllm_router.routing.prompt.blocks import Prompt, hash_blocks
from vllm_router.routing.prompt.routing_info import RoutingInfo

EVERY = {**POLICIES, **RIVALS}


def servers(count: int = 4, capacity: int = 4) -> tuple[Server, ...]:
    described = [
        {"url": f"http://{n}.test:1", "name": f"s{n}", "max_concurrent_requests": capacity}
        for n in range(count)
    ]
    return tuple(make_fleet(described).servers.values())


def asking(text: bytes = b"", session: str | None = None, shared: int = 0) -> RoutingInfo:
    prompt = Prompt(hash_blocks(text), len(text), None, shared, 0, hash(text) & 0xFFFFFFFF)
    return RoutingInfo("m", stream=True, session=session, prompt=prompt)


def make(name: str, seed: int = 1) -> Policy:
    return EVERY[name](Random(seed), PolicySettings())


def load(server: Server, requests: int) -> None:
    for _ in range(requests):
        server.lease(0.0)


def test_policies_names_equal_documentation():
    assert POLICY_NAMES == (
        "adaptive", "least_load", "power_of_two", "prefix", "random", "round_robin", "session",
    )  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), max_size=40),
    st.integers(0, 1000),
)
@settings(max_examples=40)
def test_policies_pick_is_always_a_candidate(steps: list[tuple[int, int, bool]], seed: int):
    for name in EVERY:
        note(name)
        use(make(name, seed), steps)


def use(policy: Policy, steps: list[tuple[int, int, bool]]) -> None:
    four = servers()
    for now, (text, kept, failed) in enumerate(steps):
        facts = asking(bytes([text]) * 1000, session=str(text))
        candidates = four[kept % 4 :]
        server = policy.pick(candidates, facts, float(now))[0]
        assert server in candidates
        lease = server.lease(float(now))
        policy.leased(lease, None, facts, float(now))
        if kept % 2:
            policy.first_byte(lease)
        if kept > 2:
            policy.ended(lease, now + 0.5, failed=failed)
            lease.release()
    policy.forget(four[0])
    assert policy.pick(four[1:], asking(), 100.0)[0] in four[1:]


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_policies_explain_changes_nothing_and_has_row_per_candidate(name: str):
    explained, other = make(name), make(name)
    four, same = servers(), servers()
    for now in range(20):
        facts = asking(bytes([now % 3]) * 900)
        rows = explained.explain(four, facts, float(now))
        if rows is not None:
            assert {row.server for row in rows} == set(four)
            assert [row.score for row in rows] == sorted(row.score for row in rows)
        one, two = (
            explained.pick(four, facts, float(now))[0],
            other.pick(same, facts, float(now))[0],
        )
        assert one.name == two.name
        for policy, server in ((explained, one), (other, two)):
            policy.leased(server.lease(float(now)), None, facts, float(now))


@pytest.mark.parametrize("name", ["adaptive", "least_load", "prefix"])
def test_policies_explain_first_row_is_the_pick(name: str):
    policy, four = make(name), servers()
    for now in range(30):
        facts = asking(bytes([now % 3]) * 900)
        rows = policy.explain(four, facts, float(now))
        assert rows is not None
        picked = policy.pick(four, facts, float(now))[0]
        lowest = [row.server for row in rows if row.score == rows[0].score]
        assert picked in lowest
        policy.leased(picked.lease(float(now)), None, facts, float(now))


@pytest.mark.parametrize("name", ["adaptive", "least_load"])
def test_policies_equal_servers_share_by_chance(name: str):
    policy, four = make(name), servers()
    picked = Counter(policy.pick(four, asking(), 1.0)[0].name for _ in range(400))
    assert set(picked) == {server.name for server in four}
    assert min(picked.values()) > 50


def test_round_robin_takes_each_server_in_turn():
    policy, four = make("round_robin"), servers()
    picked = [policy.pick(four, asking(), 1.0)[0] for _ in range(8)]
    assert picked[:4] == picked[4:]
    assert set(picked) == set(four)


def test_round_robin_two_models_in_turn_use_all_their_servers():
    policy, four = make("round_robin"), servers()
    picked: Counter[Server] = Counter()
    for _ in range(6):
        for model, some in (("m", four[:2]), ("n", four[2:])):
            picked[policy.pick(some, RoutingInfo(model), 0.0)[0]] += 1
    assert [picked[server] for server in four] == [3, 3, 3, 3]


def test_round_robin_copy_leaves_the_turn_of_the_policy():
    policy, four = make("round_robin"), servers()
    policy.pick(four, asking(), 0.0)
    tried = copy.copy(policy).pick(four, asking(), 0.0)
    assert policy.pick(four, asking(), 0.0) == tried


def test_round_robin_remembers_a_bounded_number_of_models():
    policy, four = make("round_robin"), servers()
    for number in range(3 * MAX_MODELS):
        policy.pick(four, RoutingInfo(str(number)), 0.0)
    assert len(policy._turns) <= MAX_MODELS


@pytest.mark.parametrize("name", ["round_robin", "random"])
def test_policies_blind_to_load_spare_a_server_in_slow_start(name: str):
    policy, four = make(name), servers()
    four[1].load_estimate.slow_start_factor = 0.0
    picked = Counter(policy.pick(four, asking(), 1.0)[0] for _ in range(100))
    assert picked[four[1]] <= 1  # by chance after as many tries as there are servers
    assert len(picked) >= 3


def test_power_of_two_never_takes_busiest():
    policy, four = make("power_of_two"), servers()
    load(four[2], 5)
    assert four[2] not in {policy.pick(four, asking(), 1.0)[0] for _ in range(100)}


def test_power_of_two_takes_only_candidate():
    policy, (alone,) = make("power_of_two"), servers(1)
    assert policy.pick((alone,), asking(), 1.0)[0] is alone


# -- session -----------------------------------------------------------------------------------


def test_session_keeps_server_on_every_router():
    four = servers()
    homes = {
        name: {make("session", seed).pick(four, asking(session=name), 1.0) for seed in range(5)}
        for name in map(str, range(30))
    }
    assert all(len(home) == 1 for home in homes.values())
    assert len(set.union(*homes.values())) == 4


def test_session_missing_is_replaced_by_first_turn():
    four, policy = servers(), make("session")
    assert len({policy.pick(four, asking(b"a" * 300), 1.0)[0] for _ in range(10)}) == 1
    assert len({policy.pick(four, asking(b"%d" % n * 300), 1.0)[0] for n in range(30)}) == 4


def test_session_of_neither_id_nor_conversation_goes_to_the_lowest_load():
    policy, four = make("session"), servers()
    nothing = RoutingInfo("m", prompt=Prompt(size=60))
    picked = Counter(policy.pick(four, nothing, 0.0)[0] for _ in range(200))
    assert set(picked) == set(four)
    for server in four[1:]:
        load(server, 1)
    assert policy.pick(four, nothing, 0.0)[0] is four[0]


def test_session_moves_only_with_its_server():
    four, policy = servers(), make("session")
    for name in map(str, range(40)):
        before = policy.pick(four, asking(session=name), 1.0)[0]
        after = policy.pick(four[1:], asking(session=name), 1.0)[0]
        assert after is before or before is four[0]


def test_session_moves_while_its_server_is_busier():
    four, policy = servers(), make("session")
    home = policy.pick(four, asking(session="s"), 1.0)[0]
    load(home, 10)
    assert policy.pick(four, asking(session="s"), 1.0)[0] is not home
    for server in four:
        load(server, 10 - server.in_flight)
    assert policy.pick(four, asking(session="s"), 1.0)[0] is home


def test_session_hashing_spreads_by_capacity():
    big, small = servers(1, capacity=9)[0], servers(2, capacity=3)[1]
    policy = make("session")
    picked = Counter(policy.pick((big, small), asking(session=str(n)), 1.0)[0] for n in range(400))
    assert 250 < picked[big] < 350


# -- prefix ------------------------------------------------------------------------------------


def test_prefix_policy_follows_cache():
    four, policy = servers(), make("prefix")
    facts = asking(b"a" * 2000)
    policy.leased(four[2].lease(0.0), None, facts, 0.0)
    assert policy.pick(four, facts, 1.0)[0] is four[2]
    for row in policy.explain(four, facts, 1.0):
        assert row.score == -row.parts["cached_bytes"]
        assert (row.score < 0) == (row.server is four[2])


def test_prefix_policy_explains_a_restarted_server_as_empty():
    four, policy = servers(), make("prefix")
    info = asking(b"x" * 2000)
    lease = four[2].lease(0.0)
    policy.leased(lease, None, info, 0.0)
    lease.release()
    four[2].restarts += 1
    rows = policy.explain(four, info, 0.0)
    assert [row.parts["cached_bytes"] for row in rows] == [0, 0, 0, 0]


def test_prefix_policy_never_overrides_busier_server():
    four, policy = servers(), make("prefix")
    facts = asking(b"a" * 2000)
    policy.leased(four[2].lease(0.0), None, facts, 0.0)
    load(four[2], 6)
    assert policy.pick(four, facts, 1.0)[0] is not four[2]


# -- other policies ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chwbl", "chwbl-prefix"])
def test_consistent_hashing_stays_until_bound(name: str):
    policy, four = make(name), servers()
    facts = asking(b"x" * 1000)
    home = policy.pick(four, facts, 0.0)[0]
    assert {policy.pick(four[::-1], facts, 0.0)[0] for _ in range(5)} == {home}
    for server in four:
        load(server, 4)
    load(home, 1)
    assert policy.pick(four, facts, 0.0)[0] is home  # 5 of a mean of 4.5
    load(home, 1)
    assert policy.pick(four, facts, 0.0)[0] is not home


def test_consistent_hashing_uses_question_or_beginning():
    system = b"s" * 2000
    four = servers()
    asked = [asking(system + bytes([n]) * 500) for n in range(32)]
    for name, homes in (("chwbl", 4), ("chwbl-prefix", 1)):
        policy = make(name)
        assert len({policy.pick(four, facts, 0.0)[0] for facts in asked}) == homes


def test_llm_d_keeps_prefix_server_until_saturated():
    policy, four = make("llm-d-sticky"), servers()
    facts = asking(b"x" * 8000)

    def send(server: Server, what: RoutingInfo) -> None:
        policy.leased(server.lease(0.0), None, what, 0.0)

    first = policy.pick(four, facts, 0.0)[0]
    send(first, facts)
    assert policy.pick(four, facts, 0.0)[0] is first
    send(first, asking(b"y" * 1_100_000))
    assert policy.pick(four, facts, 0.0)[0] is first
    send(first, asking(b"z" * 100_000))
    assert policy.pick(four, facts, 0.0)[0] is not first
