"""The history of the feed: one row of figures per interval, for a bounded time. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import msgspec

from vllm_router.web.schema import History

FIGURES = (
    "requests_per_s",
    "errors_per_s",
    "refused_per_s",
    "saved_per_s",
    "chunks_per_s",
    "tokens_per_s",
    "running",
    "waiting",
    "queued",
    "capacity",
    "load",
    "open_streams",
    "available",
    "ttft_p50",
    "ttft_p95",
    "ttft_p99",
    "duration_p50",
    "duration_p95",
    "duration_p99",
)
"""The figures of the fleet in a row, in this order."""

INTERVAL = 1.0
_MINUTES = 300
_FACTOR = 10
_HOUR = 360

Row = tuple[float | None, ...]


class Series:
    """The last `length` rows, `interval` seconds apart, and the load of each server in them."""

    def __init__(self, interval: float, length: int) -> None:
        self._interval = interval
        self._end = 0.0
        self._rows: deque[Row] = deque(maxlen=length)
        self._loads: dict[str, deque[float | None]] = {}

    def add(self, row: Row, loads: Mapping[str, float], wall: float) -> None:
        """Append one row, with the loads of the current servers; other servers are dropped.

        `wall` is its Unix time.
        """
        before = len(self._rows)
        self._rows.append(row)
        self._end = wall
        for name in self._loads.keys() - loads.keys():
            del self._loads[name]
        for name, load in loads.items():
            values = self._loads.get(name)
            if values is None:
                values = self._loads[name] = deque([None] * before, maxlen=self._rows.maxlen)
            values.append(load)

    def message(self) -> History:
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(FIGURES)
        return History(
            interval=self._interval,
            end=self._end,
            fleet={name: list(column) for name, column in zip(FIGURES, columns, strict=True)},
            servers={name: list(values) for name, values in self._loads.items()},
        )


class Memory:
    """The last five minutes by second, and the last hour by ten seconds."""

    def __init__(self) -> None:
        self._minutes = Series(INTERVAL, _MINUTES)
        self._hour = Series(INTERVAL * _FACTOR, _HOUR)
        self._waiting: list[Row] = []
        self._encoded: tuple[bytes, bytes] | None = None

    def add(self, row: Row, loads: Mapping[str, float], wall: float) -> None:
        """Called every INTERVAL seconds."""
        self._encoded = None
        self._minutes.add(row, loads, wall)
        self._waiting.append(row)
        if len(self._waiting) == _FACTOR:
            self._hour.add(digest(self._waiting), {}, wall)
            self._waiting.clear()

    def encoded(self) -> tuple[bytes, bytes]:
        """Minutes and hour as JSON; encoded once for all clients of the same second."""
        if self._encoded is None:
            encode = msgspec.json.encode
            self._encoded = (encode(self._minutes.message()), encode(self._hour.message()))
        return self._encoded


def digest(rows: list[Row]) -> Row:
    """Combine rows: the mean, but the maximum for high percentiles."""
    return tuple(
        _digest(name, [value for value in column if value is not None])
        for name, column in zip(FIGURES, zip(*rows, strict=True), strict=True)
    )


def _digest(name: str, values: list[float]) -> float | None:
    if not values:
        return None
    return max(values) if name.endswith(("_p95", "_p99")) else round(sum(values) / len(values), 4)
