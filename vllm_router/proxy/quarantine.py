"""Quarantine for requests that crash servers ("queries of death"), for one minute.

A request that took two servers down goes to no third; if its client repeats it, it is refused
without being sent. Only crashes count: the connection was lost, the probes found the server down,
or it answered 500 and went down afterwards, as vLLM's API process does when its engine has died.
Innocent requests on the same two servers look the same: a retry prefers another machine, a body
that is answered after all leaves the quarantine, and one that was answered recently does not enter
it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server

REMEMBERED_FOR = 60.0
MOST = 1024
"""Requests in quarantine at a time; the oldest makes room for a new one."""

KNOWN_BODIES = 64
"""The number of recently answered bodies that are known."""

KEPT_BYTES = 16 * 1024
"""Answered bodies up to this length are kept as they are, at most 1 MB together. For a longer one
the fingerprint is kept, which takes 10 µs; reading such a body takes 100."""

_SAMPLE = 16 * 1024


def fingerprint(target: bytes, body: bytes) -> int:
    """Identifies a request by its path, and the length and the two ends of its body.

    The value differs from process to process, so that no client can construct a collision.
    """
    return hash((target, len(body), body[:_SAMPLE], body[-_SAMPLE:]))


class Death(NamedTuple):
    """An attempt after which a server may be dead; `certain` if there is no other explanation."""

    server: Server
    at: float
    certain: bool

    @property
    def happened(self) -> bool:
        """Whether the server has died, by the present state: one failed check is enough."""
        health = self.server.active_health
        return self.certain or self.server.went_down_at >= self.at or health.failures_in_row > 0


class Quarantine:
    """The requests that took two servers down. Times are arguments, in seconds.

    `entries` is empty except for a minute after such an event: check it first.
    """

    def __init__(self) -> None:
        self.entries: dict[int, tuple[float, Sequence[Death]]] = {}
        self.known: deque[bytes | int] = deque(maxlen=KNOWN_BODIES)
        self._last_until = 0.0

    def remember(self, key: int, body: bytes, deaths: Sequence[Death], now: float) -> None:
        """Put a request into quarantine; two of its attempts ended in `deaths`."""
        if self.knows(key, body):
            return
        self.entries.pop(key, None)
        while len(self.entries) >= MOST:
            del self.entries[next(iter(self.entries))]
        self._last_until = now + REMEMBERED_FOR
        self.entries[key] = (self._last_until, tuple(deaths))

    def knows(self, key: int, body: bytes) -> bool:
        """Whether a server has answered this request recently."""
        return body in self.known or key in self.known

    def forget(self, key: int) -> None:
        """Remove a request: its deaths had another reason."""
        self.entries.pop(key, None)

    def holds(self, key: int, now: float) -> bool:
        """Whether the request is in quarantine."""
        if now >= self._last_until:
            self.entries.clear()
        entry = self.entries.get(key)
        return entry is not None and now < entry[0] and all(one.happened for one in entry[1])

    def answered(self, target: bytes, body: bytes) -> None:
        """A server has answered the request: remove it, and remember its body."""
        if len(body) <= KEPT_BYTES:
            self.known.append(body)
        else:
            self.known.append(fingerprint(target, body))
        if self.entries:
            self.entries.pop(fingerprint(target, body), None)
