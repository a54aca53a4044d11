"""Who waits for a server, and in what order they get one."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_router.routing.waiting import (
    RATE_FROM,
    RATE_OVER,
    DrainRate,
    Place,
    Quickest,
    WaitingRooms,
)


def place(room: str | None = "m", priority: int = 0, key: str = "", **more: Any) -> Place:
    return Place(room, priority, key, more.pop("since", 0.0), 1e9, **more)


def line(*places: Place) -> WaitingRooms[Place]:
    rooms: WaitingRooms[Place] = WaitingRooms()
    for one in places:
        rooms.join(one)
    return rooms


def served(rooms: WaitingRooms[Place], free: int) -> list[Place]:
    """Who gets one of so many servers that take everybody."""

    def give(_: Place) -> bool:
        nonlocal free
        free -= 1
        return free >= 0

    return rooms.admit(0.0, give)


def test_the_lower_priority_goes_first_and_equals_as_they_came():
    a, b, c, d = (place(priority=priority) for priority in (0, 5, -1, 0))
    rooms = line(a, b, c, d)
    assert served(rooms, 3) == [c, a, d]
    assert served(rooms, 3) == [b]
    assert not rooms


def test_keys_take_turns_within_a_priority():
    many = [place(key="many") for _ in range(4)]
    few = [place(key="few") for _ in range(2)]
    first = place(key="many", priority=-1)
    rooms = line(*many, *few, first)
    assert served(rooms, 7) == [first, many[0], few[0], many[1], few[1], *many[2:]]


def test_a_key_that_leaves_and_comes_back_has_no_turn_before_the_others():
    a1, b1, a2 = place(key="a"), place(key="b"), place(key="a")
    rooms = line(a1, b1)
    assert served(rooms, 1) == [a1]
    rooms.join(a2)
    assert served(rooms, 2) == [b1, a2]


def test_who_returns_goes_before_its_equals_but_not_before_its_betters():
    new, better, back = place(), place(priority=-1), place(returning=True)
    assert served(line(new, better, back), 3) == [better, back, new]


def test_of_two_models_the_one_whose_first_came_earlier_goes_first():
    a, b, c = place("a"), place("b"), place("a")
    rooms = line(a, b, c)
    assert served(rooms, 2) == [a, b]
    assert served(rooms, 2) == [c]


def test_a_model_without_a_server_holds_up_no_other():
    stuck, lucky = place("stuck", priority=-9), place("lucky")
    rooms = line(stuck, lucky)
    assert rooms.admit(0.0, lambda one: one.room == "lucky") == [lucky]
    assert len(rooms) == 1


def test_who_returns_and_finds_its_own_server_free_lets_the_next_one_pass():
    back, new = place(returning=True), place()
    rooms = line(back, new)
    assert rooms.admit(0.0, lambda one: not one.returning) == [new]
    assert list(rooms.room("m")) == [back]


def test_how_many_go_before_one_more_follows_priority_and_turns():
    rooms = line(
        *(place(key="a") for _ in range(5)),
        place(key="b"),
        place(priority=-1, key="b"),
        place(priority=1, key="a"),
    )
    room = rooms.room("m")
    assert room.before(0, "a") == 7  # the better one, five of its own, one of b
    assert room.before(0, "b") == 1 + 1 + 2
    assert room.before(0, "c") == 1 + 2
    assert room.before(-2, "a") == 0
    assert room.before(9, "a") == 8


def test_handing_out_a_server_costs_the_same_however_many_wait():
    asked = 0

    def give(_: Place) -> bool:
        nonlocal asked
        asked += 1
        return asked == 1

    for waiting in (2, 20_000):
        asked = 0
        rooms = line(*(place(key=f"k{n % 7}", priority=n % 3) for n in range(waiting)))
        assert len(rooms.admit(0.0, give)) == 1
        assert asked == 2  # the one who gets it, and the next one, for whom there is none


# -- the drain rate ---------------------------------------------------------------------------


def rate_after(*moments: float, begin: float = 0.0) -> DrainRate:
    rate = DrainRate()
    rate.begin(begin)
    for now in moments:
        rate.freed(now)
    return rate


def test_rate_is_what_became_free_per_second_of_waiting():
    rate = rate_after(*(n / 10 for n in range(1, 21)))
    assert rate.per_second(2.0) == pytest.approx(10)
    rate.end(2.0)
    assert rate.per_second(1000.0) == pytest.approx(10)  # nobody waited meanwhile
    rate.begin(1000.0)
    assert rate.per_second(1002.0) == pytest.approx(5)  # but now nothing becomes free


def test_rate_is_unknown_before_anything_was_measured():
    assert DrainRate().per_second(5.0) is None
    assert rate_after(*([1.0] * (RATE_FROM - 1))).per_second(2.0) is None


def test_rate_follows_the_last_ones():
    rate = rate_after(*(n / 10 for n in range(1, 101)), *(10.0 + n for n in range(1, 101)))
    assert rate.per_second(110.0) == pytest.approx(1)


def test_servers_that_come_back_are_no_drain():
    rate = DrainRate()
    for _ in range(50):
        rate.freed(1.0)
    assert rate.per_second(2.0) is None


def test_a_server_left_free_ends_the_measurement_of_those_it_serves():
    rooms: WaitingRooms[Place] = WaitingRooms()
    for model in ("a", "b"):
        rooms.room(model).rate.begin(0.0)
    rooms.left_free(1.0, lambda room: room == "a")
    assert not rooms.room("a").rate.running
    assert rooms.room("b").rate.running


def test_rooms_of_forgotten_models_are_dropped_when_empty():
    rooms = line(place("gone"), place("busy"))
    rooms.leave(next(iter(rooms.room("gone"))))
    rooms.room(None)
    rooms.forget(lambda _: False)
    assert set(rooms.rooms) == {"busy", None}


def test_quickest_is_that_of_the_last_answers():
    quickest = Quickest()
    for seconds in (5.0, 1.0, 3.0):
        quickest.add(seconds)
    assert quickest.seconds == 0.0  # too few to tell
    quickest.add(4.0)
    assert quickest.seconds == pytest.approx(1.1)
    for _ in range(RATE_OVER):
        quickest.add(2.0)
    assert quickest.seconds == pytest.approx(2.2)


# -- all of it against a model ----------------------------------------------------------------

MODELS = {"a": ("x", "y"), "b": ("x",), "c": ("z",)}
"""Servers by name, and the models that each serves."""


class Overload(RuleBasedStateMachine):
    """Requests come, wait, are served and leave; a plain list tells what must be."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms: WaitingRooms[Place] = WaitingRooms()
        self.caps = dict.fromkeys(MODELS, 1)
        self.running: list[tuple[str, Place]] = []
        self.waiting: list[Place] = []
        self.passed: defaultdict[Place, Counter[str]] = defaultdict(Counter)
        self.seen = self.gone = 0
        self.now = 0.0

    def servers_for(self, one: Place) -> list[str]:
        return [name for name, models in MODELS.items() if one.room in models]

    def in_flight(self, name: str) -> int:
        return sum(server == name for server, _ in self.running)

    def free_for(self, one: Place) -> list[str]:
        return [name for name in self.servers_for(one) if self.in_flight(name) < self.caps[name]]

    def give(self, one: Place) -> bool:
        free = self.free_for(one)
        if free:
            self.running.append((free[0], one))
        return bool(free)

    def turn_of(self, served: Place) -> None:
        """No key has two turns while the first of another one waits."""
        fronts: dict[str, Place] = {}
        for one in self.waiting:
            if (one.room, one.priority) == (served.room, served.priority):
                fronts.setdefault(one.key, one)
        for key, one in fronts.items():
            if key != served.key:
                self.passed[one][served.key] += 1
                assert self.passed[one][served.key] <= 1, self.passed[one]

    def admit(self) -> None:
        self.now += 1.0
        before = len(self.running)
        admitted = self.rooms.admit(self.now, self.give)
        assert admitted == [one for _, one in self.running[before:]]
        for one in admitted:
            equals = [o for o in self.waiting if o.room == one.room]
            best = min(o.priority for o in equals)
            assert one.priority == best
            mine = [o for o in equals if o.priority == best and o.key == one.key]
            assert mine[0] is one, "a later request of the same key was first"
            self.waiting.remove(one)
            self.turn_of(one)

    @rule(model=st.sampled_from("xyz"), priority=st.integers(-1, 1), key=st.sampled_from("pqr"))
    def arrive(self, model: str, priority: int, key: str) -> None:
        self.seen += 1
        one = place(model, priority, key)
        if not any(o.room == model for o in self.waiting) and self.give(one):
            return
        self.waiting.append(one)
        self.rooms.join(one)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.gone += 1
        self.admit()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        one = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        self.rooms.leave(one)
        self.gone += 1

    @rule(name=st.sampled_from("abc"), cap=st.integers(0, 4))
    def reload(self, name: str, cap: int) -> None:
        self.caps[name] = cap
        self.admit()

    @invariant()
    def nobody_is_lost(self) -> None:
        assert self.seen == len(self.running) + len(self.waiting) + self.gone
        assert sorted(o.number for room in self.rooms.rooms.values() for o in room) == sorted(
            o.number for o in self.waiting
        )

    @invariant()
    def nobody_waits_beside_a_free_server(self) -> None:
        assert not any(self.free_for(one) for one in self.waiting)


TestOverload = Overload.TestCase
TestOverload.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
