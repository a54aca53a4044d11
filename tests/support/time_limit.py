"""A time limit that fails a test and lets it clean up.

pytest-timeout raises from the handler of SIGALRM. In the middle of a Trio run that would break the
event loop, and no `finally` of a task would run. There, the handler sends SIGINT instead, which
Trio delivers as KeyboardInterrupt to the test's main task, and the call reports it as a failure.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import pytest_timeout
import trio

GRACE = 15.0
"""Seconds that the clean-up of a Trio test may take before the test fails on the spot."""

_EXPIRED = pytest.StashKey[float]()


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    def expire(_number: int, _frame: object) -> None:
        if trio.lowlevel.in_trio_run() and _EXPIRED not in item.stash:
            item.stash[_EXPIRED] = settings.timeout
            signal.raise_signal(signal.SIGINT)
        else:
            pytest_timeout.timeout_sigalrm(item, settings)

    def cancel() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    item.cancel_timeout = cancel  # type: ignore[attr-defined]
    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout, GRACE)
    return True


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except BaseException as error:
        limit = item.stash.get(_EXPIRED, None)
        if limit is None:
            raise
        raise AssertionError(f"cancelled: the test took longer than {limit} s") from error
