"""Measures how long tasks hold the event loop, in function calls, which no busy machine changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import trio


class LongestRun(trio.abc.Instrument):
    """calls: the most calls of Python functions in one step of a task.

    A step ends where other tasks run. A comprehension counts as one call: a loop of cheap work.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._calls = 0

    def profile(self, _: FrameType, event: str, __: object) -> None:
        self._calls += event == "call"

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._calls = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.end()

    def end(self) -> None:
        """The present step counts, too."""
        self.calls = max(self.calls, self._calls)


@contextmanager
def longest_run() -> Iterator[LongestRun]:
    """Counts in the block, in all tasks."""
    run = LongestRun()
    before = sys.getprofile()
    trio.lowlevel.add_instrument(run)
    sys.setprofile(run.profile)
    try:
        yield run
    finally:
        sys.setprofile(before)
        trio.lowlevel.remove_instrument(run)
        run.end()
