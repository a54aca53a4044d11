"""Merging the batches of other processes: routing, levels, silence, keys, and hostile senders."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import pytest

from support.fleet_makers import make_fleet
from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.server import Server
from vllm_router.routing.owners import Entry
from vllm_router.routing.policies import PolicySettings
from vllm_router.routing.policy_set import PolicySet
from vllm_router.routing.prompt.blocks import Prompt, hash_blocks
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.routing.sharing.messages import (
    About,
    Batch,
    Figures,
    KeyUse,
    ServerLevel,
    decode,
    encode,
    pack_blocks,
)
from vllm_router.routing.sharing.outbox import Outbox
from vllm_router.routing.sharing.peers import FORGOTTEN_AFTER, GONE_AFTER, MAX_PEERS, Peers

ABOUT = About("n", "v", "c", 1.0, 0)
TEXT = bytes(n * n % 251 for n in range(40_000))
PROMPT = Prompt(hash_blocks(TEXT), len(TEXT), conversation=1)
LONG = RoutingInfo("m", stream=True, prompt=PROMPT)


class Noted:
    """Effects that only note the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def spent(self, key: str, requests: int, at: float) -> None:
        self.calls.append(("spent", key, requests, at))

    def spent_unheard(self, key: str, requests: int, at: float) -> None:
        self.calls.append(("unheard", key, requests, at))

    def running(self, requests: dict[str, int]) -> None:
        self.calls.append(("running", requests))

    def ejected(self, server: Server, now: float) -> None:
        self.calls.append(("ejected", server.name, now))

    def quarantined(self, digest: bytes, age: float, now: float) -> None:
        self.calls.append(("quarantined", digest, age))

    def owner(self, entry: Entry) -> None:
        self.calls.append(("owner", *entry))

    def scraped(self, router: str, figures: Mapping[str, Figures], at: float, now: float) -> None:
        self.calls.append(("scraped", router, dict(figures), at, now))

    def of(self, kind: str) -> list[tuple[object, ...]]:
        return [call[1:] for call in self.calls if call[0] == kind]


class Router:
    """One router of a fleet: its own servers and policies."""

    def __init__(self, name: str, policy: str = "adaptive") -> None:
        self.fleet = make_fleet(3)
        self.policies = PolicySet(Random(1), policy, {}, PolicySettings())
        self.outbox = Outbox(name)
        self.policies.tell(self.outbox)
        self.noted = Noted()
        self.peers = Peers(name, self.policies, self.fleet.by_url, self.noted)

    def send(self, info: RoutingInfo, server: str, now: float = 0.0):
        lease = self.fleet.servers[server].lease(now)
        self.policies.default.leased(lease, None, info, now)
        return lease

    def pick(self, info: RoutingInfo, now: float = 0.0) -> str:
        return self.policies.default.pick(self.fleet.candidates("m", now), info, now)[0].name

    def waits(self, adapter: str, now: float) -> set[str]:
        """The servers on which a request for it would wait for a slot."""
        candidates = self.fleet.candidates("m", now)
        rows = self.policies.default.explain(candidates, RoutingInfo(adapter), now)
        return {row.server.name for row in rows if row.parts["adapter_wait"]}

    def batch(self, now: float = 0.0) -> Batch:
        queued = self.policies.queued_tokens()
        levels = {server.url: ServerLevel(tokens, 0) for server, tokens in queued.items()}
        return decode(encode(self.outbox.batch(ABOUT, levels, {}, now)))

    def queued(self, server: str, now: float = 0.0) -> float:
        rows = self.policies.default.explain(self.fleet.candidates("m", now), LONG, now)
        return next(row.parts["queued_tokens"] for row in rows if row.server.name == server)


def batch(number: int = 1, router: str = "r1", **fields) -> Batch:
    return Batch(router, number, ABOUT, **fields)


def queue(tokens: float) -> dict[str, ServerLevel]:
    return {"http://a.test:1": ServerLevel(tokens, 2)}


