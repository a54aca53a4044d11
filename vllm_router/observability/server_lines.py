"""The lines of the Prometheus page that are read of each server, all families in one pass."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State
from vllm_router.observability.demand import ModelDemand
from vllm_router.observability.model_rows import ModelCount
from vllm_router.observability.prometheus_text import Family
from vllm_router.observability.server_families import (
    PREFIX_COUNTERS,
    SERVER_GAUGES,
    SERVER_INFO,
    SERVER_STATE,
)
from vllm_router.routing.server_estimate import PrefixStatistics

LINES_AT_ONCE = 500
"""Servers whose finished lines are joined in one piece of a page."""


class ServerKeys:
    """The samples of one server up to their values, which are rendered once."""

    __slots__ = ("_info", "_states", "_texts", "_url", "gauges", "name", "prefix")

    def __init__(self, name: str) -> None:
        self.name = name
        self.gauges = [family.key(name) for family, _ in SERVER_GAUGES]
        self.prefix = [family.key(name) for family, _ in PREFIX_COUNTERS]
        self._states = {state: SERVER_STATE.key(name, state) for state in State}
        self._texts: dict[State, str] = {}
        self._url = self._info = ""

    def info(self, url: str) -> str:
        """The line with the URL, which another server of this name may change."""
        if url != self._url:
            self._url, self._info = url, f"{SERVER_INFO.key(self.name, url)}1\n"
        return self._info

    def state(self, current: State) -> str:
        """One line per state."""
        text = self._texts.get(current)
        if text is None:
            lines = [f"{key}{int(state is current)}\n" for state, key in self._states.items()]
            text = self._texts[current] = "".join(lines)
        return text


class ServerLines:
    """Servers are added one after the other; other tasks may run in between.

    All samples of a server, and its part in the figures of its models, are of the same moment.
    """

    def __init__(self, fleet: Fleet, now: float) -> None:
        self.models = ModelCount(fleet)
        self.demand = ModelDemand(fleet)
        self._now = now
        self._states: list[str] = []
        self._infos: list[str] = []
        self._gauges: list[list[str]] = [[] for _ in SERVER_GAUGES]
        self._prefix: list[list[str]] = [[] for _ in PREFIX_COUNTERS]

    def count(self, server: Server, *, leaving: bool) -> State:
        """Count a server for its models; returns its state for `add`."""
        state = server.current_state(self._now)[0]
        if not leaving:
            self.models.add(server, state)
        self.demand.add(server, leaving=leaving)
        return state

    def add(
        self, server: Server, state: State, keys: ServerKeys, expected: PrefixStatistics | None
    ) -> None:
        """Read a server. `expected` are the policy's estimates of its prefix cache."""
        now = self._now
        self._states.append(keys.state(state))
        self._infos.append(keys.info(server.url))
        for (_, read), lines, key in zip(SERVER_GAUGES, self._gauges, keys.gauges, strict=True):
            value = read(server, now, state)
            if value is not None:
                lines.append(f"{key}{value}\n")
        engine = server.metrics
        if expected is not None or engine is not None:
            for (_, value_of), lines, key in zip(
                PREFIX_COUNTERS, self._prefix, keys.prefix, strict=True
            ):
                value = value_of(expected, engine)
                if value is not None:
                    lines.append(f"{key}{value}\n")

    def blocks(self, *, with_prefix: bool) -> Iterator[str]:
        """The page of these families in pieces."""
        yield from _block(SERVER_STATE, self._states)
        yield from _block(SERVER_INFO, self._infos)
        for (family, _), lines in zip(SERVER_GAUGES, self._gauges, strict=True):
            yield from _block(family, lines)
        if with_prefix:
            for (counter, _), lines in zip(PREFIX_COUNTERS, self._prefix, strict=True):
                yield from _block(counter, lines)


def _block(family: Family, lines: list[str]) -> Iterator[str]:
    yield family.header
    for begin in range(0, len(lines), LINES_AT_ONCE):
        yield "".join(lines[begin : begin + LINES_AT_ONCE])
