"""Which priorities of a set are used."""

from __future__ import annotations

import pytest

from vllm_router.config.discovered import read_targets
from vllm_router.config.discovery import DiscoveryConfig, FileSource, Found, Target, TargetState
from vllm_router.discovery.priorities import up_to, used_priority

SET = (
    Target("a", priority=5),
    Target("b", priority=5),
    Target("c", priority=10),
    Target("d", state=TargetState.DRAIN, priority=0),
    Target("e", priority=20),
)


@pytest.mark.parametrize(
    ("good", "bad", "used"),
    [
        ("", "", 5),
        ("abce", "", 5),
        ("b", "a", 5),
        ("", "a", 5),
        ("c", "ab", 10),
        ("", "ab", 10),
        ("e", "abc", 20),
        ("", "abce", 20),
        ("d", "ab", 10),
    ],
)
def test_priority_in_use_is_the_first_with_a_server_that_does_not_fail(
    good: str, bad: str, used: int
) -> None:
    checks = dict.fromkeys(good, True) | dict.fromkeys(bad, False)
    assert used_priority(SET, checks.get) == used


def test_priority_of_an_empty_set_is_zero() -> None:
    assert used_priority((), {}.get) == 0


def test_priority_above_the_used_one_gets_the_unused_state() -> None:
    states = [one.state.value for one in up_to(SET, 5, TargetState.WAIT)]
    assert states == ["up", "up", "wait", "drain", "wait"]
    assert up_to(SET, 20, TargetState.WAIT) == SET


def test_priority_of_two_targets_with_one_url_is_the_lower_one() -> None:
    source = FileSource(name="file", paths=("x",))
    found = [Found("a:1", priority=20), Found("a:1", priority=10), Found("a:1", priority=30)]
    (target,) = read_targets(found, source, DiscoveryConfig(sources=(source,))).targets
    assert target.priority == 10
