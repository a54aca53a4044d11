"""Messages to systemd, by the protocol of sd_notify(3)."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from vllm_router.runtime.service_manager import STATUS_INTERVAL, ServiceManager, watchdog_seconds

SOCKET = {"NOTIFY_SOCKET": "/run/systemd/notify"}


class Systemd:
    """The messages of a manager, as lists of lines."""

    def __init__(self, **environ: str) -> None:
        self.messages: list[list[str]] = []
        self.manager = ServiceManager(SOCKET | environ, self._take)

    def _take(self, text: str, environ: Any) -> None:
        self.messages.append(text.split("\n"))


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "20000000"}, 20.0),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": str(os.getpid())}, 20.0),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "9" * 30}, None),
    ],
)
def test_watchdog_seconds_follow_environment(environ: dict[str, str], seconds: float | None):
    assert watchdog_seconds(environ) == seconds


async def test_watchdog_is_fed_twice_per_interval(autojump_clock: MockClock):
    systemd = Systemd(WATCHDOG_USEC="4000000")
    with trio.move_on_after(9):
        await systemd.manager.run(lambda: "2 of 2 servers up")
    assert systemd.messages == [["WATCHDOG=1", "STATUS=2 of 2 servers up"]] + [["WATCHDOG=1"]] * 4


async def test_status_is_sent_when_it_changes(autojump_clock: MockClock):
    systemd = Systemd()
    states = iter(["a", "a", "b\nREADY=1", "b\nREADY=1", "c"])
    with trio.move_on_after(4.5 * STATUS_INTERVAL):
        await systemd.manager.run(lambda: next(states))
    assert systemd.messages == [["STATUS=a"], ["STATUS=b READY=1"], ["STATUS=c"]]


async def test_manager_without_socket_does_nothing():
    sent: list[str] = []
    manager = ServiceManager({"WATCHDOG_USEC": "1000"}, lambda text, environ: sent.append(text))
    await manager.run(lambda: "up")
    assert sent == []


def test_reload_is_announced_with_time_and_ended_with_ready():
    systemd = Systemd()
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    with pytest.raises(KeyError), systemd.manager.reloading():
        raise KeyError
    (state, moment), ready = systemd.messages
    assert (state, ready) == ("RELOADING=1", ["READY=1"])
    assert int(moment.removeprefix("MONOTONIC_USEC=")) >= before


def test_ready_and_stopping_have_status():
    systemd = Systemd()
    systemd.manager.ready("1 of 1 servers up")
    systemd.manager.stopping()
    assert systemd.messages == [
        ["READY=1", "STATUS=1 of 1 servers up"],
        ["STOPPING=1", "STATUS=draining"],
    ]