@pytest.mark.parametrize("policy", ["adaptive", "prefix"])
@pytest.mark.parametrize("server", ["a", "b", "c"])
def test_peers_prompt_of_one_router_is_known_to_the_other(policy: str, server: str):
    """The next turn of a conversation goes where another router has sent the first one."""
    one, other = Router("r1", policy), Router("r2", policy)
    lease = one.send(LONG, server)
    lease.release()
    one.policies.default.ended(lease, 0.0, failed=False)
    other.peers.hear(one.batch(), 0.0)
    other.peers.settle(0.0)
    assert {other.pick(LONG) for _ in range(20)} == {server}


def test_peers_tell_policies_whether_other_routers_are_heard():
    router = Router("r1")
    default = router.policies.default
    router.peers.hear(batch(router="sibling"), 0.0, sibling=True)
    router.peers.settle(0.0)
    assert not default.hears_routers
    router.peers.hear(batch(router="r2"), 1.0)
    router.peers.settle(1.0)
    assert default.hears_routers
    assert router.peers.others(1.0) == {"r2"}
    assert router.peers.others(1.0 + GONE_AFTER + 0.1) == frozenset()
    assert router.policies.named("session").hears_routers
    router.peers.settle(1.5 + GONE_AFTER)
    assert not default.hears_routers


@pytest.mark.parametrize("policy", ["adaptive", "prefix"])
def test_peers_refused_prompt_of_another_router_is_forgotten(policy: str):
    one, other = Router("r1", policy), Router("r2", policy)
    lease = one.send(LONG, "b")
    other.peers.hear(one.batch(), 0.0)
    lease.release()
    one.policies.default.ended(lease, 0.0, failed=False, refused=True)
    other.peers.hear(one.batch(), 0.0)
    assert len({other.pick(LONG) for _ in range(50)}) == 3


def test_peers_blocks_of_a_policy_can_be_taken_over_whole():
    one, other = Router("r1"), Router("r2")
    for number, server in enumerate("abcabc"):
        text = TEXT[number * 1000 :]
        prompt = Prompt(hash_blocks(text), len(text), conversation=number)
        one.send(RoutingInfo("m", stream=True, prompt=prompt), server)
    for number, (server, hashes) in enumerate(one.policies.blocks(50)):
        placed = [(server.url, pack_blocks(hashes))]
        other.peers.hear(batch(number + 1, placed=placed), 0.0)
    mine, theirs = one.policies.default.index.table, other.policies.default.index.table
    assert {tuple(mine.blocks(1 << bit)) for bit in range(3)} == {
        tuple(theirs.blocks(1 << bit)) for bit in range(3)
    }


def test_peers_queued_tokens_count_until_the_router_is_silent():
    router = Router("r2")
    router.peers.hear(batch(servers=queue(5000)), 10.0)
    router.peers.settle(10.0)
    assert router.queued("a", 10.0) == 5000
    assert "a" not in {router.pick(LONG, 10.0) for _ in range(30)}
    router.peers.settle(10.0 + GONE_AFTER)
    assert router.queued("a", 10.0) == 5000
    router.peers.settle(10.1 + GONE_AFTER)
    assert router.queued("a", 10.0) == 0
    assert router.peers.in_flight == {}


def test_peers_queued_tokens_of_others_are_not_announced_as_own():
    """Else two routers would tell each other their own tokens for ever."""
    one, other = Router("r1"), Router("r2")
    lease = one.send(LONG, "a")
    own = one.batch().servers
    assert own["http://a.test:1"].queued > 1000
    one.peers.hear(batch(router="r2", servers=queue(700)), 0.0)
    one.peers.settle(0.0)
    assert one.batch().servers == own
    one.policies.default.first_byte(lease)
    assert one.batch().servers == {}
    assert one.queued("a") == 700
    other.peers.settle(0.0)


