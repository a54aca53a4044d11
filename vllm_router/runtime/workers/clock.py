"""One clock for several processes."""

from __future__ import annotations

from time import perf_counter

import trio


class SharedClock(trio.abc.Clock):
    """Trio's clock without the offset that each process draws: the system's monotonic time.

    So a time that one process has noted means the same in another.
    """

    def start_clock(self) -> None:
        """It always runs."""

    def current_time(self) -> float:
        return perf_counter()

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - perf_counter()
