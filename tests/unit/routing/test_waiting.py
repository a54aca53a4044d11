"""Waiting requests, and the order in which they get a server."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.routing.queue.entry import OfferResult, QueueEntry, Route
from vllm_router.routing.queue.waiting_queue import OWNER_BITS, WaitingQueue

ANY = Route(frozenset({"server"}))


def entry(model: str | None = "m", priority: int = 0, key: str = "", **more: Any) -> QueueEntry:
    route = more.pop("route", Route(frozenset({"server"}), model))
    return QueueEntry(model, priority, key, more.pop("since", 0.0), 1e9, route=route, **more)


def line(*entries: QueueEntry) -> WaitingQueue[QueueEntry]:
    queue: WaitingQueue[QueueEntry] = WaitingQueue()
    for one in entries:
        queue.join(one)
    return queue


def served(queue: WaitingQueue[QueueEntry], free: int) -> list[QueueEntry]:
    """The waiters that get one of `free` servers, each good for every request."""

    def give(one: QueueEntry) -> OfferResult:
        nonlocal free
        free -= 1
        one.server = "server"
        return OfferResult.SERVED if free >= 0 else OfferResult.BLOCKED

    return queue.admit(0.0, give)


def only(condition: Any) -> Any:
    """A `give` with servers for these waiters alone."""

    def give(one: QueueEntry) -> OfferResult:
        one.server = "server"
        return OfferResult.SERVED if condition(one) else OfferResult.BLOCKED

    return give


def test_waiting_lower_priority_number_goes_first_then_arrival():
    a, b, c, d = (entry(priority=priority) for priority in (0, 5, -1, 0))
    queue = line(a, b, c, d)
    assert served(queue, 3) == [c, a, d]
    assert served(queue, 3) == [b]
    assert not queue


def test_waiting_keys_take_turns_within_priority():
    many = [entry(key="many") for _ in range(4)]
    few = [entry(key="few") for _ in range(2)]
    first = entry(key="many", priority=-1)
    queue = line(*many, *few, first)
    assert served(queue, 7) == [first, many[0], few[0], many[1], few[1], *many[2:]]


def test_waiting_key_that_returns_gets_no_earlier_turn():
    a1, b1, a2 = entry(key="a"), entry(key="b"), entry(key="a")
    queue = line(a1, b1)
    assert served(queue, 1) == [a1]
    queue.join(a2)
    assert served(queue, 2) == [b1, a2]


def test_waiting_retry_precedes_equals_but_not_better_priority():
    new, better, back = entry(), entry(priority=-1), entry(returning=True)
    assert served(line(new, better, back), 3) == [better, back, new]


def test_waiting_older_first_request_decides_between_models():
    a, b, c = entry("a"), entry("b"), entry("a")
    queue = line(a, b, c)
    assert served(queue, 2) == [a, b]
    assert served(queue, 2) == [c]


def test_waiting_model_without_server_delays_no_other():
    stuck, lucky = entry("stuck", priority=-9), entry("lucky")
    queue = line(stuck, lucky)
    assert queue.admit(0.0, only(lambda one: one.model == "lucky")) == [lucky]
    assert len(queue) == 1


def test_waiting_retry_with_free_own_server_lets_next_pass():
    back, new = entry(returning=True, route=Route(frozenset(), "tried")), entry()
    queue = line(back, new)
    assert queue.admit(0.0, only(lambda one: not one.returning)) == [new]
    assert list(queue.model_queue("m")) == [back]


def test_waiting_request_of_other_route_is_not_delayed():
    stuck = [entry(route=Route(frozenset({"busy"})), priority=-n) for n in range(5)]
    lucky = [entry(route=Route(frozenset({"free"})), key=f"k{n}") for n in range(3)]
    queue = line(*stuck, *lucky)
    assert queue.admit(0.0, only(lambda one: "free" in one.route.servers)) == lucky
    assert len(queue) == len(queue.model_queue("m")) == 5


def test_waiting_keys_take_turns_across_models_of_a_server():
    many = [entry(f"lora-{n}", key="many") for n in range(4)]
    few = [entry("lora-9", key="few") for _ in range(2)]
    queue = line(*many, *few)
    assert served(queue, 6) == [many[0], few[0], many[1], few[1], *many[2:]]


def test_waiting_turn_on_one_server_is_free_on_others():
    quick = [entry("quick", key="both", route=Route(frozenset({"q"}))) for _ in range(9)]
    a = entry("slow", key="both", route=Route(frozenset({"s"})))
    b = entry("slow", key="other", route=Route(frozenset({"s"})))
    queue = line(*quick, a, b)

    def give(one: QueueEntry) -> OfferResult:
        one.server = "q"
        return OfferResult.SERVED if one.model == "quick" else OfferResult.BLOCKED

    queue.admit(1.0, give)
    assert served_on(queue, "s", 1) == [a]


def served_on(queue: WaitingQueue[QueueEntry], server: str, free: int) -> list[QueueEntry]:
    """The waiters that get one of `free` slots of a server."""

    def give(one: QueueEntry) -> OfferResult:
        nonlocal free
        if server not in one.route.servers or not free:
            return OfferResult.BLOCKED
        free -= 1
        one.server = server
        return OfferResult.SERVED

    return queue.admit(2.0, give)


# -- waiters of other processes ---------------------------------------------------------------


def test_waiting_held_place_stays_and_next_are_asked_in_order():
    theirs = [entry(key=key, owner=1) for key in "aab"]
    ours = [entry(key=key, route=Route(frozenset({"server"}), "ours")) for key in "ac"]
    queue = line(*theirs, *ours)
    asked = []

    def give(one: QueueEntry) -> OfferResult:
        asked.append(one)
        one.server = "server"
        return OfferResult.HELD if one.owner else OfferResult.SERVED

    assert queue.admit(0.0, give) == ours[::-1]
    assert asked == [theirs[0], theirs[2], ours[1], theirs[1], ours[0]]
    assert len(queue) == 3


def test_waiting_held_place_keeps_turn_and_place():
    theirs = [entry(key=key, owner=1) for key in "aab"]
    queue = line(*theirs)
    for _ in range(3):
        asked = []

        def hold(one: QueueEntry, asked: list[QueueEntry] = asked) -> OfferResult:
            asked.append(one)
            one.server = "server"
            return OfferResult.HELD

        assert queue.admit(0.0, hold) == []
        assert asked == [theirs[0], theirs[2], theirs[1]]
    assert served(queue, 3) == [theirs[0], theirs[2], theirs[1]]


def test_waiting_held_place_keeps_its_turn_while_others_of_its_key_wait():
    theirs = [entry(key=key, owner=1) for key in "aab"]
    queue = line(*theirs)

    def hold_first(one: QueueEntry) -> OfferResult:
        one.server = "server"
        return OfferResult.HELD if one is theirs[0] else OfferResult.BLOCKED

    assert queue.admit(0.0, hold_first) == []
    assert served(queue, 3) == [theirs[0], theirs[2], theirs[1]]


def test_waiting_turn_taken_meanwhile_counts_after_hold():
    theirs, ours = entry(key="a", owner=1), entry(key="a", route=Route(ANY.servers, "ours"))
    later, other = entry(key="a", owner=1), entry(key="b", owner=1)
    queue = line(theirs, ours, later, other)

    def give(one: QueueEntry) -> OfferResult:
        one.server = "server"
        return (
            OfferResult.HELD
            if one is theirs
            else OfferResult.SERVED
            if one is ours
            else OfferResult.BLOCKED
        )

    queue.leave(other, 0.0)
    assert queue.admit(0.0, give) == [ours]
    queue.join(other)
    assert served(queue, 3) == [other, theirs, later]


def test_waiting_stamps_rise_without_clock_and_name_process():
    queue: WaitingQueue[QueueEntry] = WaitingQueue(owner=3)
    first, second = queue.stamp(5.0), queue.stamp(5.0)
    assert first < second
    assert first % (1 << OWNER_BITS) == 3
    other: WaitingQueue[QueueEntry] = WaitingQueue(owner=1)
    other.observe_stamp(second)
    assert other.stamp(0.0) > second


# -- a full queue -----------------------------------------------------------------------------


def displaced(
    queue: WaitingQueue[QueueEntry], priority: int = 0, key: str = ""
) -> QueueEntry | None:
    return queue.model_queue("m").displaced_by(priority, key)


def test_waiting_greediest_keys_last_is_displaced_by_smaller_key():
    a = [entry(key="a") for _ in range(4)]
    b = [entry(key="b") for _ in range(2)]
    queue = line(*a, *b)
    assert displaced(queue, key="c") is a[3]
    assert displaced(queue, key="b") is a[3]
    assert displaced(queue, key="a") is None
    queue.leave(a[3], 0.0)
    assert displaced(queue, key="b") is None  # three each would be no gain
    assert displaced(queue, key="c") is a[2]


def test_waiting_worst_prioritys_last_is_displaced_by_better_one():
    good = [entry(priority=-1, key="a") for _ in range(9)]
    bad = [entry(priority=7, key=key) for key in "aba"]
    queue = line(*good, *bad)
    assert displaced(queue, priority=6, key="a") is bad[2]
    assert displaced(queue, priority=8) is None
    assert displaced(queue, priority=7, key="c") is bad[2]
    assert displaced(queue, priority=7, key="b") is None


def test_waiting_retry_is_never_displaced():
    queue = line(*(entry(priority=9, returning=True) for _ in range(3)))
    assert displaced(queue, priority=-5) is None
    assert queue.model_queue("m").waiting == 0
    assert len(queue) == 3


def test_waiting_count_ahead_follows_priority_and_turns():
    queue = line(
        *(entry(key="a") for _ in range(5)),
        entry(key="b"),
        entry(priority=-1, key="b"),
        entry(priority=1, key="a"),
    )
    model_queue = queue.model_queue("m")
    assert model_queue.before(0, "a") == 7  # the better one, five of its own, one of b
    assert model_queue.before(0, "b") == 1 + 1 + 2
    assert model_queue.before(0, "c") == 1 + 2
    assert model_queue.before(-2, "a") == 0
    assert model_queue.before(9, "a") == 8


@pytest.mark.parametrize("keys", [1, 7, 4000])
@pytest.mark.parametrize("models", [1, 500])
def test_waiting_admission_checks_few_however_many_wait(keys: int, models: int):
    asked = 0

    def give(one: QueueEntry) -> OfferResult:
        nonlocal asked
        asked += 1
        one.server = "server"
        return OfferResult.SERVED if asked == 1 else OfferResult.BLOCKED

    for waiting in (2, 4000):
        asked = 0
        entries = (
            entry(f"m{n % models}", key=f"k{n % keys}", priority=n % 3, route=ANY)
            for n in range(waiting)
        )
        queue = line(*entries)
        assert len(queue.admit(0.0, give)) == 1
        assert asked == 2  # the one that gets it, and the next one, which gets none


def test_waiting_free_server_ends_measurement_of_its_models():
    queue: WaitingQueue[QueueEntry] = WaitingQueue()
    for model in ("a", "b"):
        queue.model_queue(model).rate.begin(0.0)
    queue.server_left_free(1.0, lambda model_queue: model_queue == "a")
    assert not queue.model_queue("a").rate.running
    assert queue.model_queue("b").rate.running


def test_waiting_queues_of_forgotten_models_are_dropped_when_empty():
    queue = line(entry("gone"), entry("busy"))
    queue.leave(next(iter(queue.model_queue("gone"))), 0.0)
    queue.model_queue(None)
    queue.drop_unknown_models(lambda _: False)
    assert set(queue.model_queues) == {"busy", None}


def test_waiting_empty_queues_of_known_models_are_kept():
    """They hold what was learned: how fast their requests drain."""
    queue = line(entry("known"), entry("gone"))
    for model in ("known", "gone"):
        queue.leave(next(iter(queue.model_queue(model))), 0.0)
    queue.drop_unknown_models(lambda model: model == "known")
    assert set(queue.model_queues) == {"known"}


def test_waiting_dismissed_entry_costs_no_turn_and_frees_no_server():
    first, second, other = entry(key="a"), entry(key="a"), entry(key="b")
    queue = line(first, second, other)
    rate = queue.model_queue("m").rate
    rate.begin(0.0)

    def give(one: QueueEntry) -> OfferResult:
        one.server = "server"
        return OfferResult.DISMISSED if one is first else OfferResult.BLOCKED

    assert queue.admit(1.0, give) == [first]
    assert not rate.is_current
    assert served(queue, 1) == [second]


@given(
    st.lists(st.tuples(st.integers(-1, 1), st.sampled_from("abc")), max_size=25),
    st.tuples(st.integers(-1, 1), st.sampled_from("abcd")),
)
def test_waiting_never_exceeds_reported_count_ahead(
    others: list[tuple[int, str]], newcomer: tuple[int, str]
):
    queue = line(*(entry(priority=priority, key=key) for priority, key in others))
    ahead = queue.model_queue("m").before(*newcomer)
    one = entry(priority=newcomer[0], key=newcomer[1])
    queue.join(one)
    assert ahead - 3 <= served(queue, 99).index(one) <= ahead