def test_peers_adapters_of_other_routers_need_slots_until_they_are_silent():
    """So two routers agree which server has no slot for an adapter."""
    one, other = Router("r1"), Router("r2")
    cards = {"m": {"id": "m"}} | {name: {"id": name, "parent": "m"} for name in ("x", "y", "z")}
    for router in (one, other):
        for server in router.fleet.servers.values():
            server.listed(cards, 0.0)
            server.scraped(EngineMetrics(running=0.0, max_adapters=1), 0.0, 0)
        router.pick(RoutingInfo("m"))
    leases = [one.send(RoutingInfo(name), place) for name, place in (("x", "a"), ("y", "b"))]
    announced = one.policies.adapter_requests()
    assert {server.name: named for server, named in announced.items()} == {
        "a": {"x": 1},
        "b": {"y": 1},
    }
    levels = {server.url: ServerLevel(0, 1, named) for server, named in announced.items()}
    other.peers.hear(batch(servers=levels), 10.0)
    other.peers.settle(10.0)
    assert other.policies.adapter_requests() == {}  # they are not its own
    assert {other.pick(RoutingInfo("z"), 10.0) for _ in range(30)} == {"c"}
    assert {other.pick(RoutingInfo("x"), 10.0) for _ in range(30)} == {"a"}
    assert other.waits("z", 10.0) == {"a", "b"}
    other.peers.settle(10.1 + GONE_AFTER)
    assert other.waits("z", 10.0) == set()
    for lease in leases:
        one.policies.default.ended(lease, 11.0, failed=False)
    assert one.policies.adapter_requests() == {}


def test_peers_levels_of_several_routers_are_summed():
    router = Router("own")
    for name in ("r1", "r2"):
        router.peers.hear(batch(router=name, servers=queue(300)), 0.0)
    router.peers.settle(0.0)
    assert router.queued("a") == 600
    assert router.peers.in_flight == {"http://a.test:1": 4}
    assert [server.elsewhere for server in router.fleet.servers.values()] == [4, 0, 0]
    router.peers.settle(GONE_AFTER + 1)
    assert [server.elsewhere for server in router.fleet.servers.values()] == [0, 0, 0]


def test_peers_repeated_and_overtaken_batches_are_ignored():
    router = Router("own")
    router.peers.hear(batch(5, servers=queue(100)), 0.0)
    router.peers.hear(batch(5, servers=queue(999)), 0.0)
    router.peers.hear(batch(4, servers=queue(999)), 0.0)
    router.peers.settle(0.0)
    assert router.queued("a") == 100
    assert router.peers.outdated == 2


def test_peers_own_batch_and_unknown_servers_change_nothing():
    router = Router("own")
    router.peers.hear(batch(router="own", servers=queue(100)), 0.0)
    unknown = {"http://elsewhere:1": ServerLevel(100.0, 1)}
    placed = [("http://elsewhere:1", pack_blocks([1]))]
    router.peers.hear(batch(servers=unknown, placed=placed), 0.0)
    router.peers.settle(0.0)
    assert router.queued("a") == 0
    assert router.peers.unknown == 1
    assert [view.router for view in router.peers.views(0.0)] == ["r1"]


def test_peers_key_use_is_the_difference_of_totals():
    router = Router("own")
    for number, (use, at) in enumerate(
        [(KeyUse(100, 3, 2), 0.0), (KeyUse(110, 10, 0), 0.2), (KeyUse(130, 5, 0), 0.6)], 1
    ):
        router.peers.hear(batch(number, keys={"team": use}), at)
        router.peers.settle(at)
    # The last one follows a batch that was lost.
    assert router.noted.of("spent") == [("team", 3, 0.0), ("team", 10, 0.2), ("team", 20, 0.6)]
    assert router.noted.of("running") == [({"team": 2},), ({},)]


def test_peers_key_use_during_an_interruption_does_not_count():
    """Each router had its own share of the limit then; to subtract it would stop the key."""
    router = Router("own")
    router.peers.hear(batch(1, keys={"team": KeyUse(10, 10, 0)}), 0.0)
    router.peers.hear(batch(2, keys={"team": KeyUse(5000, 0, 0)}), 60.0)
    router.peers.hear(batch(3, keys={"team": KeyUse(5004, 4, 0)}), 60.2)
    assert [call[1] for call in router.noted.of("spent")] == [10, 4]


