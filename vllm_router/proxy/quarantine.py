"""Requests that servers die of: remembered for a minute, so that the fleet is not lost to one.

A request that took two servers down goes to no third; sent again by its client, it is refused
without being sent. Only deaths count: the connection was lost, the server was found gone, or it
answered 500 and fell afterwards, as vLLM's API process does when its engine has died. Whoever
happened to be on the same two servers looks the same: a body that is answered after all is
forgotten, and one that was answered lately is not remembered at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server

REMEMBERED_FOR = 60.0
MOST = 1024
"""Bodies remembered at a time; the oldest is forgotten for a new one."""

KNOWN_BODIES = 64
"""So many answered bodies are known."""

KEPT_BYTES = 16 * 1024
"""An answered body up to this length is kept as it is, which costs no time and at most 1 MB for all
of them. Of a longer one the fingerprint is kept: 10 µs, where reading the body takes 100."""

_SAMPLE = 16 * 1024


def fingerprint(target: bytes, body: bytes) -> int:
    """What a request is told by: its path and body, of long ones their two ends and the length.

    Differs from process to process, so that nobody can make one to match another's.
    """
    if len(body) <= 2 * _SAMPLE:
        return hash((target, body))
    return hash((target, len(body), body[:_SAMPLE], body[-_SAMPLE:]))


class Death(NamedTuple):
    """An attempt after which a server may be dead; `certain` if nothing else explains its end."""

    server: Server
    at: float
    certain: bool

    @property
    def happened(self) -> bool:
        """Whether the server has died, by what is known now: its first bad check is enough."""
        health = self.server.active_health
        return self.certain or self.server.went_down_at >= self.at or health.failures_in_row > 0


class Quarantine:
    """The requests that took two servers down. Time is an argument, in seconds.

    `entries` is empty but for a minute after such an event: look first whether it is.
    """

    def __init__(self) -> None:
        self.entries: dict[int, tuple[float, Sequence[Death]]] = {}
        self.known: deque[bytes | int] = deque(maxlen=KNOWN_BODIES)
        self._last_until = 0.0

    def remember(self, key: int, body: bytes, deaths: Sequence[Death], now: float) -> None:
        """Two attempts of one request ended in `deaths`."""
        if self.knows(key, body):
            return
        self.entries.pop(key, None)
        while len(self.entries) >= MOST:
            del self.entries[next(iter(self.entries))]
        self._last_until = now + REMEMBERED_FOR
        self.entries[key] = (self._last_until, tuple(deaths))

    def knows(self, key: int, body: bytes) -> bool:
        """Whether a server has answered this request lately."""
        return body in self.known or key in self.known

    def forget(self, key: int) -> None:
        """The deaths have turned out to have another reason."""
        self.entries.pop(key, None)

    def holds(self, key: int, now: float) -> bool:
        """Whether the request is known to take servers down."""
        if now >= self._last_until:
            self.entries.clear()
        until, deaths = self.entries.get(key, (0.0, ()))
        return now < until and all(death.happened for death in deaths)

    def answered(self, target: bytes, body: bytes) -> None:
        """A server has lived to answer the request."""
        if len(body) <= KEPT_BYTES:
            self.known.append(body)
        else:
            self.known.append(fingerprint(target, body))
        if self.entries:
            self.entries.pop(fingerprint(target, body), None)
