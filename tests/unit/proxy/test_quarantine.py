"""The quarantine of requests that crash servers."""

from __future__ import annotations

import pytest

from support.fleet_makers import go_down, make_fleet
from vllm_router.fleet.active_health import Check
from vllm_router.proxy.quarantine import (
    KEPT_BYTES,
    KNOWN_BODIES,
    MOST,
    REMEMBERED_FOR,
    Death,
    Origin,
    Quarantine,
    fingerprint,
)

BODY = b'{"prompt":"x"}'
PATH = b"/v1/completions"
KEY = fingerprint(PATH, BODY)


def two_deaths(*, certain: bool = True) -> tuple[Death, Death]:
    a, b = make_fleet(2).servers.values()
    return Death(a, 10.0, certain), Death(b, 10.0, certain)


def test_quarantine_key_is_path_and_body():
    assert fingerprint(PATH, BODY) == fingerprint(PATH, bytes(bytearray(BODY)))
    assert fingerprint(b"/v1/embeddings", BODY) != KEY
    long = b"a" * 100_000
    assert fingerprint(PATH, long) == fingerprint(PATH, b"a" * 100_000)
    assert fingerprint(b"/v1/embeddings", long) != fingerprint(PATH, long)
    for other in (long + b"a", b"b" + long[1:], long[:-1] + b"b"):
        assert fingerprint(PATH, other) != fingerprint(PATH, long)
    middle = long[:50_000] + b"b" + long[50_001:]
    assert fingerprint(PATH, middle) == fingerprint(PATH, long)


def test_quarantine_entry_expires_after_a_minute():
    quarantine = Quarantine()
    assert not quarantine.holds(KEY, 10.0)
    quarantine.remember(KEY, BODY, two_deaths(), 10.0)
    assert quarantine.holds(KEY, 10.0)
    assert not quarantine.holds(KEY + 1, 10.0)
    assert quarantine.holds(KEY, 10.0 + REMEMBERED_FOR - 0.1)
    assert not quarantine.holds(KEY, 10.0 + REMEMBERED_FOR)
    assert not quarantine.entries


def test_quarantine_without_crash_is_empty():
    quarantine = Quarantine()
    deaths = two_deaths(certain=False)
    quarantine.remember(KEY, BODY, deaths, 10.0)
    assert not quarantine.holds(KEY, 11.0)
    go_down(deaths[0].server, 12.0)
    assert not quarantine.holds(KEY, 12.0)
    deaths[1].server.checked(Check.UNHEALTHY, 0.01, 12.0)
    assert quarantine.holds(KEY, 12.0)


def test_quarantine_crashed_and_restarted_server_counts():
    """vLLM restarts within a minute; the request must not crash it once more."""
    deaths = two_deaths(certain=False)
    quarantine = Quarantine()
    quarantine.remember(KEY, BODY, deaths, 10.0)
    for death in deaths:
        go_down(death.server, 12.0)
        while not death.server.active_health.up:
            death.server.checked(Check.GOOD, 0.01, 13.0)
        assert death.server.active_health.failures_in_row == 0
    assert quarantine.holds(KEY, 14.0)


def test_quarantine_server_found_down_as_the_attempt_ends_counts():
    deaths = two_deaths(certain=False)
    for death in deaths:
        death.server.went_down_at = death.at
        assert death.happened
        death.server.went_down_at = death.at - 0.001
        assert not death.happened


def test_quarantine_each_entry_has_a_minute_of_its_own():
    quarantine = Quarantine()
    quarantine.remember(KEY, BODY, two_deaths(), 10.0)
    quarantine.remember(KEY + 1, b"other", two_deaths(), 20.0)
    assert not quarantine.holds(KEY, 10.0 + REMEMBERED_FOR)
    assert quarantine.holds(KEY + 1, 10.0 + REMEMBERED_FOR)


def test_quarantine_repeated_entry_becomes_the_newest():
    quarantine = Quarantine()
    deaths = two_deaths()
    for key in range(MOST):
        quarantine.remember(key, BODY, deaths, 10.0)
    quarantine.remember(1, BODY, deaths, 11.0)
    assert quarantine.holds(0, 11.0)
    quarantine.remember(MOST, BODY, deaths, 12.0)
    quarantine.remember(MOST + 1, BODY, deaths, 12.0)
    assert [quarantine.holds(key, 12.0) for key in (0, 1, 2, 3)] == [False, True, False, True]
    assert len(quarantine.entries) == MOST == 1024


