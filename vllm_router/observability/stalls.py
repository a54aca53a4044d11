"""Detects stalls of the event loop, measures them, and logs the code that caused them.

The duration of a turn of the event loop is the delay of every client: the hub of the connections
measures it. A thread samples the stack of the event loop's thread during a long turn, because
afterwards nothing shows the cause.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType

import trio

from vllm_router.http.io.hub import EventLoopHub
from vllm_router.http.io.turns import LONG, Turns

log = logging.getLogger(__name__)

LOOK_EVERY = 0.1
"""Seconds between two samples.

A sample during a turn is repeated once the turn is LONG, so that a stall of LOOK_EVERY + LONG is
always seen. Each sample costs about 30 µs.
"""

LOOK_SELDOM = 0.5
"""The interval after a sample without any turn since the previous one: an idle router."""

HANG = 5.0
"""Seconds after which a stall is logged while it lasts, because it may never end."""

QUIET = 60.0
"""Seconds between two log lines, unless a stall is longer than the last logged one."""

WINDOW = 10.0
"""Seconds for which `LagWatch` keeps a delay."""

FRAMES = 8
"""Stack frames in a log line, the innermost first."""

_SKIPPED = ("-packages/trio/", "-packages/outcome/")


class LagWatch:
    """The longest delay within the last WINDOW seconds.

    `source` returns the longest since its last call.
    """

    def __init__(self) -> None:
        self.source: Callable[[], float] | None = None
        self._seen: deque[tuple[float, float]] = deque()

    def add(self, lag: float, now: float) -> None:
        """Add a delay. Earlier, shorter ones are dropped, so that the first is the longest."""
        seen = self._seen
        while seen and seen[-1][1] <= lag:
            seen.pop()
        seen.append((now, lag))
        while seen[0][0] < now - WINDOW:
            seen.popleft()

    def worst(self, now: float) -> float:
        """The longest delay, in seconds."""
        if self.source is not None:
            self.add(self.source(), now)
        while self._seen and self._seen[0][0] < now - WINDOW:
            self._seen.popleft()
        return self._seen[0][1] if self._seen else 0.0


class StallMonitor:
    """Watches the event loop in which `run` runs.

    `count` and `seconds` are the number of stalls and their total duration since the start; `lag`
    has the longest recent delay, stall or not.
    """

    def __init__(self) -> None:
        self.lag = LagWatch()
        self.count = 0
        self.seconds = 0.0
        self._turns = Turns(self._stalled, time.monotonic())
        self._sample = (-1, "")
        self._computed = 0.0
        self._logged_at = -math.inf
        self._logged_length = 0.0
        self._unlogged = 0

    async def run(self) -> None:
        """Watch until cancelled."""
        stop = threading.Event()
        clock = time.pthread_getcpuclockid(threading.get_ident())
        watchdog = threading.Thread(
            target=self._watch,
            args=(threading.get_ident(), clock, stop),
            name="stalls",
            daemon=True,
        )
        hub = EventLoopHub.of_this_run()
        self._computed = time.thread_time()
        watchdog.start()
        try:
            hub.turns, self.lag.source = self._turns, self._turns.take_longest
            await trio.sleep_forever()
        finally:
            hub.turns = self.lag.source = None
            stop.set()
            watchdog.join()

    def _stalled(self, lag: float) -> None:
        """The event loop continues after a stall of `lag` seconds.

        Called between tasks; must not raise.
        """
        now, computed = time.monotonic(), time.thread_time() - self._computed
        self.count += 1
        self.seconds += lag
        number, stack = self._sample
        if number != self._turns.number:
            stack = ""
        if now - self._logged_at < QUIET and lag <= self._logged_length:
            self._unlogged += 1
            return
        earlier, self._unlogged = self._unlogged, 0
        self._logged_at, self._logged_length = now, lag
        log.warning(
            "the event loop was blocked for %.2f s (%.2f s of CPU time)%s%s%s",
            lag,
            min(computed, lag),
            f" in {stack}" if stack else "",
            "; the machine had no CPU free for the router" if computed < lag / 2 else "",
            f" ({earlier} shorter stalls since the last line)" if earlier else "",
        )

    # -- in the thread ------------------------------------------------------------------------

    def _watch(self, loop_thread: int, clock: int, stop: threading.Event) -> None:
        turns = self._turns
        sampled = hung = last = -1
        pause = LOOK_EVERY
        while not stop.wait(pause):
            number, lasts = turns.number, time.monotonic() - turns.began
            if lasts < LONG:
                # No turn, or a short one: CPU time until the next sample may belong to a long turn.
                self._computed = time.clock_gettime(clock)
                pause = LONG - lasts if lasts > 0 else LOOK_EVERY
                if number == last and lasts < 0:
                    pause = LOOK_SELDOM
                last = number
                continue
            pause = LOOK_EVERY
            if sampled != number:
                sampled = number
                self._sample = (number, _stack_of(loop_thread))
            elif lasts > HANG and hung != number:
                hung = number
                log.error(
                    "the event loop has been blocked for %.0f s and still is, in %s",
                    lasts,
                    _stack_of(loop_thread),
                )


def _stack_of(thread: int) -> str:
    """The innermost frames of a thread, as `file:line function`, separated by ` < `."""
    # The only way to see what another thread runs; documented for this use.
    frame: FrameType | None = sys._current_frames().get(thread)  # noqa: SLF001 (documented)
    shown: list[str] = []
    while frame is not None and len(shown) < FRAMES:
        code = frame.f_code
        path = code.co_filename.replace("\\", "/")
        if not any(part in path for part in _SKIPPED):
            shown.append(f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " < ".join(shown) or "the event loop itself"
