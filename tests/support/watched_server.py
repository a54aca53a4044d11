"""A server that is watched: whether it reports a change to its fleet."""

from __future__ import annotations

import math
from typing import Any

from support.fleet_makers import come_up, make_config
from vllm_router.fleet.server import Server

NEVER = -math.inf


class Watched(Server):
    """A server that counts the changes that it reports to its fleet."""

    def __init__(self, **settings: Any) -> None:
        self.count = 0
        server: dict[str, Any] = {
            "url": "http://a.test:1",
            "name": "a",
            "max_concurrent_requests": 4,
        }
        for key in ("weight", "models", "api_key", "max_in_flight"):
            if key in settings:
                server[key] = settings.pop(key)
        limits: dict[str, Any] | None = {} if "max_in_flight" in server else None
        config = make_config([server], limits=limits, **settings)
        super().__init__(config.servers[0], config.settings, self._note)

    def _note(self, server: Server) -> None:
        assert server is self
        self.count += 1

    def reported(self) -> bool:
        """Whether a change was reported since the last call."""
        count, self.count = self.count, 0
        return count > 0


def watched(now: float = 0.0, **settings: Any) -> Watched:
    """A server that is up and lists the model `m`."""
    server = Watched(**settings)
    come_up(server, now)
    server.update_state(now)
    assert server.reported()
    return server
