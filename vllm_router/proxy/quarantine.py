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
from collections.abc import Callable, Sequence
from hashlib import blake2b
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


def shared_digest(target: bytes, body: bytes) -> bytes:
    """As `fingerprint`, but equal in all processes. 30 µs for a long body."""
    ends = body if len(body) <= 2 * _SAMPLE else body[:_SAMPLE] + body[-_SAMPLE:]
    digest = blake2b(target, digest_size=16, person=b"quarantine")
    digest.update(b"\0%d\0" % len(body))
    digest.update(ends)
    return digest.digest()


class Origin(NamedTuple):
    """Identifies a request before a fallback model was asked for: `fingerprint`, `shared_digest`.

    The client repeats the request as it was.
    """

    key: int
    digest: bytes

    @classmethod
    def of(cls, target: bytes, body: bytes) -> Origin:
        return cls(fingerprint(target, body), shared_digest(target, body))


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

    `entries` is empty except for a minute after such an event: check it first. Its keys are
    fingerprints, and digests of requests that other processes have put into quarantine. `on_new` is
    called with the digest of a request that this process has put there.
    """

    def __init__(self) -> None:
        self.on_new: Callable[[bytes], None] | None = None
        self.entries: dict[int | bytes, tuple[float, Sequence[Death]]] = {}
        self.known: deque[bytes | int] = deque(maxlen=KNOWN_BODIES)
        self._last_until = self._foreign_until = 0.0

    def remember(
        self,
        key: int,
        body: bytes,
        deaths: Sequence[Death],
        now: float,
        origin: Origin | None = None,
    ) -> None:
        """Put a request into quarantine; two of its attempts ended in `deaths`."""
        if self.knows(key, body):
            return
        self._put(key, now + REMEMBERED_FOR, tuple(deaths))
        if origin is not None:
            self._put(origin.key, now + REMEMBERED_FOR, tuple(deaths))

    def tell(self, target: bytes, body: bytes, origin: Origin | None = None) -> None:
        """Tell other processes of a request that is in quarantine here."""
        if self.on_new is not None and fingerprint(target, body) in self.entries:
            self.on_new(shared_digest(target, body))
            if origin is not None:
                self.on_new(origin.digest)

    def take(self, digest: bytes, age: float, now: float) -> None:
        """Another process put a request into quarantine, `age` seconds ago."""
        if age < REMEMBERED_FOR:
            self._foreign_until = max(self._foreign_until, now + REMEMBERED_FOR - age)
            self._put(digest, now + REMEMBERED_FOR - age, ())

    def _put(self, key: int | bytes, until: float, deaths: Sequence[Death]) -> None:
        self.entries.pop(key, None)
        while len(self.entries) >= MOST:
            del self.entries[next(iter(self.entries))]
        self._last_until = max(self._last_until, until)
        self.entries[key] = (until, deaths)

    def knows(self, key: int, body: bytes) -> bool:
        """Whether a server has answered this request recently."""
        return body in self.known or key in self.known

    def forget(self, key: int, origin: Origin | None = None) -> None:
        """Remove a request: its deaths had another reason."""
        self.entries.pop(key, None)
        if origin is not None:
            self.entries.pop(origin.key, None)
            self.entries.pop(origin.digest, None)

    def refuses(self, target: bytes, body: bytes, now: float) -> bool:
        """Whether this request is in quarantine, by this process or another one."""
        key = fingerprint(target, body)
        if self.holds(key, now):
            return True
        if now >= self._foreign_until or self.knows(key, body):
            return False
        return self.holds(shared_digest(target, body), now)

    def holds(self, key: int | bytes, now: float) -> bool:
        """Whether the request is in quarantine."""
        if now >= self._last_until:
            self.entries.clear()
        entry = self.entries.get(key)
        return entry is not None and now < entry[0] and all(one.happened for one in entry[1])

    def answered(self, target: bytes, body: bytes, origin: Origin | None = None) -> None:
        """A server has answered the request: remove it, and remember its body."""
        if len(body) <= KEPT_BYTES:
            self.known.append(body)
        else:
            self.known.append(fingerprint(target, body))
        if self.entries:
            self.forget(fingerprint(target, body), origin)
            if self._foreign_until:
                self.entries.pop(shared_digest(target, body), None)
