"""The shared memory that holds the waiting requests of each process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.runtime.workers import queue_board
from vllm_router.runtime.workers.queue_board import SLOTS, Entry, FreeSlots, Page, QueueBoard, mark
from vllm_router.runtime.workers.queue_wakeup import Wakeups


def entry(number: int, **more: int) -> Entry:
    given = {"queue": mark("m"), "key": mark("k"), "priority": -3, **more}
    fields = dict.fromkeys(Entry._fields, 0) | given
    return Entry(**{**fields, "number": number})


@pytest.fixture
def pages() -> Iterator[tuple[Page, Page]]:
    """The page of a process as seen by itself and by another process."""
    fileno = QueueBoard.create(2)
    try:
        yield QueueBoard(fileno, 2).pages[1], QueueBoard(fileno, 2).pages[1]
    finally:
        os.close(fileno)


def changed(page: Page, seen: int) -> list[int] | None:
    slots = page.changed_since(seen)
    return list(slots) if slots is not None else None


def test_queue_board_entry_reads_as_written(pages: tuple[Page, Page]):
    ours, theirs = pages
    written = entry(7, flags=1, displaced=5, since=99, public=mark("p"), route=4)
    ours.write(3, written)
    read = theirs.read(3)
    assert read._replace(flags=0) == written._replace(flags=0)
    assert read.returning
    assert read.epoch == ours.epoch
    assert changed(theirs, 0) == [3]
    assert list(theirs.used()) == [0, 1, 2, 3]


def test_queue_board_end_has_reason(pages: tuple[Page, Page]):
    ours, theirs = pages
    ours.write(0, entry(7))
    ours.end(0, 1234, mark("http://a"))
    read = theirs.read(0)
    assert (read.number, read.served, read.server) == (-7, 1234, mark("http://a"))
    assert changed(theirs, 1) == [0]


def test_queue_board_reset_begins_unchanged_epoch(pages: tuple[Page, Page]):
    ours, theirs = pages
    ours.write(0, entry(7))
    epoch = theirs.epoch
    ours.reset()
    assert theirs.epoch == epoch + 1
    assert theirs.changes == 0
    assert list(theirs.used()) == []
    assert theirs.read(0).epoch == epoch  # the rest is of the previous epoch


def test_queue_board_reader_that_missed_entries_learns_it(pages: tuple[Page, Page], monkeypatch):
    ours, theirs = pages
    for number in range(1, queue_board._RING // 2 + 2):
        ours.write(number % 8, entry(number))
    assert changed(theirs, 0) is None
    assert len(changed(theirs, 1) or ()) == queue_board._RING // 2
    assert changed(theirs, theirs.changes + 1) is None  # of another epoch


def test_queue_board_marks_distinguish_names_and_are_never_zero():
    names = ["", "a", "b", "\ud800", "x" * 10_000]
    assert len({mark(name) for name in names} - {0}) == len(names)


def test_queue_board_times_are_kept_by_server_and_slot(pages: tuple[Page, Page]):
    ours, theirs = pages
    ours.release(mark("http://a"), 55)
    ours.consider(9, 66)
    ours.beat(77)
    assert theirs.released(mark("http://a")) == 55
    assert theirs.considered(9) == 66
    assert theirs.heartbeat == 77


@given(st.lists(st.booleans(), max_size=300))
def test_queue_board_slots_are_reused_late_and_never_twice(takes: list[bool]):
    free, taken = FreeSlots(), []
    last_given: list[int] = []
    for take in takes:
        if take:
            slot = free.take()
            assert slot not in taken
            assert slot not in last_given[-32:]
            taken.append(slot)
        elif taken:
            slot = taken.pop(0)
            last_given.append(slot)
            free.give_back(slot)


def test_queue_board_slots_can_all_be_taken_and_then_none():
    free = FreeSlots()
    assert {free.take() for _ in range(SLOTS)} == set(range(SLOTS))
    assert not free
    free.give_back(5)
    assert free
    assert free.take() == 5


async def test_queue_wakeup_sent_before_wait_is_received_once():
    descriptors = [Wakeups.create(), Wakeups.create()]
    try:
        ours, theirs = Wakeups(descriptors, 0), Wakeups(descriptors, 1)
        theirs.notify(0)
        theirs.notify(0)
        with trio.fail_after(30):
            await ours.wait()
        with trio.move_on_after(0.01) as silent:
            await ours.wait()
        assert silent.cancelled_caught
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
