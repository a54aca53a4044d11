"""A clock with the same time in all processes of a router."""

from __future__ import annotations

from time import perf_counter

import trio


class SharedClock(trio.abc.Clock):
    """The system's monotonic time, without Trio's random offset per process.

    A time noted in one process is valid in another.
    """

    def start_clock(self) -> None:
        """The system clock always runs."""

    def current_time(self) -> float:
        return perf_counter()

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - perf_counter()
