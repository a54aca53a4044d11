"""Delays of the event loop: measured, counted, and logged with the running function."""

from __future__ import annotations

import math
import re
import threading
import time

import pytest
import trio
import trio.testing

from vllm_router.http.io.hub import EventLoopHub
from vllm_router.http.io.turns import LONG, Turns
from vllm_router.observability.stalls import LOOK_SELDOM, WINDOW, LagWatch, StallMonitor


def hog_the_loop(seconds: float) -> None:
    """Keep the loop's thread busy; other threads can run."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "stalls" in record.name]


def test_lag_watch_returns_the_worst_of_the_last_ten_seconds():
    lag = LagWatch()
    assert lag.worst(0.0) == 0.0
    lag.add(0.5, 1.0)
    lag.add(0.1, 2.0)
    assert lag.worst(2.0) == 0.5
    assert lag.worst(1.5 + WINDOW) == 0.1
    assert lag.worst(5.0 + WINDOW) == 0.0


class Clock:
    """The monotonic clock of the hub, under the test's control."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("vllm_router.http.io.hub.monotonic", clock)
    return clock


def turn(turns: Turns, clock: Clock, length: float, wait: float = 1.0, late: float = 0.0) -> None:
    """A turn, and the wait after it, which ends too late."""
    hub = EventLoopHub.of_this_run()
    hub.turns = turns
    clock.now += length
    hub.before_io_wait(wait)
    clock.now += wait + late
    hub.after_io_wait(wait)
    hub.turns = None


async def test_turns_long_ones_and_late_wakes_are_reported_one_by_one(clock):
    found: list[float] = []
    turns = Turns(found.append, clock.now)
    for length, late in [(0.01, 0.0), (0.2, 0.0), (0.06, 0.0), (0.01, 0.3), (LONG * 0.9, 0.0)]:
        turn(turns, clock, length, late=late)
    assert found == pytest.approx([0.2, 0.06, 0.3])
    assert turns.number == 5


async def test_turns_longest_is_since_it_was_asked_for_last(clock):
    turns = Turns(lambda length: None, clock.now)
    for length in (0.01, 0.03, 0.02):
        turn(turns, clock, length)
    assert turns.take_longest() == pytest.approx(0.03)
    turn(turns, clock, 0.001)
    assert turns.take_longest() == pytest.approx(0.001)
    turn(turns, clock, 0.4)
    assert turns.take_longest() == pytest.approx(0.4)


async def test_turns_a_wait_that_ends_early_or_has_no_end_is_not_late(clock):
    found: list[float] = []
    turns = Turns(found.append, clock.now)
    hub = EventLoopHub.of_this_run()
    turn(turns, clock, 0.001, wait=1.0, late=-0.9)
    hub.turns = turns
    hub.before_io_wait(math.inf)
    clock.now += 1000.0
    hub.after_io_wait(math.inf)
    hub.turns = None
    assert found == []


async def test_monitor_stall_logs_the_function_that_ran(nursery, caplog):
    monitor = StallMonitor()
    nursery.start_soon(monitor.run)
    await trio.testing.wait_all_tasks_blocked()
    while not any("hog_the_loop" in message for message in messages(caplog)):
        hog_the_loop(LOOK_SELDOM + 0.1)  # on a busy machine the thread may not run the first time
        await trio.sleep(0.01)
        monitor._logged_length = 0.0
    assert monitor.count > 0
    assert monitor.seconds >= LOOK_SELDOM
    assert monitor.lag.worst(trio.current_time()) >= LOOK_SELDOM
    found = next(message for message in messages(caplog) if "hog_the_loop" in message)
    assert "was blocked for" in found
    assert "observability/test_stalls.py:" in found
    computed = re.search(r"for ([0-9.]+) s \(([0-9.]+) s of CPU", found)
    assert computed is not None
    assert 0 < float(computed[2]) <= float(computed[1])


async def test_monitor_idle_loop_is_not_woken(nursery, mock_clock):
    steps = 0

    class Steps(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            nonlocal steps
            steps += 1

    nursery.start_soon(StallMonitor().run)
    await trio.testing.wait_all_tasks_blocked()
    trio.lowlevel.add_instrument(Steps())
    mock_clock.jump(100)
    await trio.testing.wait_all_tasks_blocked()
    assert steps <= 3  # this test's own


def test_monitor_many_stalls_log_only_the_longer_ones(caplog):
    monitor = StallMonitor()
    for length in (0.2, 0.1, 0.1, 0.4, 0.3):
        monitor._stalled(length)
    assert monitor.count == 5
    assert monitor.seconds == pytest.approx(1.1)
    lines = messages(caplog)
    assert [line[: line.index(" s (")] for line in lines] == [
        "the event loop was blocked for 0.20",
        "the event loop was blocked for 0.40",
    ]
    assert lines[1].endswith("(2 shorter stalls since the last line)")


async def test_monitor_hang_is_logged_while_it_lasts(nursery, caplog, monkeypatch):
    monkeypatch.setattr("vllm_router.observability.stalls.HANG", 0.1)
    monitor = StallMonitor()
    nursery.start_soon(monitor.run)
    await trio.testing.wait_all_tasks_blocked()
    end = time.monotonic() + 30
    while not any("still is" in message for message in messages(caplog)):
        assert time.monotonic() < end
        hog_the_loop(1.0)
        await trio.sleep(0.01)
    assert any("hog_the_loop" in message for message in messages(caplog))


async def test_monitor_cancelled_ends_its_thread():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(StallMonitor().run)
        await trio.testing.wait_all_tasks_blocked()
        assert any(thread.name == "stalls" for thread in threading.enumerate())
        nursery.cancel_scope.cancel()
    assert not any(thread.name == "stalls" for thread in threading.enumerate())