def test_peers_key_use_before_this_router_listened_counts_apart():
    router = Router("own")
    use = KeyUse(5000, 0, 0, unheard=90)
    router.peers.hear(batch(7, keys={"team": use}, interrupted=60.0), 30.0, 10.0, past=True)
    router.peers.hear(batch(8, keys={"team": KeyUse(5004, 4, 0)}), 30.0, 9.8, past=True)
    router.peers.hear(batch(9, keys={"team": use}), 30.0)  # `interrupted` was cleared
    assert router.noted.of("unheard") == [("team", 90, 20.0)]
    assert [call[1] for call in router.noted.of("spent")] == [4]


def test_peers_late_batch_changes_no_key_and_no_health():
    router = Router("own")
    late = batch(1, keys={"team": KeyUse(9, 9, 1)}, ejected=["http://a.test:1"])
    router.peers.hear(late, 100.0, age=30.0)
    router.peers.settle(100.0)
    assert router.noted.calls == []


def test_peers_past_batch_counts_for_lasting_facts_only():
    """A router that starts reads the last minutes: prompts, owners, quarantine, use of keys."""
    router = Router("own")
    past = batch(
        1,
        servers=queue(900),
        placed=[("http://b.test:1", pack_blocks(PROMPT.block_hashes))],
        keys={"team": KeyUse(9, 9, 1)},
        ejected=["http://a.test:1"],
        quarantined=[bytes(16)],
        owners=[(bytes(16), "http://a.test:1", "")],
    )
    router.peers.hear(past, 100.0, age=20.0, past=True)
    router.peers.settle(100.0)
    assert {router.pick(LONG, 100.0) for _ in range(10)} == {"b"}
    assert router.queued("a", 100.0) == 0
    assert router.noted.calls == [
        ("quarantined", bytes(16), 20.0),
        ("owner", bytes(16), "http://a.test:1", ""),
        ("spent", "team", 9, 80.0),
    ]


def test_peers_ejection_is_reported_for_known_servers():
    router = Router("own")
    router.peers.hear(batch(ejected=["http://a.test:1", "http://unknown:1"]), 7.0)
    assert router.noted.of("ejected") == [("a", 7.0)]


def test_peers_sibling_shares_prompts_and_nothing_else():
    router = Router("own")
    news = batch(servers=queue(50), keys={"team": KeyUse(9, 9, 1)}, ejected=["http://a.test:1"])
    router.peers.hear(news, 0.0, sibling=True)
    router.peers.settle(0.0)
    assert router.queued("a") == 50
    assert router.noted.of("spent") == router.noted.of("ejected") == []
    assert router.peers.views(0.0) == []


def test_peers_many_routers_are_bounded_and_the_silent_one_goes():
    router = Router("own")
    for number in range(3 * MAX_PEERS):
        router.peers.hear(batch(router=f"r{number}"), number * 0.001)
    views = router.peers.views(1.0)
    assert len(views) == MAX_PEERS
    assert {view.router for view in views} == {f"r{n}" for n in range(2 * MAX_PEERS, 3 * MAX_PEERS)}


def test_peers_views_show_share_silence_and_age():
    router = Router("own")
    for number in range(1, 100):
        about = About("gw", "1.0", "abc", float(number), 20 * number)
        router.peers.hear(Batch("r1", number, about, servers=queue(0)), number * 0.2)
    now = 99 * 0.2
    (view,) = router.peers.views(now)
    assert (view.about.name, view.live, view.in_flight, view.silent) == ("gw", True, 2, 0.0)
    assert 60 < view.rate <= 100.1
    (view,) = router.peers.views(now + 5)
    assert (view.live, view.in_flight, view.rate) == (False, 0, 0.0)
    router.peers.settle(now + FORGOTTEN_AFTER + 1)
    assert router.peers.views(now) == []
