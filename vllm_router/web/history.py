"""The history of the feed: one row of figures per interval, for a bounded time. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import cast

import msgspec

from vllm_router.observability.slices import each
from vllm_router.steps import Steps
from vllm_router.web.downsampling import FACTOR, HOUR, MINUTES, digest
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

COLUMNS_AT_ONCE = 50
"""Servers whose loads, up to 300 each, are encoded in one slice."""

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

    def encode(self) -> Steps[bytes]:
        """The series as JSON. Rows must not be added meanwhile."""
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(FIGURES)
        loads = yield from each(list(self._loads.values()), _encoded, COLUMNS_AT_ONCE)
        message = History(
            interval=self._interval,
            end=self._end,
            fleet={name: list(column) for name, column in zip(FIGURES, columns, strict=True)},
            servers=dict(zip(self._loads, loads, strict=True)),
        )
        return msgspec.json.encode(message)


def _encoded(values: deque[float | None]) -> list[float | None]:
    # Raw is encoded unchanged; its type is the type of its content.
    return cast("list[float | None]", msgspec.Raw(msgspec.json.encode(list(values))))


class Memory:
    """The last five minutes by second, and the last hour by ten seconds."""

    def __init__(self) -> None:
        self._minutes = Series(INTERVAL, MINUTES)
        self._hour = Series(INTERVAL * FACTOR, HOUR)
        self._waiting: list[Row] = []
        self._encoded: tuple[bytes, bytes] | None = None
        self._is_encoding = False
        self._postponed: list[tuple[Row, Mapping[str, float], float]] = []

    def add(self, row: Row, loads: Mapping[str, float], wall: float) -> None:
        """Called every INTERVAL seconds."""
        if self._is_encoding:
            self._postponed.append((row, loads, wall))
            return
        self._encoded = None
        self._minutes.add(row, loads, wall)
        self._waiting.append(row)
        if len(self._waiting) == FACTOR:
            self._hour.add(digest_rows(self._waiting), {}, wall)
            self._waiting.clear()

    def encode(self) -> Steps[tuple[bytes, bytes]]:
        """Minutes and hour as JSON; encoded once for all clients of the same second.

        A row that comes meanwhile is added afterwards, so that all columns end with the same one.
        Only one caller at a time.
        """
        if self._encoded is not None:
            return self._encoded
        self._is_encoding = True
        try:
            minutes = yield from self._minutes.encode()
            hour = yield from self._hour.encode()
            self._encoded = minutes, hour
        finally:
            self._is_encoding = False
            postponed, self._postponed = self._postponed, []
            for row, loads, wall in postponed:
                self.add(row, loads, wall)
        return minutes, hour


def digest_rows(rows: list[Row]) -> Row:
    """Combine rows into one."""
    columns = zip(FIGURES, zip(*rows, strict=True), strict=True)
    return tuple(digest(name, column) for name, column in columns)
