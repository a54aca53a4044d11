"""Admission of sessions: which ones fit into the KV caches of the servers."""

from __future__ import annotations

from support.fleet_makers import gauges, make_fleet
from vllm_router.fleet.server import Server
from vllm_router.routing.prompt.blocks import Prompt
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.routing.queue.session_leases import MAX_SESSIONS, SessionLeases


def servers(count: int = 2, kv_tokens: int | None = 1000) -> tuple[Server, ...]:
    found = tuple(make_fleet(count).servers.values())
    for server in found:
        server.scraped(gauges(0, kv_tokens=kv_tokens), 0.0, 0)
    return found


def asked(session: str | None, tokens: int = 600, conversation: int = 0) -> RoutingInfo:
    prompt = Prompt(size=4 * tokens, conversation=conversation)
    return RoutingInfo("m", session=session, prompt=prompt)


def test_session_fits_beside_others_or_alone():
    a, b = servers()
    leases = SessionLeases(30.0)
    assert leases.fitting(asked("one"), (a, b), 0.0) == [a, b]
    leases.begin(asked("one"), a, 0.0)
    assert leases.fitting(asked("two"), (a, b), 0.0) == [b]
    assert leases.fitting(asked("two", 400), (a, b), 0.0) == [a, b]
    assert leases.fitting(asked("huge", 5000), (a, b), 0.0) == [b]
    leases.begin(asked("two"), b, 0.0)
    assert leases.fitting(asked("three"), (a, b), 0.0) == []


def test_session_is_new_once_and_named_by_id_or_conversation():
    (a,) = servers(1)
    leases = SessionLeases(30.0)
    for info in (asked("one"), asked(None, conversation=7)):
        assert leases.is_new(info)
        leases.begin(info, a, 0.0)
        assert not leases.is_new(info)
    assert not leases.is_new(asked(None))
    assert len(leases) == 2


def test_session_lease_ends_when_idle_but_not_while_a_request_runs():
    (a,) = servers(1)
    leases = SessionLeases(30.0)
    leases.begin(asked("runs"), a, 0.0)
    leases.begin(asked("idle", 100), a, 0.0)
    leases.end(asked("idle", 100), 5.0)
    leases.expire(34.0)
    assert leases.held(a) == 700
    leases.expire(36.0)
    assert leases.held(a) == 600
    leases.end(asked("runs"), 50.0)
    leases.expire(79.0)
    assert leases.held(a) == 600
    leases.expire(81.0)
    assert (leases.held(a), len(leases)) == (0, 0)


def test_session_grows_and_moves_with_its_last_request():
    a, b = servers()
    leases = SessionLeases(30.0)
    leases.begin(asked("one", 100), a, 0.0)
    leases.begin(asked("one", 300), b, 1.0)
    assert (leases.held(a), leases.held(b)) == (0, 300)


def test_session_fits_where_the_cache_size_is_unknown():
    (a,) = servers(1, kv_tokens=None)
    leases = SessionLeases(30.0)
    leases.begin(asked("one", 10**9), a, 0.0)
    assert leases.fitting(asked("two", 10**9), (a,), 0.0) == [a]


def test_sessions_are_bounded():
    (a,) = servers(1)
    leases = SessionLeases(1e9)
    for number in range(MAX_SESSIONS + 10):
        leases.begin(asked(f"session-{number}", 1), a, 0.0)
    assert len(leases) == MAX_SESSIONS == leases.held(a)
    leases.end(asked("session-0", 1), 1.0)
