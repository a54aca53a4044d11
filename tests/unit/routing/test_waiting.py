"""Waiting requests, and the order in which they get a server."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.routing.queue.entry import QueueEntry, Route, Verdict
from vllm_router.routing.queue.waiting_queue import OWNER_BITS, WaitingQueue

ANY = Route(frozenset({"server"}))


def place(room: str | None = "m", priority: int = 0, key: str = "", **more: Any) -> QueueEntry:
    route = more.pop("route", Route(frozenset({"server"}), room))
    return QueueEntry(room, priority, key, more.pop("since", 0.0), 1e9, route=route, **more)


def line(*places: QueueEntry) -> WaitingQueue[QueueEntry]:
    rooms: WaitingQueue[QueueEntry] = WaitingQueue()
    for one in places:
        rooms.join(one)
    return rooms


def served(rooms: WaitingQueue[QueueEntry], free: int) -> list[QueueEntry]:
    """The waiters that get one of `free` servers, each good for every request."""

    def give(one: QueueEntry) -> Verdict:
        nonlocal free
        free -= 1
        one.server = "server"
        return Verdict.SERVED if free >= 0 else Verdict.BLOCKED

    return rooms.admit(0.0, give)


def only(condition: Any) -> Any:
    """A `give` with servers for these waiters alone."""

    def give(one: QueueEntry) -> Verdict:
        one.server = "server"
        return Verdict.SERVED if condition(one) else Verdict.BLOCKED

    return give


def test_waiting_lower_priority_number_goes_first_then_arrival():
    a, b, c, d = (place(priority=priority) for priority in (0, 5, -1, 0))
    rooms = line(a, b, c, d)
    assert served(rooms, 3) == [c, a, d]
    assert served(rooms, 3) == [b]
    assert not rooms


def test_waiting_keys_take_turns_within_priority():
    many = [place(key="many") for _ in range(4)]
    few = [place(key="few") for _ in range(2)]
    first = place(key="many", priority=-1)
    rooms = line(*many, *few, first)
    assert served(rooms, 7) == [first, many[0], few[0], many[1], few[1], *many[2:]]


def test_waiting_key_that_returns_gets_no_earlier_turn():
    a1, b1, a2 = place(key="a"), place(key="b"), place(key="a")
    rooms = line(a1, b1)
    assert served(rooms, 1) == [a1]
    rooms.join(a2)
    assert served(rooms, 2) == [b1, a2]


def test_waiting_retry_precedes_equals_but_not_better_priority():
    new, better, back = place(), place(priority=-1), place(returning=True)
    assert served(line(new, better, back), 3) == [better, back, new]


def test_waiting_older_first_request_decides_between_models():
    a, b, c = place("a"), place("b"), place("a")
    rooms = line(a, b, c)
    assert served(rooms, 2) == [a, b]
    assert served(rooms, 2) == [c]


def test_waiting_model_without_server_delays_no_other():
    stuck, lucky = place("stuck", priority=-9), place("lucky")
    rooms = line(stuck, lucky)
    assert rooms.admit(0.0, only(lambda one: one.model == "lucky")) == [lucky]
    assert len(rooms) == 1


def test_waiting_retry_with_free_own_server_lets_next_pass():
    back, new = place(returning=True, route=Route(frozenset(), "tried")), place()
    rooms = line(back, new)
    assert rooms.admit(0.0, only(lambda one: not one.returning)) == [new]
    assert list(rooms.model_queue("m")) == [back]


def test_waiting_request_of_other_route_is_not_delayed():
    stuck = [place(route=Route(frozenset({"busy"})), priority=-n) for n in range(5)]
    lucky = [place(route=Route(frozenset({"free"})), key=f"k{n}") for n in range(3)]
    rooms = line(*stuck, *lucky)
    assert rooms.admit(0.0, only(lambda one: "free" in one.route.servers)) == lucky
    assert len(rooms) == len(rooms.model_queue("m")) == 5


def test_waiting_keys_take_turns_across_models_of_a_server():
    many = [place(f"lora-{n}", key="many") for n in range(4)]
    few = [place("lora-9", key="few") for _ in range(2)]
    rooms = line(*many, *few)
    assert served(rooms, 6) == [many[0], few[0], many[1], few[1], *many[2:]]


def test_waiting_turn_on_one_server_is_free_on_others():
    quick = [place("quick", key="both", route=Route(frozenset({"q"}))) for _ in range(9)]
    a = place("slow", key="both", route=Route(frozenset({"s"})))
    b = place("slow", key="other", route=Route(frozenset({"s"})))
    rooms = line(*quick, a, b)

    def give(one: QueueEntry) -> Verdict:
        one.server = "q"
        return Verdict.SERVED if one.model == "quick" else Verdict.BLOCKED

    rooms.admit(1.0, give)
    assert served_on(rooms, "s", 1) == [a]


def served_on(rooms: WaitingQueue[QueueEntry], server: str, free: int) -> list[QueueEntry]:
    """The waiters that get one of `free` slots of a server."""

    def give(one: QueueEntry) -> Verdict:
        nonlocal free
        if server not in one.route.servers or not free:
            return Verdict.BLOCKED
        free -= 1
        one.server = server
        return Verdict.SERVED

    return rooms.admit(2.0, give)


# -- waiters of other processes ---------------------------------------------------------------


def test_waiting_held_place_stays_and_next_are_asked_in_order():
    theirs = [place(key=key, owner=1) for key in "aab"]
    ours = [place(key=key, route=Route(frozenset({"server"}), "ours")) for key in "ac"]
    rooms = line(*theirs, *ours)
    asked = []

    def give(one: QueueEntry) -> Verdict:
        asked.append(one)
        one.server = "server"
        return Verdict.HELD if one.owner else Verdict.SERVED

    assert rooms.admit(0.0, give) == ours[::-1]
    assert asked == [theirs[0], theirs[2], ours[1], theirs[1], ours[0]]
    assert len(rooms) == 3


def test_waiting_held_place_keeps_turn_and_place():
    theirs = [place(key=key, owner=1) for key in "aab"]
    rooms = line(*theirs)
    for _ in range(3):
        asked = []

        def hold(one: QueueEntry, asked: list[QueueEntry] = asked) -> Verdict:
            asked.append(one)
            one.server = "server"
            return Verdict.HELD

        assert rooms.admit(0.0, hold) == []
        assert asked == [theirs[0], theirs[2], theirs[1]]
    assert served(rooms, 3) == [theirs[0], theirs[2], theirs[1]]


def test_waiting_held_place_keeps_its_turn_while_others_of_its_key_wait():
    theirs = [place(key=key, owner=1) for key in "aab"]
    rooms = line(*theirs)

    def hold_first(one: QueueEntry) -> Verdict:
        one.server = "server"
        return Verdict.HELD if one is theirs[0] else Verdict.BLOCKED

    assert rooms.admit(0.0, hold_first) == []
    assert served(rooms, 3) == [theirs[0], theirs[2], theirs[1]]


def test_waiting_turn_taken_meanwhile_counts_after_hold():
    theirs, ours = place(key="a", owner=1), place(key="a", route=Route(ANY.servers, "ours"))
    later, other = place(key="a", owner=1), place(key="b", owner=1)
    rooms = line(theirs, ours, later, other)

    def give(one: QueueEntry) -> Verdict:
        one.server = "server"
        return Verdict.HELD if one is theirs else Verdict.SERVED if one is ours else Verdict.BLOCKED

    rooms.leave(other, 0.0)
    assert rooms.admit(0.0, give) == [ours]
    rooms.join(other)
    assert served(rooms, 3) == [other, theirs, later]


def test_waiting_stamps_rise_without_clock_and_name_process():
    rooms: WaitingQueue[QueueEntry] = WaitingQueue(owner=3)
    first, second = rooms.stamp(5.0), rooms.stamp(5.0)
    assert first < second
    assert first % (1 << OWNER_BITS) == 3
    other: WaitingQueue[QueueEntry] = WaitingQueue(owner=1)
    other.observe_stamp(second)
    assert other.stamp(0.0) > second


# -- a full queue -----------------------------------------------------------------------------


def displaced(
    rooms: WaitingQueue[QueueEntry], priority: int = 0, key: str = ""
) -> QueueEntry | None:
    return rooms.model_queue("m").displaced_by(priority, key)


def test_waiting_greediest_keys_last_is_displaced_by_smaller_key():
    a = [place(key="a") for _ in range(4)]
    b = [place(key="b") for _ in range(2)]
    rooms = line(*a, *b)
    assert displaced(rooms, key="c") is a[3]
    assert displaced(rooms, key="b") is a[3]
    assert displaced(rooms, key="a") is None
    rooms.leave(a[3], 0.0)
    assert displaced(rooms, key="b") is None  # three each would be no gain
    assert displaced(rooms, key="c") is a[2]


def test_waiting_worst_prioritys_last_is_displaced_by_better_one():
    good = [place(priority=-1, key="a") for _ in range(9)]
    bad = [place(priority=7, key=key) for key in "aba"]
    rooms = line(*good, *bad)
    assert displaced(rooms, priority=6, key="a") is bad[2]
    assert displaced(rooms, priority=8) is None
    assert displaced(rooms, priority=7, key="c") is bad[2]
    assert displaced(rooms, priority=7, key="b") is None


def test_waiting_retry_is_never_displaced():
    rooms = line(*(place(priority=9, returning=True) for _ in range(3)))
    assert displaced(rooms, priority=-5) is None
    assert rooms.model_queue("m").waiting == 0
    assert len(rooms) == 3


def test_waiting_count_ahead_follows_priority_and_turns():
    rooms = line(
        *(place(key="a") for _ in range(5)),
        place(key="b"),
        place(priority=-1, key="b"),
        place(priority=1, key="a"),
    )
    room = rooms.model_queue("m")
    assert room.before(0, "a") == 7  # the better one, five of its own, one of b
    assert room.before(0, "b") == 1 + 1 + 2
    assert room.before(0, "c") == 1 + 2
    assert room.before(-2, "a") == 0
    assert room.before(9, "a") == 8


@pytest.mark.parametrize("keys", [1, 7, 20_000])
@pytest.mark.parametrize("models", [1, 500])
def test_waiting_admission_checks_few_however_many_wait(keys: int, models: int):
    asked = 0

    def give(one: QueueEntry) -> Verdict:
        nonlocal asked
        asked += 1
        one.server = "server"
        return Verdict.SERVED if asked == 1 else Verdict.BLOCKED

    for waiting in (2, 20_000):
        asked = 0
        places = (
            place(f"m{n % models}", key=f"k{n % keys}", priority=n % 3, route=ANY)
            for n in range(waiting)
        )
        rooms = line(*places)
        assert len(rooms.admit(0.0, give)) == 1
        assert asked == 2  # the one that gets it, and the next one, which gets none


def test_waiting_free_server_ends_measurement_of_its_models():
    rooms: WaitingQueue[QueueEntry] = WaitingQueue()
    for model in ("a", "b"):
        rooms.model_queue(model).rate.begin(0.0)
    rooms.server_left_free(1.0, lambda room: room == "a")
    assert not rooms.model_queue("a").rate.running
    assert rooms.model_queue("b").rate.running


def test_waiting_queues_of_forgotten_models_are_dropped_when_empty():
    rooms = line(place("gone"), place("busy"))
    rooms.leave(next(iter(rooms.model_queue("gone"))), 0.0)
    rooms.model_queue(None)
    rooms.drop_unknown_models(lambda _: False)
    assert set(rooms.model_queues) == {"busy", None}


def test_waiting_empty_queues_of_known_models_are_kept():
    """They hold what was learned: how fast their requests drain."""
    rooms = line(place("known"), place("gone"))
    for model in ("known", "gone"):
        rooms.leave(next(iter(rooms.model_queue(model))), 0.0)
    rooms.drop_unknown_models(lambda model: model == "known")
    assert set(rooms.model_queues) == {"known"}


def test_waiting_dismissed_entry_costs_no_turn_and_frees_no_server():
    first, second, other = place(key="a"), place(key="a"), place(key="b")
    rooms = line(first, second, other)
    rate = rooms.model_queue("m").rate
    rate.begin(0.0)

    def give(one: QueueEntry) -> Verdict:
        one.server = "server"
        return Verdict.DISMISSED if one is first else Verdict.BLOCKED

    assert rooms.admit(1.0, give) == [first]
    assert not rate.is_current
    assert served(rooms, 1) == [second]


@given(
    st.lists(st.tuples(st.integers(-1, 1), st.sampled_from("abc")), max_size=25),
    st.tuples(st.integers(-1, 1), st.sampled_from("abcd")),
)
def test_waiting_never_exceeds_reported_count_ahead(
    others: list[tuple[int, str]], newcomer: tuple[int, str]
):
    rooms = line(*(place(priority=priority, key=key) for priority, key in others))
    ahead = rooms.model_queue("m").before(*newcomer)
    one = place(priority=newcomer[0], key=newcomer[1])
    rooms.join(one)
    assert ahead - 3 <= served(rooms, 99).index(one) <= ahead
