"""The event loop's delays: measured, counted, and logged with what ran."""

from __future__ import annotations

import threading
import time

import pytest
import trio
import trio.testing

from vllm_router.observability.stalls import HEARTBEAT, STALL, WINDOW, LagWatch, StallMonitor


def hog_the_loop(seconds: float) -> None:
    """Keep the loop's thread busy; other threads have their turns."""
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


async def test_monitor_lag_is_how_late_its_timer_fires(nursery, mock_clock):
    monitor = StallMonitor()
    nursery.start_soon(monitor.run)
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(HEARTBEAT + 0.75)
    await trio.testing.wait_all_tasks_blocked()
    assert monitor.lag.worst(trio.current_time()) == pytest.approx(0.75)
    assert (monitor.count, monitor.seconds) == (1, pytest.approx(0.75))


async def test_monitor_short_delays_are_no_stalls(nursery, mock_clock, caplog):
    monitor = StallMonitor()
    nursery.start_soon(monitor.run)
    for _ in range(5):
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(HEARTBEAT + STALL * 0.9)
    await trio.testing.wait_all_tasks_blocked()
    assert (monitor.count, messages(caplog)) == (0, [])


async def test_monitor_stall_logs_the_function_that_ran(nursery, caplog):
    monitor = StallMonitor()
    nursery.start_soon(monitor.run)
    await trio.testing.wait_all_tasks_blocked()
    while not any("hog_the_loop" in message for message in messages(caplog)):
        hog_the_loop(0.3)  # a busy machine may not let the watching thread in the first time
        await trio.sleep(2 * HEARTBEAT)
        monitor._logged_length = 0.0
    assert monitor.count > 0
    assert monitor.seconds >= 0.25
    found = next(message for message in messages(caplog) if "hog_the_loop" in message)
    assert "stood still for" in found
    assert "tests/unit/observability/test_stalls.py:" in found


async def test_monitor_many_stalls_log_only_the_longer_ones(nursery, mock_clock, caplog):
    monitor = StallMonitor()
    nursery.start_soon(monitor.run)
    for length in (0.2, 0.1, 0.1, 0.4, 0.3):
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(HEARTBEAT + length)
    await trio.testing.wait_all_tasks_blocked()
    assert monitor.count == 5
    lines = messages(caplog)
    assert [line[: line.index(" s,")] for line in lines] == [
        "the event loop stood still for 0.20",
        "the event loop stood still for 0.40",
    ]
    assert lines[1].endswith("(2 shorter stalls since the last line)")


async def test_monitor_hang_is_logged_while_it_lasts(nursery, caplog, monkeypatch):
    monkeypatch.setattr("vllm_router.observability.stalls.HANG", 0.1)
    monitor = StallMonitor()
    nursery.start_soon(monitor.run)
    await trio.testing.wait_all_tasks_blocked()
    end = time.monotonic() + 30
    while not any("still does" in message for message in messages(caplog)):
        assert time.monotonic() < end
        hog_the_loop(0.01)
    assert any("hog_the_loop" in message for message in messages(caplog))


async def test_monitor_cancelled_ends_its_thread():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(StallMonitor().run)
        await trio.testing.wait_all_tasks_blocked()
        assert any(thread.name == "stalls" for thread in threading.enumerate())
        nursery.cancel_scope.cancel()
    assert not any(thread.name == "stalls" for thread in threading.enumerate())
