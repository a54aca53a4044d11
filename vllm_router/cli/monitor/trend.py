"""The course of the fleet's figures, by second and by ten seconds. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from vllm_router.web.downsampling import FACTOR, HOUR, MINUTES, digest
from vllm_router.web.schema import FleetView, Hello

Read = Callable[[FleetView], float | None]

FIGURES: Mapping[str, Read] = {
    "requests_per_s": lambda fleet: fleet.requests_per_s,
    "tokens_per_s": lambda fleet: fleet.tokens_per_s,
    "ttft_p95": lambda fleet: fleet.ttft.p95 if fleet.ttft else None,
    "running": lambda fleet: fleet.running,
    "load": lambda fleet: fleet.load,
}
"""The figures that are kept, named as in the feed's history."""

Values = deque[float | None]


class Trend:
    """The last values of each figure, oldest first; None where there was none."""

    def __init__(self) -> None:
        self._minutes: dict[str, Values] = {name: deque(maxlen=MINUTES) for name in FIGURES}
        self._hour: dict[str, Values] = {name: deque(maxlen=HOUR) for name in FIGURES}
        self._rows = 0

    def greet(self, hello: Hello) -> None:
        """Take over what the router remembers."""
        for name in FIGURES:
            self._minutes[name] = deque(hello.history.fleet.get(name, ()), MINUTES)
            self._hour[name] = deque(hello.hour.fleet.get(name, ()), HOUR)
        self._rows = 0

    def add(self, fleet: FleetView | None) -> None:
        """Append the figures of the next second; None if there are none."""
        for name, read in FIGURES.items():
            self._minutes[name].append(read(fleet) if fleet is not None else None)
        self._rows += 1
        if self._rows % FACTOR == 0:
            for name, values in self._minutes.items():
                self._hour[name].append(digest(name, list(values)[-FACTOR:]))

    def values(self, name: str, *, hour: bool) -> Values:
        """The values of a figure in the last hour, or in the last five minutes."""
        return (self._hour if hour else self._minutes)[name]
