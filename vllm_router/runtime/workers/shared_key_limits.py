"""Limits of API keys that hold for all processes together.

Each process publishes the number of running requests per key and the total it has ever admitted.
Each runs the same token bucket, and takes the others' admissions from it as soon as it sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter

from vllm_router.config.auth import KeyConfig
from vllm_router.proxy.key_limits import KeyLimits
from vllm_router.runtime.workers.shared_counters import CounterView


def column_keys(key: KeyConfig) -> tuple[str, str]:
    """The counter keys of an API key: running requests, admitted requests."""
    return f"key {key.name}: running", f"key {key.name}: admitted"


def _columns_for(key: KeyConfig, column_of: Callable[[str], int | None]) -> tuple[int, int] | None:
    running, admitted = map(column_of, column_keys(key))
    return None if running is None or admitted is None else (running, admitted)


class SharedKeyLimits(KeyLimits):
    """`refresh` reads the shared counters and calls `changed` for each difference."""

    def __init__(self, counters: CounterView, refresh: Callable[[], None]) -> None:
        super().__init__()
        self._counters = counters
        self._refresh = refresh
        self._columns: dict[str, tuple[int, int]] = {}
        self._of_column: dict[int, tuple[KeyConfig, bool]] = {}
        self._running: dict[str, int] = {}
        self._admitted: dict[str, int] = {}

    def release_columns(
        self, keys: Iterable[KeyConfig], column_of: Callable[[str], int | None]
    ) -> None:
        """Release the columns that these keys do not use any more."""
        wanted = {key.name: _columns_for(key, column_of) for key in keys}
        for name, columns in list(self._columns.items()):
            if wanted.get(name) != columns:
                del self._columns[name]
                for column in columns:
                    self._counters.put(column, 0)

    def use_columns(
        self, keys: Iterable[KeyConfig], column_of: Callable[[str], int | None]
    ) -> None:
        """Use the columns of these keys; a key without columns counts its own requests only."""
        found = [(key, _columns_for(key, column_of)) for key in keys]
        self._counters.watch(max((max(columns) for _, columns in found if columns), default=0))
        # Admissions before the first refresh are not taken from the bucket.
        self._refresh()
        self._of_column.clear()
        for key, columns in found:
            own = self._running.get(key.name, 0) + self._elsewhere.get(key.name, 0)
            if columns is None:
                self._use(key, perf_counter()).running = own
                continue
            running, admitted = columns
            self._of_column[running] = key, True
            self._of_column[admitted] = key, False
            self._use(key, perf_counter()).running = own + self._counters.elsewhere[running]
            if self._columns.get(key.name) != columns:
                self._columns[key.name] = columns
                self._admitted[key.name] = 0
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
        columns = self._columns.get(name)
        if columns is not None:
            self._counters.put(columns[0], self._running.get(name, 0))
            self._counters.put(columns[1], self._admitted.get(name, 0))

    def enter(self, key: KeyConfig, now: float) -> None:
        self._refresh()
        super().enter(key, now)
        self._running[key.name] = self._running.get(key.name, 0) + 1
        self._admitted[key.name] = self._admitted.get(key.name, 0) + 1
        self._show(key.name)

    def leave(self, key: KeyConfig, took: float) -> None:
        super().leave(key, took)
        self._running[key.name] -= 1
        self._show(key.name)
