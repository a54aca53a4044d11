"""The prefix index: matches, bounds, age, restarts, usage of responses."""

from __future__ import annotations

import tracemalloc
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fleet_makers import gauges, make_fleet
from vllm_router.routing.policies import PolicySettings
from vllm_router.routing.prefix.index import PrefixIndex
from vllm_router.routing.prefix.table import PrefixTable
from vllm_router.routing.prompt.blocks import BLOCK_BYTES, Prompt, hash_blocks, make_block_hash

A, B, C = 1, 2, 4
MANY = 10**9


def table(entries: int = MANY, expiry: float = 1e9) -> PrefixTable:
    return PrefixTable(entries, expiry)


def text(seed: int, size: int = 2560) -> bytes:
    return bytes((seed * 7 + n * n) % 251 for n in range(size))


def test_prefix_index_match_gives_length_per_server():
    known = table()
    chain = hash_blocks(text(1))
    known.insert(chain[:3], A, MANY, 0.0)
    known.insert(chain, B, MANY, 0.0)
    assert known.match(chain, A | B | C) == [(10, B), (3, A)]
    assert known.match(chain, A | C) == [(3, A)]
    assert known.match(chain[:2], A | B) == [(2, A | B)]


def test_prefix_index_unknown_prompt_matches_nothing():
    known = table()
    assert known.match((), A) == []
    known.insert(hash_blocks(text(1)), A, MANY, 0.0)
    assert known.match(hash_blocks(text(2)), A) == []
    assert known.match(hash_blocks(text(1)), B) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([A, B, C])), max_size=30))
def test_prefix_index_match_agrees_with_insertions(inserted: list[tuple[int, int]]):
    # Prompt n begins with the first 2n pieces of all later ones.
    prompts = [hash_blocks(text(0, 512 * n) + text(n, 512)) for n in range(6)]
    known = table()
    for n, bit in inserted:
        known.insert(prompts[n], bit, MANY, 0.0)
    for chain in prompts:
        found = {
            bit: count for count, bits in known.match(chain, 7) for bit in (A, B, C) if bits & bit
        }
        for bit in (A, B, C):
            held = {link for n, to in inserted if to == bit for link in prompts[n]}
            expected = next((n for n, link in enumerate(chain) if link not in held), len(chain))
            assert found.get(bit, 0) == expected


def test_prefix_index_capacity_evicts_prompt_ends_first():
    known = table()
    chain = hash_blocks(text(1))
    known.insert(chain, A, 5 * 256, 0.0)
    assert known.held(A) == 5 * 256
    assert known.match(chain, A) == [(5, A)]


def test_prefix_index_evicts_least_recently_used_first():
    known = table()
    old, kept, new = (hash_blocks(text(n, 1024)) for n in range(3))
    for now, chain in enumerate((old, kept, kept, new)):
        known.insert(chain, A, 8 * 256, float(now))
    assert known.match(old, A) == []
    assert known.match(kept, A) == [(4, A)]


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 20))
def test_prefix_index_entries_never_exceed_bound(prompts: list[int], bound: int):
    known = table(entries=bound)
    for n in prompts:
        known.insert(hash_blocks(text(n, 256 * (n % 7))), A, MANY, 0.0)
    assert len(known) <= bound


def test_prefix_index_entries_expire():
    known = table(expiry=10.0)
    early, late = hash_blocks(text(1)), hash_blocks(text(2))
    known.insert(early, A, MANY, 0.0)
    known.insert(late, B, MANY, 9.0)
    known.sweep(15.0)
    assert known.match(early, A | B) == []
    assert known.match(late, A | B) == [(10, B)]
    assert known.held(A) == 0


def test_prefix_index_forgetting_one_server_keeps_others():
    known = table()
    chain = hash_blocks(text(1))
    known.insert(chain, A, MANY, 0.0)
    known.insert(chain, B, MANY, 0.0)
    known.forget(A)
    assert known.match(chain, A | B) == [(10, B)]
    known.forget(B)
    assert len(known) == known.held(A) == known.held(B) == 0


# -- servers, restarts, tokens -----------------------------------------------------------------


def prompt(seed: int = 1, size: int = 2560) -> Prompt:
    return Prompt(hash_blocks(text(seed, size)), size)


