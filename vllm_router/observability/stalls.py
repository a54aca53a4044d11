"""Notices when the event loop stands still, measures it, and says what ran meanwhile.

A task sleeps for a moment again and again: how late it wakes is how long every client waited for
its turn. A thread looks at the stack of the loop's thread when the task is late, for afterwards
nothing shows what took so long.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections import deque
from types import FrameType

import trio

log = logging.getLogger(__name__)

HEARTBEAT = 0.05
"""Seconds between two looks at the loop. Each wakes an idle process: at 0.025 the monitor took
1.8 % of a core. A stall may have begun so much earlier than its delay says."""

STALL = 0.05
"""Seconds of delay that count as a stall."""

SAMPLE_AFTER = 0.1
"""Seconds without a heartbeat after which the thread looks at the loop's stack: at least half of
them have been a stall then."""

HANG = 5.0
"""Seconds after which a stall is logged while it lasts: it may never end."""

QUIET = 60.0
"""Seconds between two log lines, unless a stall is longer than the last one that was logged."""

WINDOW = 10.0
"""Seconds for which `LagWatch` remembers a delay."""

FRAMES = 8
"""Frames of the stack in a log line, the innermost first."""

_SKIPPED = ("-packages/trio/", "-packages/outcome/")


class LagWatch:
    """The longest delay of a timer within the last WINDOW seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()

    def add(self, lag: float, now: float) -> None:
        """Note a delay. Those that a later one exceeds are dropped: the first is the longest."""
        seen = self._seen
        while seen and seen[-1][1] <= lag:
            seen.pop()
        seen.append((now, lag))
        while seen[0][0] < now - WINDOW:
            seen.popleft()

    def worst(self, now: float) -> float:
        """The longest delay, in seconds."""
        while self._seen and self._seen[0][0] < now - WINDOW:
            self._seen.popleft()
        return self._seen[0][1] if self._seen else 0.0


class StallMonitor:
    """Watches the loop in which `run` runs.

    `count` and `seconds` are the number of stalls and their total length since the start; `lag`
    has the worst recent delay, stall or not.
    """

    def __init__(self) -> None:
        self.lag = LagWatch()
        self.count = 0
        self.seconds = 0.0
        self._beat = math.inf
        self._stack = ""
        self._logged_at = -math.inf
        self._logged_length = 0.0
        self._unlogged = 0

    async def run(self) -> None:
        """Watch until cancelled."""
        stop = threading.Event()
        watchdog = threading.Thread(
            target=self._watch, args=(threading.get_ident(), stop), name="stalls", daemon=True
        )
        self._beat = time.monotonic()
        watchdog.start()
        try:
            while True:
                due, computed = trio.current_time() + HEARTBEAT, time.thread_time()
                await trio.sleep_until(due)
                now = trio.current_time()
                self._beat = time.monotonic()
                lag = now - due
                self.lag.add(lag, now)
                if lag > STALL:
                    self._stalled(lag, time.thread_time() - computed, now)
        finally:
            stop.set()
            watchdog.join()

    def _stalled(self, lag: float, computed: float, now: float) -> None:
        """The loop goes on after a stall of `lag` seconds, `computed` of them on the CPU."""
        self.count += 1
        self.seconds += lag
        stack, self._stack = self._stack, ""
        if now - self._logged_at < QUIET and lag <= self._logged_length:
            self._unlogged += 1
            return
        earlier, self._unlogged = self._unlogged, 0
        self._logged_at, self._logged_length = now, lag
        log.warning(
            "the event loop stood still for %.2f s, computing for %.2f s of them%s%s",
            lag,
            min(computed, lag),
            f", in {stack}" if stack else "",
            f" ({earlier} shorter stalls since the last line)" if earlier else "",
        )

    # -- in the thread ------------------------------------------------------------------------

    def _watch(self, loop_thread: int, stop: threading.Event) -> None:
        sampled = hung = -math.inf
        while not stop.wait(max(0.001, self._beat + SAMPLE_AFTER - time.monotonic())):
            beat, now = self._beat, time.monotonic()
            if now - beat < SAMPLE_AFTER:
                continue
            if sampled != beat:
                sampled = beat
                self._stack = _stack_of(loop_thread)
            elif now - beat > HANG and hung != beat:
                hung = beat
                log.error(
                    "the event loop has stood still for %.0f s and still does, in %s",
                    now - beat,
                    _stack_of(loop_thread),
                )
            if stop.wait(SAMPLE_AFTER):
                return


def _stack_of(thread: int) -> str:
    """The innermost frames of a thread, as `file:line function`, separated by ` < `."""
    # There is no other way to see what a thread runs; documented for exactly this use.
    frame: FrameType | None = sys._current_frames().get(thread)
    shown: list[str] = []
    while frame is not None and len(shown) < FRAMES:
        code = frame.f_code
        path = code.co_filename.replace("\\", "/")
        if not any(part in path for part in _SKIPPED):
            shown.append(f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " < ".join(shown) or "the event loop itself"
