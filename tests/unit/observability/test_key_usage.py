"""Usage of client keys over the last minutes."""

from __future__ import annotations

from vllm_router.observability.key_usage import STEP, WINDOW, KeyUsage, Usage


def test_key_usage_sums_the_window_and_forgets_what_is_older():
    usage = KeyUsage()
    totals = {"a": Usage(0, 0, 0)}
    for step in range(1, 100):
        totals = {"a": Usage(step * 10, step, step * 1000), "idle": Usage(7, 0, 0)}
        usage.advance(totals)
    steps = WINDOW // STEP
    assert usage.recent(totals) == {"a": Usage(10 * steps, steps, 1000 * steps)}


def test_key_usage_includes_what_came_since_the_last_step():
    usage = KeyUsage()
    assert usage.recent({}) == {}
    usage.advance({"a": Usage(1, 0, 10)})
    assert usage.recent({"a": Usage(3, 1, 30), "b": Usage(1, 0, 0)}) == {
        "a": Usage(3, 1, 30),
        "b": Usage(1, 0, 0),
    }


def test_key_usage_of_a_counter_that_fell_is_not_negative():
    usage = KeyUsage()
    usage.advance({"a": Usage(5, 0, 0)})
    assert usage.recent({"a": Usage(2, 0, 0)}) == {"a": Usage(5, 0, 0)}
