"""What a server refuses by its own fault, while other servers take it.

A server may lack a route (an older version), want another key, send everybody to a page to log
in at, or stand behind a proxy that takes no large bodies. It is well otherwise, so that it is not
ejected: the requests concerned go to other servers. A refusal is believed once another server has
taken the same request. After a time the next such request tries the server again; if that is
answered, the refusal is over, else it lasts longer. Pure: time is an argument, in seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

MODEL = "model "
"""Before the name of a model that is refused; paths begin with a slash."""

MOST = 32
"""Refusals that are remembered of one server: paths below /v1/ come from clients."""

DOUBTS = 3
"""So many different requests in a row must be refused, where a refusal may be about the request
alone (403, which also firewalls send for what they find in a body)."""

LONGEST = 60.0
"""Seconds after which a server that goes on refusing is tried again, at the latest."""

FORGET_AFTER = 900.0
"""Seconds after which a refusal is forgotten if no request comes to try the server with."""


class Asked(msgspec.Struct, frozen=True, gc=False):
    """What of a request matters for who takes it: its path, model, and bytes of body."""

    path: str
    model: str | None
    size: int


class Refusal(msgspec.Struct, array_like=True):
    """`what` is a path, or `model NAME`; it holds for bodies of at least `size` bytes.

    `until` is when the server is tried again; 0 as long as the refusal is only suspected. `times`
    counts how often it was believed in a row, `seen` the requests that made it suspected; the last
    one was refused at `at` and has the fingerprint `body`.
    """

    what: str
    words: str
    size: int
    at: float
    until: float = 0.0
    times: int = 0
    seen: int = 0
    body: int | None = None

    @property
    def believed(self) -> bool:
        return self.until > 0.0

    def believe(self, now: float, hold: float) -> None:
        """The server is not asked for `hold` seconds, and longer each time."""
        self.times += 1
        self.at, self.until = now, now + min(hold * self.times, max(hold, LONGEST))

    def concerns(self, asked: Asked) -> bool:
        return self.what in _names(asked) and asked.size >= self.size


def _names(asked: Asked) -> tuple[str, ...]:
    return (asked.path,) if asked.model is None else (asked.path, MODEL + asked.model)


class Refusals:
    """The refusals of one server, by what is refused, in `known`."""

    def __init__(self) -> None:
        self.known: dict[str, Refusal] = {}

    def all(self) -> tuple[Refusal, ...]:
        """Those that are believed and those that are suspected."""
        return tuple(self.known.values())

    def replace(self, refusals: Iterable[Refusal]) -> None:
        """Take over what another process of this router knows."""
        self.known = {refusal.what: refusal for refusal in refusals}

    def clear(self) -> bool:
        """The server is a new one, or has new settings; True if there was anything."""
        had = bool(self.known)
        self.known = {}
        return had

    def refused(
        self, name: str, size: int, words: str, now: float, *, hold: float, body: int, sure: bool
    ) -> bool:
        """Another server has taken a request that this one refused; True if that is news.

        `name` is the path or `model NAME`, `size` 0 unless the refusal is of large bodies only.
        `hold` is how long a first refusal lasts. Unless it is `sure`, DOUBTS requests with
        different fingerprints `body` are needed.
        """
        refusal = self.known.get(name)
        if refusal is None:
            self._make_room()
            refusal = self.known[name] = Refusal(name, words, size, now)
        elif now < refusal.until:
            return False  # it was on its way when the refusal was noted
        refusal.words, refusal.size = words, min(refusal.size, size)
        if not (sure or refusal.believed):
            if body != refusal.body:
                refusal.seen = refusal.seen + 1 if now - refusal.at < LONGEST else 1
            refusal.at, refusal.body = now, body
            if refusal.seen < DOUBTS:
                return False
        refusal.believe(now, hold)
        return True

    def refused_again(self, name: str, now: float, *, hold: float) -> bool:
        """The server refuses what it was tried with after the refusal's time; True if it is."""
        refusal = self.known.get(name)
        if refusal is None or not refusal.believed or now < refusal.until:
            return False
        refusal.believe(now, hold)
        return True

    def answered(self, asked: Asked) -> bool:
        """The server has taken such a request; True if that ends a refusal."""
        over = [refusal for refusal in self.known.values() if refusal.concerns(asked)]
        for refusal in over:
            del self.known[refusal.what]
        return any(refusal.believed for refusal in over)

    def relisted(self, before: Collection[str], listed: Collection[str]) -> bool:
        """A list of models has been read: a refusal of a model ends when the list names it no more,
        or names it anew. True if that is so."""
        refused = [what for what in self.known if what.startswith(MODEL)]
        over = [what for what in refused if not (_model(what) in listed and _model(what) in before)]
        for what in over:
            del self.known[what]
        return bool(over)

    def refuses(self, asked: Asked, now: float) -> bool:
        """Whether the server had better not be asked now."""
        return any(now < one.until and one.concerns(asked) for one in self.known.values())

    def active(self, now: float) -> tuple[tuple[str, int], ...]:
        """What it had better not be asked for now: names, and sizes in bytes from which on."""
        return tuple([(one.what, one.size) for one in self.known.values() if now < one.until])

    def expire(self, now: float) -> bool:
        """Forget what was not tried for long; True if there was anything."""
        old = [one.what for one in self.all() if now - max(one.at, one.until) > FORGET_AFTER]
        for what in old:
            del self.known[what]
        return bool(old)

    def reason(self) -> str:
        """The refusals that are believed, in words; empty if there is none."""
        known = [refusal for refusal in self.known.values() if refusal.believed]
        return "; ".join(_shown(refusal) for refusal in known[:3]) + (
            f"; and {len(known) - 3} more" if len(known) > 3 else ""
        )

    def count(self) -> int:
        """How many are believed."""
        return sum(refusal.believed for refusal in self.known.values())

    def moments(self) -> list[float]:
        """When the server is tried again."""
        return [refusal.until for refusal in self.known.values()]

    def _make_room(self) -> None:
        while len(self.known) >= MOST:
            del self.known[min(self.known, key=lambda name: self.known[name].until)]


def _model(what: str) -> str:
    return what.removeprefix(MODEL)


def _shown(refusal: Refusal) -> str:
    size = f" with {refusal.size} bytes or more" if refusal.size else ""
    return f"refuses {refusal.what}{size}, which others take: {refusal.words}"