def test_prefix_index_of_restarted_server_is_empty():
    fleet = make_fleet(2)
    a, b = fleet.servers.values()
    book = PrefixIndex(PolicySettings())
    for server in (a, b):
        server.scraped(gauges(0, prompt_tokens=100.0), 1.0, 0)
        book.insert(server, prompt(), 1.0)
    a.scraped(gauges(0, prompt_tokens=3.0), 2.0, 0)
    book.follow((a, b), 2.0)
    assert book.match((a, b), prompt()) == {b: 2560}


def test_prefix_index_is_bounded_by_kv_cache_per_server():
    fleet = make_fleet(2)
    a, b = fleet.servers.values()
    book = PrefixIndex(PolicySettings())
    a.scraped(gauges(0, kv_tokens=256), 1.0, 0)
    for server in (a, b):
        book.insert(server, prompt(), 1.0)
    assert book.match((a, b), prompt()) == {a: 1024, b: 2560}


@pytest.mark.parametrize(("megabytes", "count"), [(1.0, 1), (1.0, 3), (2.0, 1)])
def test_prefix_index_memory_stays_bounded_under_churn(megabytes: float, count: int):
    """Dictionaries whose entries are replaced all the time are larger than those just filled."""
    servers = tuple(make_fleet(count).servers.values())
    rng = Random(1)
    tracemalloc.start()
    try:
        book = PrefixIndex(PolicySettings(prefix_memory_mb=megabytes))
        for now in range(500):
            chain = tuple(make_block_hash(rng.getrandbits(60), place) for place in range(50))
            book.insert(servers[now % count], Prompt(chain, 50 * BLOCK_BYTES), now / 10)
            del chain
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.25 * megabytes < used / 1e6 < megabytes


def test_prefix_index_memory_is_shared_between_servers():
    fleet = make_fleet(4)
    servers = tuple(fleet.servers.values())
    book = PrefixIndex(PolicySettings(prefix_memory_mb=0.0072))
    for _ in range(2):
        for seed, server in enumerate(servers):
            book.insert(server, prompt(seed), 1.0)
    assert len(book.table) == 20


def test_prefix_index_memory_of_removed_servers_is_used_by_the_others():
    fleet = make_fleet(4)
    servers = tuple(fleet.servers.values())
    book = PrefixIndex(PolicySettings(prefix_memory_mb=0.0072))
    for server in servers:
        book.insert(server, prompt(), 1.0)
    for server in servers[1:]:
        book.forget(server)
    for seed in range(4):
        book.insert(servers[0], prompt(seed), 2.0)
    assert len(book.table) == 20


def test_prefix_index_bit_of_removed_server_is_reused():
    fleet = make_fleet(3)
    a, b, c = fleet.servers.values()
    book = PrefixIndex(PolicySettings())
    bits = [book.bit(server) for server in (a, b)]
    book.insert(a, prompt(), 1.0)
    book.forget(a)
    assert book.bit(c) == bits[0]
    assert book.match((b, c), prompt()) == {}


def test_prefix_index_shrinks_for_server_that_evicts_sooner():
    fleet = make_fleet(1)
    (server,) = fleet.servers.values()
    server.scraped(gauges(0, kv_tokens=640), 1.0, 0)
    book = PrefixIndex(PolicySettings())
    book.insert(server, prompt(), 1.0)
    assert book.matched_bytes(server, prompt()) == 2560
    for _ in range(200):
        book.judge(server, 600.0, 0)
    book.insert(server, prompt(), 2.0)
    assert book.matched_bytes(server, prompt()) == 512


def test_token_size_is_learnt_per_model():
    book = PrefixIndex(PolicySettings())
    for _ in range(200):
        book.learn("chinese", prompt(), 1280)
    assert abs(book.tokens_per_byte("chinese", prompt()) - 0.5) < 0.01
    assert book.tokens_per_byte("other", prompt()) == 0.25


def test_token_size_of_token_ids_needs_no_estimate():
    exact = Prompt((), 1000, 170)
    assert PrefixIndex(PolicySettings()).tokens_per_byte(None, exact) == 0.17


def test_token_size_learnt_models_are_bounded():
    book = PrefixIndex(PolicySettings())
    for n in range(300):
        book.learn(str(n), prompt(), 640)
    assert len(book._bytes_per_token) <= 256


# -- usage at the end of answers ---------------------------------------------------------------
