"""Limits of API keys that hold for all processes together.

Each process publishes the number of running requests per key and the total it has ever admitted.
Each runs the same token bucket, and takes the others' admissions from it as soon as it sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter

from vllm_router.config.auth import KeyConfig
from vllm_router.proxy.key_limits import Usage
from vllm_router.runtime.workers.shared_counters import CounterView


def column_keys(key: KeyConfig) -> tuple[str, str]:
    """The counter keys of an API key: running requests, admitted requests."""
    return f"key {key.name}: running", f"key {key.name}: let in"


def _places(key: KeyConfig, column_of: Callable[[str], int | None]) -> tuple[int, int] | None:
    running, let_in = map(column_of, column_keys(key))
    return None if running is None or let_in is None else (running, let_in)


class SharedUsage(Usage):
    """`look` reads the shared counters and calls `changed` for each difference."""

    def __init__(self, counters: CounterView, look: Callable[[], None]) -> None:
        super().__init__()
        self._counters = counters
        self._look = look
        self._columns: dict[str, tuple[int, int]] = {}
        self._of_column: dict[int, tuple[KeyConfig, bool]] = {}
        self._running: dict[str, int] = {}
        self._let_in: dict[str, int] = {}

    def give_places_back(
        self, keys: Iterable[KeyConfig], column_of: Callable[[str], int | None]
    ) -> None:
        """Release the columns that these keys do not use any more."""
        wanted = {key.name: _places(key, column_of) for key in keys}
        for name, places in list(self._columns.items()):
            if wanted.get(name) != places:
                del self._columns[name]
                for column in places:
                    self._counters.put(column, 0)

    def take_places(
        self, keys: Iterable[KeyConfig], column_of: Callable[[str], int | None]
    ) -> None:
        """Use the columns of these keys; a key without columns counts its own requests only."""
        found = [(key, _places(key, column_of)) for key in keys]
        self._counters.watch(max((max(places) for _, places in found if places), default=0))
        # Admissions before the first look are not taken from the bucket.
        self._look()
        self._of_column.clear()
        for key, places in found:
            own = self._running.get(key.name, 0) + self._elsewhere.get(key.name, 0)
            if places is None:
                self._use(key, perf_counter()).running = own
                continue
            running, let_in = places
            self._of_column[running] = key, True
            self._of_column[let_in] = key, False
            self._use(key, perf_counter()).running = own + self._counters.elsewhere[running]
            if self._columns.get(key.name) != places:
                self._columns[key.name] = places
                self._let_in[key.name] = 0
                self._show(key.name)

    def changed(self, column: int, difference: int) -> None:
        """A counter of the other processes has changed."""
        found = self._of_column.get(column)
        if found is None:
            return
        key, is_running = found
        use = self._use(key, perf_counter())
        if is_running:
            use.running += difference
        elif difference > 0:  # otherwise a process has restarted
            use.refill((key.requests_per_minute or 0.0) / self.routers, perf_counter())
            use.tokens -= difference
            use.admitted += difference

    def _show(self, name: str) -> None:
        places = self._columns.get(name)
        if places is not None:
            self._counters.put(places[0], self._running.get(name, 0))
            self._counters.put(places[1], self._let_in.get(name, 0))

    def enter(self, key: KeyConfig, now: float) -> None:
        self._look()
        super().enter(key, now)
        self._running[key.name] = self._running.get(key.name, 0) + 1
        self._let_in[key.name] = self._let_in.get(key.name, 0) + 1
        self._show(key.name)

    def leave(self, key: KeyConfig, took: float) -> None:
        super().leave(key, took)
        self._running[key.name] -= 1
        self._show(key.name)
