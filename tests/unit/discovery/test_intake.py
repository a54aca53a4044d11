"""Which sets of targets are believed, and when."""

from __future__ import annotations

import pytest

from vllm_router.config.discovery import Target, Targets, TargetState
from vllm_router.discovery.intake import Intake

KEEP_FOR, SECOND_LOOK = 300.0, 30.0


def targets(names: str, state: TargetState = TargetState.UP) -> Targets:
    return tuple([Target(f"http://{name}:1", state=state) for name in names])


def intake(names: str) -> Intake:
    return Intake(targets(names), KEEP_FOR, SECOND_LOOK)


def names_of(made: Intake) -> str:
    return "".join(target.url[7] for target in made.targets or () if target.state is TargetState.UP)


def alive(url: str) -> bool:
    return True


def dead(url: str) -> bool:
    return False


def test_intake_first_set_is_taken_even_if_empty() -> None:
    made = Intake(None, KEEP_FOR, SECOND_LOOK)
    assert made.offer((), 0.0, alive)
    assert made.targets == ()
    assert not made.doubt


@pytest.mark.parametrize(
    ("before", "after"), [("ab", "abc"), ("abcd", "ab"), ("abcd", "abxy"), ("ab", "ab"), ("", "a")]
)
def test_intake_set_that_keeps_half_is_applied_at_once(before: str, after: str) -> None:
    made = intake(before)
    assert made.offer(targets(after), 0.0, alive) is (before != after)
    assert names_of(made) == after
    assert not made.doubt


def test_intake_shrunk_set_adds_new_targets_and_keeps_missing_ones() -> None:
    made = intake("abcd")
    made.offer(targets("dz"), 0.0, alive)
    assert names_of(made) == "abcdz"
    assert made.doubt == "it names 2 servers, but 3 that it left out still answer their checks"
    assert made.doubt_values == {"named": "2", "kept": "3"}


def test_intake_shrunk_set_is_applied_after_second_look_only() -> None:
    made = intake("abcd")
    made.offer(targets("d"), 0.0, alive)
    assert made.look_due == SECOND_LOOK
    made.offer(targets("d"), SECOND_LOOK - 1, alive)
    assert not made.reconsider(SECOND_LOOK + 1, alive), "time alone is no second look"
    assert names_of(made) == "abcd"
    assert made.offer(targets("d"), SECOND_LOOK + 2, alive)
    assert names_of(made) == "d"
    assert not made.doubt
    assert made.look_due is None


def test_intake_empty_set_is_applied_after_keep_for() -> None:
    made = intake("ab")
    made.offer((), 0.0, alive)
    made.offer((), SECOND_LOOK + 1, alive)
    assert names_of(made) == "ab"
    made.offer((), KEEP_FOR, alive)
    assert names_of(made) == ""


def test_intake_empty_set_is_doubtful_while_any_server_answers() -> None:
    made = intake("abcd")
    made.offer((), 0.0, lambda url: "a" in url)
    assert names_of(made) == "a"
    assert made.reconsider(6.0, dead)
    assert names_of(made) == ""


def test_intake_set_that_the_checks_agree_with_is_applied_at_once() -> None:
    made = intake("abcd")
    assert made.offer(targets("d"), 0.0, dead)
    assert names_of(made) == "d"


def test_intake_checks_that_agree_later_end_the_doubt() -> None:
    made = intake("abcd")
    made.offer(targets("d"), 0.0, alive)
    assert made.reconsider(6.0, dead)
    assert names_of(made) == "d"
    assert made.look_due is None


def test_intake_missing_targets_that_return_end_the_doubt() -> None:
    made = intake("abcd")
    made.offer(targets("d"), 0.0, alive)
    assert not made.offer(targets("abcd"), 10.0, alive)
    assert not made.doubt
    made.offer(targets("d"), SECOND_LOOK + 1, alive)
    assert names_of(made) == "abcd", "a later loss is looked at twice again"


def test_intake_drained_targets_leave_at_once_however_many() -> None:
    made = intake("abc")
    made.offer(targets("abc", TargetState.DRAIN), 0.0, alive)
    assert names_of(made) == ""
    assert not made.doubt


def test_intake_targets_that_turn_unready_at_once_need_second_look() -> None:
    made = intake("abc")
    made.offer(targets("abc", TargetState.WAIT), 0.0, alive)
    assert names_of(made) == "abc"
    assert made.doubt


def test_intake_order_of_targets_is_noise() -> None:
    made = intake("abc")
    assert not made.offer(targets("cab"), 0.0, alive)
