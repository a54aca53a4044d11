"""Admission of sessions: how much of the servers' KV caches the admitted ones need. Pure.

More agents than the caches hold evict each other's context, and every turn is computed from the
start. So a new session waits until it fits, while the admitted ones go on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.prompt.routing_info import RoutingInfo

BYTES_PER_TOKEN = 4.0
MAX_SESSIONS = 20_000
"""Admitted sessions that are remembered; beyond, the one that was idle longest is forgotten."""


class _Lease:
    __slots__ = ("in_flight", "seen_at", "server", "tokens")

    def __init__(self, server: Server) -> None:
        self.server = server
        self.tokens = 0.0
        self.seen_at = 0.0
        self.in_flight = 0


class SessionLeases:
    """The admitted sessions, each with its last server and its tokens there.

    A lease ends when its session has had no request for `idle` seconds.
    """

    def __init__(self, idle: float) -> None:
        self.idle = idle
        self._leases: OrderedDict[str | int, _Lease] = OrderedDict()
        self._held: dict[Server, float] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def held(self, server: Server) -> float:
        """Tokens of the sessions on this server."""
        return self._held.get(server, 0.0)

    def is_new(self, info: RoutingInfo) -> bool:
        """Whether the request begins a session. Short requests without a session never do."""
        key = _key(info)
        return key is not None and key not in self._leases

    def fitting(self, info: RoutingInfo, candidates: Sequence[Server], now: float) -> list[Server]:
        """The candidates whose KV cache has room for the new session.

        A server without sessions has room for any, and so has one whose cache size is not known.
        """
        self.expire(now)
        tokens = info.prompt.size / BYTES_PER_TOKEN
        found = []
        for server in candidates:
            held = self._held.get(server, 0.0)
            metrics = server.metrics
            size = metrics.kv_tokens if metrics is not None else None
            if not held or size is None or held + tokens <= size:
                found.append(server)
        return found

    def begin(self, info: RoutingInfo, server: Server, now: float) -> None:
        """A request was leased the server: its session is admitted, or goes on."""
        key = _key(info)
        if key is None:
            return
        lease = self._leases.get(key)
        if lease is None:
            lease = self._leases[key] = _Lease(server)
        else:
            self._leases.move_to_end(key)
            self._add(lease.server, -lease.tokens)
        lease.server, lease.tokens = server, info.prompt.size / BYTES_PER_TOKEN
        lease.seen_at = now
        lease.in_flight += 1
        self._add(server, lease.tokens)
        if len(self._leases) > MAX_SESSIONS:
            self._drop(next(iter(self._leases)))

    def end(self, info: RoutingInfo, now: float) -> None:
        """An attempt of the session has ended."""
        key = _key(info)
        lease = self._leases.get(key) if key is not None else None
        if lease is not None and key is not None:
            lease.in_flight = max(0, lease.in_flight - 1)
            lease.seen_at = now
            self._leases.move_to_end(key)

    def expire(self, now: float) -> None:
        """End the leases of idle sessions. Amortised O(1)."""
        leases, oldest = self._leases, now - self.idle
        while leases:
            key, lease = next(iter(leases.items()))
            if lease.seen_at > oldest:
                return
            if lease.in_flight:
                lease.seen_at = now
                leases.move_to_end(key)
            else:
                self._drop(key)

    def _drop(self, key: str | int) -> None:
        lease = self._leases.pop(key)
        self._add(lease.server, -lease.tokens)

    def _add(self, server: Server, tokens: float) -> None:
        held = self._held.get(server, 0.0) + tokens
        if held > 0.5:
            self._held[server] = held
        else:
            self._held.pop(server, None)


def _key(info: RoutingInfo) -> str | int | None:
    return info.session or info.prompt.conversation or None
