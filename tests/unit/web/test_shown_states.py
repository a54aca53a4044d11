"""States as displays show them."""

from __future__ import annotations

from support.fleet_makers import make_fleet
from vllm_router.fleet.reason import NONE, because
from vllm_router.fleet.state import State
from vllm_router.web.shown_states import FULL_STAYS, Shown, ShownStates

FULL = because("full")


def test_shown_full_state_stays_with_its_first_time_until_it_is_over():
    states, (server, *_) = ShownStates(), make_fleet(2).servers.values()
    full = Shown(State.FULL, FULL, 10.0)
    assert states.of(server, State.UP, NONE, 0.0, 9.0) == Shown(State.UP, NONE, 0.0)
    assert states.of(server, State.FULL, FULL, 10.0, 10.0) == full
    assert states.of(server, State.UP, NONE, 11.0, 12.0) == full
    assert states.of(server, State.FULL, FULL, 13.0, 13.5) == full
    last = 13.5 + FULL_STAYS
    assert states.of(server, State.UP, NONE, 14.0, last - 0.1) == full
    up = Shown(State.UP, NONE, 14.0)
    assert states.of(server, State.UP, NONE, 14.0, last) == up
    again = states.of(server, State.FULL, FULL, 30.0, 30.0)
    assert again.since == 30.0


def test_shown_other_state_ends_the_full_one_and_servers_are_apart():
    states, (one, other) = ShownStates(), make_fleet(2).servers.values()
    states.of(one, State.FULL, FULL, 10.0, 10.0)
    down = because("connection_refused")
    assert states.of(other, State.UP, NONE, 1.0, 10.5).state is State.UP
    assert states.of(one, State.DOWN, down, 11.0, 11.0) == Shown(State.DOWN, down, 11.0)
    assert states.of(one, State.UP, NONE, 12.0, 12.0).state is State.UP


def test_shown_removed_server_is_forgotten():
    states, (one, other) = ShownStates(), make_fleet(2).servers.values()
    states.of(one, State.FULL, FULL, 10.0, 10.0)
    states.keep([other])
    assert states.of(one, State.UP, NONE, 11.0, 11.0).state is State.UP
