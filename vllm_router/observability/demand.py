"""The demand for each model in requests, for autoscalers. It exists at zero servers, too."""

from __future__ import annotations

import math
from collections import deque

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


class ModelDemand:
    """Requests in the engines, running and waiting, by model. Servers are added one by one.

    Models that have a demand are expected by the configuration, or listed by servers. LoRA adapters
    have none: they run on the servers of their model.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._models = dict.fromkeys(sorted(fleet.expected))
        self._requests: dict[str, float] = {}

    def add(self, server: Server, *, leaving: bool) -> None:
        """Count a server; one that is leaving has requests, but lists nothing any more."""
        there = server.running + server.waiting
        for name in server.catalog.own:
            if not leaving:
                self._models[name] = None
            self._requests[name] = self._requests.get(name, 0.0) + there

    def first(self, most: int) -> dict[str, float]:
        """The demand of the models, of the first ones if there are more."""
        return {name: self._requests.get(name, 0.0) for name in list(self._models)[:most]}
