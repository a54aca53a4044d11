"""Which servers a request alone can have broken, by what else has failed."""

from __future__ import annotations

import pytest

from support.fleet_makers import go_down, make_fleet
from vllm_router.fleet.server import Server
from vllm_router.proxy.failures import RECENT, SAME_MOMENT, End, Failures

MINE, OTHER, THIRD = 1, 2, 3


def servers(count: int = 3) -> list[Server]:
    return list(make_fleet(count).servers.values())


def suspects(
    failures: Failures, fleet: list[Server], *ends: End, key: int | None = MINE
) -> list[str]:
    return [server.name for server in failures.suspect(ends, key, fleet)]


def test_failures_suspect_server_that_failed_this_request_only():
    failures, fleet = Failures(), servers()
    failures.note(fleet[0], MINE, 6.0, deadly=False)
    assert suspects(failures, fleet, End(fleet[0], 5.0, 6.0, deadly=False)) == ["a"]


@pytest.mark.parametrize(("sent_at", "expected"), [(1.5, ["a"]), (2.0, ["a"]), (2.5, [])])
def test_failures_suspect_excludes_server_that_failed_another_before(sent_at, expected):
    """The first failure of another request counts, not the latest one."""
    failures, fleet = Failures(), servers()
    for key, now in ((MINE, 1.0), (OTHER, 2.0), (THIRD, 5.0), (MINE, 6.0)):
        failures.note(fleet[0], key, now, deadly=False)
    assert suspects(failures, fleet, End(fleet[0], sent_at, 6.0, deadly=False)) == expected


def test_failures_before_a_sign_of_life_are_forgotten():
    failures, fleet = Failures(), servers()
    failures.note(fleet[0], OTHER, 1.0, deadly=False)
    fleet[0].last_byte_at = 2.0
    end = End(fleet[0], 3.0, 6.0, deadly=False)
    assert suspects(failures, fleet, end) == ["a"]
    failures.note(fleet[0], MINE, 6.0, deadly=False)
    assert suspects(failures, fleet, end) == ["a"]
    fleet[0].last_byte_at = 1.0
    failures.note(fleet[0], OTHER, 6.5, deadly=False)
    assert suspects(failures, fleet, End(fleet[0], 7.0, 8.0, deadly=False)) == []


@pytest.mark.parametrize(
    ("apart", "expected"),
    [(-1.5, ["a"]), (-SAME_MOMENT, []), (0.0, []), (SAME_MOMENT, []), (1.5, ["a"])],
)
def test_failures_suspect_excludes_servers_failing_together(apart, expected):
    failures, fleet = Failures(), servers()
    failures.note(fleet[0], MINE, 10.0, deadly=False)
    failures.note(fleet[1], OTHER, 10.0 + apart, deadly=False)
    assert suspects(failures, fleet, End(fleet[0], 9.0, 10.0, deadly=False)) == expected


def test_failures_suspect_equal_request_elsewhere_needs_known_good_server():
    failures, fleet = Failures(), servers()
    failures.note(fleet[0], MINE, 10.0, deadly=False)
    failures.note(fleet[1], MINE, 10.0, deadly=False)
    end = End(fleet[0], 9.0, 10.0, deadly=False)
    assert suspects(failures, fleet, end) == ["a"]
    assert suspects(failures, fleet, end, key=None) == []


def test_failures_suspect_own_servers_do_not_explain_each_other():
    failures, fleet = Failures(), servers()
    ends = [End(server, 9.0, 10.0, deadly=False) for server in fleet[:2]]
    for end in ends:
        failures.note(end.server, MINE, 10.0, deadly=False)
    assert suspects(failures, fleet, *ends) == ["a", "b"]


def test_failures_suspect_crashes_are_explained_by_crashes_only():
    failures, fleet = Failures(), servers()
    failures.note(fleet[0], MINE, 10.0, deadly=True)
    failures.note(fleet[1], OTHER, 10.0, deadly=False)
    end = End(fleet[0], 9.0, 10.0, deadly=True)
    assert suspects(failures, fleet, end) == ["a"]
    failures.note(fleet[1], OTHER, 10.5, deadly=True)
    assert suspects(failures, fleet, end) == []


@pytest.mark.parametrize(("deadly", "expected"), [(True, []), (False, ["a"])])
def test_failures_suspect_crash_is_explained_by_other_server_going_down(deadly, expected):
    failures, fleet = Failures(), servers()
    go_down(fleet[1], 10.5)
    assert suspects(failures, fleet, End(fleet[0], 9.0, 10.0, deadly=deadly)) == expected


def test_failures_expire_after_a_time():
    failures, fleet = Failures(), servers()
    assert failures.is_free(fleet[0], 0.0)
    failures.note(fleet[0], MINE, 10.0, deadly=True)
    assert not failures.is_free(fleet[0], 10.0 + RECENT - 0.1)
    assert failures.is_free(fleet[0], 10.0 + RECENT)
    failures.note(fleet[0], MINE, 30.0, deadly=True)
    failures.forget(fleet[0])
    assert failures.is_free(fleet[0], 30.0)
    assert suspects(failures, fleet, End(fleet[1], 29.0, 30.0, deadly=True)) == ["b"]
