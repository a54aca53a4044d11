"""What the feed remembers: one row of figures per interval, for a bounded time. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

FIGURES = (
    "requests_per_s",
    "errors_per_s",
    "chunks_per_s",
    "running",
    "waiting",
    "capacity",
    "load",
    "open_streams",
    "ttft_p95",
    "duration_p95",
)
"""The series kept of the fleet, in this order."""

Row = tuple[float | None, ...]


class Series:
    """The last `length` rows, `interval` seconds apart, and the load of each server in them."""

    def __init__(self, interval: float, length: int) -> None:
        self.interval = interval
        self._rows: deque[Row] = deque(maxlen=length)
        self._loads: dict[str, deque[float | None]] = {}

    def add(self, row: Row, loads: Mapping[str, float]) -> None:
        """Append one row, with the loads of the servers there are; others are forgotten."""
        before = len(self._rows)
        self._rows.append(row)
        for name in self._loads.keys() - loads.keys():
            del self._loads[name]
        for name, load in loads.items():
            values = self._loads.get(name)
            if values is None:
                values = self._loads[name] = deque([None] * before, maxlen=self._rows.maxlen)
            values.append(load)

    def fleet(self) -> dict[str, list[float | None]]:
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(FIGURES)
        return {name: list(column) for name, column in zip(FIGURES, columns, strict=True)}

    def servers(self) -> dict[str, list[float | None]]:
        return {name: list(values) for name, values in self._loads.items()}


class Thinner:
    """Makes one row of `factor`: means, or the greatest where the name ends in a percentile."""

    def __init__(self, factor: int) -> None:
        self._factor = factor
        self._rows: list[Row] = []

    def add(self, row: Row) -> Row | None:
        """Take a row in; the row of the last `factor` ones once they are complete."""
        self._rows.append(row)
        if len(self._rows) < self._factor:
            return None
        columns = list(zip(*self._rows, strict=True))
        self._rows.clear()
        return tuple(
            _digest(name, [value for value in column if value is not None])
            for name, column in zip(FIGURES, columns, strict=True)
        )


def _digest(name: str, values: list[float]) -> float | None:
    if not values:
        return None
    if name.endswith("_p95"):
        return max(values)
    return round(sum(values) / len(values), 4)
