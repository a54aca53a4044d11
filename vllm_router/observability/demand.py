"""The demand for each model in requests, for autoscalers. It exists at zero servers, too."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server

REFUSED_FOR = 60.0
"""Seconds for which a refused request counts: an autoscaler looks every 15 to 30 s."""

WANT_OF_SERVER = frozenset(
    {"no_server_available", "queue_full", "queue_displaced", "queue_too_long", "queue_timeout"}
)
"""Codes of refusals because no server was free."""


class RecentRefusals:
    """Requests for one model that were refused within the last REFUSED_FOR seconds, per second."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int]] = deque()

    def add(self, now: float) -> None:
        second = math.floor(now)
        count = 1
        if self._seconds and self._seconds[-1][0] == second:
            count += self._seconds.pop()[1]
        self._seconds.append((second, count))
        self.count(now)

    def count(self, now: float) -> int:
        """The number within the time; forgets older ones."""
        while self._seconds and self._seconds[0][0] + REFUSED_FOR <= now:
            self._seconds.popleft()
        return sum(count for _, count in self._seconds)


def models_in_demand(fleet: Fleet, most: int) -> list[str]:
    """The models that have a demand: expected by the configuration, or listed by servers.

    LoRA adapters are none: they run on the servers of their model.
    """
    names = dict.fromkeys(sorted(fleet.expected))
    for server in fleet.servers.values():
        names.update(dict.fromkeys(own_models(server)))
    return list(names)[:most]


def engine_demand(servers: Iterable[Server]) -> dict[str, float]:
    """Requests in the engines, running and waiting, by model."""
    demand: dict[str, float] = {}
    for server in servers:
        there = server.running + server.waiting
        for name in own_models(server):
            demand[name] = demand.get(name, 0.0) + there
    return demand


def own_models(server: Server) -> list[str]:
    """The server's models without adapters; several names of one model all count."""
    cards = server.catalog.cards
    return [name for name in server.models or () if cards.get(name, {}).get("parent") is None]
