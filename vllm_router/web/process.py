"""What the router's own process costs, and how late its timers are."""

from __future__ import annotations

import os
import time
from collections import deque

import trio

_PAGE = os.sysconf("SC_PAGE_SIZE")

LAG_INTERVAL = 0.2
LAG_WINDOW = 10.0


def cpu_seconds() -> float:
    """CPU time of the process since its start, user and system."""
    return time.process_time()


def rss_bytes() -> int:
    """Resident memory; 0 where the system does not tell (no Linux /proc)."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


class LagWatch:
    """How much later than asked for a timer goes off: what every stream waits for, too."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()

    async def run(self) -> None:
        """Look every LAG_INTERVAL seconds until cancelled; costs a wake-up each."""
        while True:
            due = trio.current_time() + LAG_INTERVAL
            await trio.sleep_until(due)
            now = trio.current_time()
            self.add(now - due, now)

    def add(self, lag: float, now: float) -> None:
        """Keeps only those that no later one exceeds, so the first is the greatest."""
        seen = self._seen
        while seen and seen[-1][1] <= lag:
            seen.pop()
        seen.append((now, lag))
        while seen[0][0] < now - LAG_WINDOW:
            seen.popleft()

    def worst(self, now: float) -> float:
        """The longest within LAG_WINDOW seconds."""
        while self._seen and self._seen[0][0] < now - LAG_WINDOW:
            self._seen.popleft()
        return self._seen[0][1] if self._seen else 0.0
