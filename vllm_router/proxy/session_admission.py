"""Admission of new sessions in the admission queue (`limits.session_admission`).

A new session waits until the servers' KV caches have room for it, while the requests of admitted
sessions pass. `SessionLeases` counts what the admitted ones need.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from vllm_router.config.limits import LimitsConfig
from vllm_router.fleet.server import Server
from vllm_router.proxy.waiter import Ticket
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.routing.queue.entry import Route
from vllm_router.routing.queue.session_leases import SessionLeases

CHECK_EVERY = 0.5
"""Seconds between two looks at whether a waiting new session fits."""

_NEW_SESSION = "new session"


class SessionAdmission:
    """The sessions of the admission queue. Without `session_admission`, it lets all pass."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._leases: SessionLeases | None = None
        self._checked_at = -math.inf
        self._waiting: Counter[str | None] = Counter()
        self.apply(limits)

    def apply(self, limits: LimitsConfig) -> None:
        """Follow `session_admission` and `session_idle`; the leases stay."""
        if not limits.session_admission:
            self._leases = None
        elif self._leases is None:
            self._leases = SessionLeases(limits.session_idle)
        else:
            self._leases.idle = limits.session_idle

    def is_new(self, ticket: Ticket) -> bool:
        """Whether the request must wait until its session fits. One that was admitted need not."""
        leases = self._leases
        return leases is not None and not ticket.returning and leases.is_new(ticket.info)

    def must_queue(self, ticket: Ticket, queue_name: str | None) -> bool:
        """Whether new sessions wait before this one: they are admitted in order of arrival."""
        return self.is_new(ticket) and self._waiting[queue_name] > 0

    def waits(self, queue_name: str | None, number: int) -> None:
        """`number` more (or fewer) requests of this process wait to begin a session."""
        self._waiting[queue_name] += number

    def route(self, ticket: Ticket, route: Route) -> Route:
        """The route of a request: new sessions are blocked apart from the admitted ones."""
        return Route(route.servers, (route.more, _NEW_SESSION)) if self.is_new(ticket) else route

    def fitting(self, ticket: Ticket, servers: Sequence[Server], now: float) -> Sequence[Server]:
        """The servers that may take the request: all but for a new session."""
        leases = self._leases
        if leases is None or not self.is_new(ticket):
            return servers
        return leases.fitting(ticket.info, servers, now)

    def begin(self, info: RoutingInfo, server: Server, now: float) -> None:
        """A request was leased the server."""
        if self._leases is not None:
            self._leases.begin(info, server, now)

    def end(self, info: RoutingInfo, now: float) -> None:
        """An attempt of an admitted request has ended."""
        if self._leases is not None:
            self._leases.end(info, now)

    def check_is_due(self, now: float) -> bool:
        """Whether to look for sessions that have become idle; every waiting one asks.

        A lease ends by idleness, which is no event. True marks the check as done.
        """
        if now - self._checked_at < CHECK_EVERY / 2:
            return False
        self._checked_at = now
        return True
