"""Counts in shared memory: one row per process, readable by all."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.runtime.workers.shared_counters import (
    COLUMNS,
    CONNECTIONS,
    CounterView,
    SharedCounters,
    columns_for,
)


@pytest.fixture
def boards() -> Iterator[list[SharedCounters]]:
    """The same board as four processes map it: a leader and three workers."""
    fileno = SharedCounters.create(4)
    try:
        yield [SharedCounters(fileno, 4) for _ in range(4)]
    finally:
        os.close(fileno)


def counters(boards: list[SharedCounters], *columns: int) -> list[CounterView]:
    made = [CounterView(board, number) for number, board in enumerate(boards)]
    for one in made:
        for column in columns:
            one.watch(column)
    return made


def test_shared_counters_are_visible_to_other_processes(boards: list[SharedCounters]):
    leader, one, two, _ = counters(boards, 5)
    one.put(5, 3)
    two.put(5, 4)
    assert sorted(leader.read_changes()) == [(5, 3), (5, 4)]
    assert leader.elsewhere[5] == 7
    one.put(5, 1)
    assert leader.read_changes() == [(5, -2)]
    assert leader.elsewhere[5] == 5
    assert leader.read_changes() == []


def test_shared_counters_own_counts_are_separate(boards: list[SharedCounters]):
    leader, one, *_ = counters(boards, 5)
    one.put(5, 3)
    assert one.read_changes() == []
    assert leader.read_changes() == [(5, 3)]


def test_shared_counters_column_watched_late_shows_earlier_counts(boards: list[SharedCounters]):
    leader, one, *_ = counters(boards)
    one.put(9, 2)
    assert leader.read_changes() == []
    leader.watch(9)
    assert leader.read_changes() == [(9, 2)]


def test_shared_counters_row_of_dead_process_is_cleared(boards: list[SharedCounters]):
    leader, one, two, _ = counters(boards, 5)
    one.put(5, 3)
    two.put(5, 1)
    leader.read_changes()
    boards[0].clear(1)
    assert leader.read_changes() == [(5, -3)]
    assert leader.elsewhere[5] == 1


def test_shared_counters_successor_starts_empty_and_sees_others(boards: list[SharedCounters]):
    leader, one, two, _ = counters(boards, 5)
    one.put(5, 3)
    two.put(5, 1)
    leader.read_changes()
    again = CounterView(boards[1], 1)
    again.watch(5)
    assert again.read_changes() == [(5, 1)]
    assert leader.read_changes() == [(5, -3)]


def test_shared_counters_fewest_considers_workers_only(boards: list[SharedCounters]):
    _, one, two, three = counters(boards, CONNECTIONS)
    one.put(CONNECTIONS, 9)
    two.put(CONNECTIONS, 2)
    three.put(CONNECTIONS, 4)
    assert one.fewest(CONNECTIONS) == 2
    assert two.fewest(CONNECTIONS) == 4


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(0, 100))))
def test_shared_counters_sums_cover_other_rows(steps: list[tuple[int, int, int]]):
    fileno = SharedCounters.create(4)
    try:
        made = counters([SharedCounters(fileno, 4) for _ in range(4)], 20)
        rows = [[0] * 21 for _ in range(4)]
        for number, column, count in steps:
            made[number].put(column, count)
            rows[number][column] = count
            for mine, one in enumerate(made):
                one.read_changes()
                for at in range(21):
                    others = sum(row[at] for n, row in enumerate(rows) if n != mine)
                    assert one.elsewhere[at] == others
    finally:
        os.close(fileno)


# -- columns ----------------------------------------------------------------------------------


def test_shared_counters_column_is_found_by_key_in_every_process(boards: list[SharedCounters]):
    assert boards[1].find("http://a:1") is None
    column = boards[0].assign("http://a:1")
    assert column is not None
    assert boards[1].find("http://a:1") == column
    assert boards[0].assign("http://a:1") == column
    assert boards[0].assign("http://b:1") != column


def test_shared_counters_no_key_gets_connection_column(boards: list[SharedCounters]):
    assert boards[0].assign("http://a:1") != CONNECTIONS


def test_shared_counters_column_is_freed_when_zero(boards: list[SharedCounters]):
    leader = boards[0]
    column = leader.assign("http://a:1")
    assert column is not None
    boards[2].row(2)[column] = 1
    leader.keep(set())
    assert leader.find("http://a:1") is None
    assert leader.assign("http://b:1") != column
    boards[2].row(2)[column] = 0
    assert leader.assign("http://c:1") == column


def test_shared_counters_full_board_has_no_column(boards: list[SharedCounters]):
    for number in range(1, COLUMNS):
        assert boards[0].assign(f"http://a:{number}") is not None
    assert boards[0].assign("http://b:1") is None


def test_shared_counters_size_for_configuration_fits_all_of_it():
    keys = [f"key {number}" for number in range(5_000)]
    columns = columns_for(len(keys))
    fileno = SharedCounters.create(3, columns)
    try:
        leader, worker = (SharedCounters(fileno, 3, columns) for _ in range(2))
        places = leader.assign_all(keys)
        assert len(set(places.values()) - {None, CONNECTIONS}) == len(keys)
        assert worker.columns_of(keys) == places
        last = places[keys[-1]]
        assert last is not None
        written, seen = CounterView(leader, 0), CounterView(worker, 1)
        seen.watch(last)
        written.put(last, 7)
        assert seen.read_changes() == [(last, 7)]
    finally:
        os.close(fileno)


def test_shared_counters_room_includes_released_but_not_counted_columns(
    boards: list[SharedCounters],
):
    leader = boards[0]
    column = leader.assign("old")
    assert column is not None
    assert leader.room_for(["new"]) == COLUMNS - 1
    boards[1].row(1)[column] = 1
    assert leader.room_for(["new"]) == COLUMNS - 2
    assert leader.room_for(["old"]) == COLUMNS - 1