def test_quarantine_ignores_crash_before_request():
    deaths = two_deaths(certain=False)
    for death in deaths:
        go_down(death.server, 5.0)
        while not death.server.active_health.up:
            death.server.checked(Check.GOOD, 0.01, 6.0)
    quarantine = Quarantine()
    quarantine.remember(KEY, BODY, deaths, 10.0)
    assert not quarantine.holds(KEY, 11.0)


def test_quarantine_entry_is_forgotten():
    quarantine = Quarantine()
    quarantine.remember(KEY, BODY, two_deaths(), 10.0)
    quarantine.forget(KEY)
    quarantine.forget(KEY)
    assert not quarantine.entries


def test_quarantine_entry_is_cleared_by_success():
    quarantine = Quarantine()
    quarantine.remember(KEY, BODY, two_deaths(), 10.0)
    quarantine.answered(PATH, b"another")
    assert quarantine.holds(KEY, 11.0)
    quarantine.answered(PATH, BODY)
    assert not quarantine.holds(KEY, 11.0)


@pytest.mark.parametrize(("others", "known"), [(KNOWN_BODIES - 1, True), (KNOWN_BODIES, False)])
def test_quarantine_ignores_body_answered_lately(others, known):
    quarantine = Quarantine()
    quarantine.answered(PATH, BODY)
    for number in range(others):
        quarantine.answered(PATH, b"%d" % number)
    quarantine.remember(KEY, BODY, two_deaths(), 10.0)
    assert quarantine.holds(KEY, 10.0) is not known


def test_quarantine_size_is_bounded():
    quarantine = Quarantine()
    for number in range(MOST + 10):
        quarantine.remember(number, b"%d" % number, two_deaths(), 10.0)
    assert len(quarantine.entries) == MOST
    assert not quarantine.holds(9, 10.0)
    assert quarantine.holds(10, 10.0)
    for number in range(KNOWN_BODIES + 10):
        quarantine.answered(PATH, b"%d" % number)
        quarantine.answered(PATH, b"x" * (KEPT_BYTES + number))
    assert len(quarantine.known) == KNOWN_BODIES


@pytest.mark.parametrize("size", [5_000, KEPT_BYTES, KEPT_BYTES + 1, 1_000_000])
def test_quarantine_long_body_answered_lately_is_not_added(size):
    body = b'{"prompt":"' + b"x" * size + b'"}'
    key = fingerprint(PATH, body)
    quarantine = Quarantine()
    quarantine.answered(PATH, body)
    quarantine.remember(key, body, two_deaths(), 10.0)
    assert not quarantine.holds(key, 10.0)
    other = body + b" "
    quarantine.remember(fingerprint(PATH, other), other, two_deaths(), 10.0)
    assert quarantine.holds(fingerprint(PATH, other), 10.0)


def test_quarantine_long_answered_bodies_are_not_kept_in_memory():
    quarantine = Quarantine()
    for size in (KEPT_BYTES, KEPT_BYTES + 1, 10 * KEPT_BYTES):
        quarantine.answered(PATH, b"a" * size)
    kept = [len(one) for one in quarantine.known if isinstance(one, bytes)]
    assert kept == [KEPT_BYTES]
    assert KEPT_BYTES == 16_384


def test_quarantine_crash_at_the_moment_of_failure_counts():
    (server,) = make_fleet(1).servers.values()
    go_down(server, 10.0)
    while not server.active_health.up:
        server.checked(Check.GOOD, 0.01, 11.0)
    assert Death(server, 10.0, certain=False).happened
    assert not Death(server, 10.1, certain=False).happened


@pytest.mark.parametrize("end", ["answered", "forgotten"])
def test_quarantine_request_leaves_it_under_both_models(end):
    quarantine, origin = Quarantine(), Origin.of(PATH, b'{"model":"own"}')
    quarantine.remember(KEY, BODY, two_deaths(), 10.0, origin)
    assert quarantine.holds(KEY, 11.0)
    assert quarantine.holds(origin.key, 11.0)
    if end == "answered":
        quarantine.answered(PATH, BODY, origin)
    else:
        quarantine.forget(KEY, origin)
    assert not quarantine.entries
