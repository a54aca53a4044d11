"""Requests that one server refuses by its own fault, while other servers accept them.

A server may lack a route (an older version), require another key, redirect to a login page, or be
behind a proxy that refuses large bodies. It is healthy otherwise, so it is not ejected: only the
refused requests go to other servers. A refusal is confirmed once another server has accepted the
same request. After a time the next such request is a trial: if it is answered, the refusal ends,
else it lasts longer. Pure: time is an argument, in seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from vllm_router.fleet.reason import NONE, Reason, because

MODEL = "model "
"""Prefix of the name of a refused model; refused paths begin with a slash."""

MAX_REFUSALS = 32
"""Refusals remembered per server: clients may invent paths below /v1/."""

DOUBTS = 3
"""Different requests in a row that must be refused if a refusal may concern the request alone
(403, which firewalls also send because of a body's content)."""

LONGEST = 60.0
"""Maximum seconds until a refusing server gets another trial."""

FORGET_AFTER = 900.0
"""Seconds without a trial after which a refusal is dropped."""

SHOWN = 3
"""Refusals that the reason of a server's state names."""


class RequestKind(msgspec.Struct, frozen=True, gc=False):
    """The properties of a request that a server may refuse: path, model, and bytes of body."""

    path: str
    model: str | None
    size: int


class Refusal(msgspec.Struct, array_like=True):
    """One refusal of a server.

    what: a path, or `model NAME`.
    words: the server's response in short.
    size: bytes of body from which on it applies.
    at, body: time and body fingerprint of the last refused request.
    until: time of the next trial; 0 while the refusal is not confirmed.
    times: confirmations in a row.
    seen: refused requests before the confirmation.
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
    def confirmed(self) -> bool:
        return self.until > 0.0

    def confirm(self, now: float, hold: float) -> None:
        """Avoid the server for `hold` seconds, longer each time."""
        self.times += 1
        self.at, self.until = now, now + min(hold * self.times, max(hold, LONGEST))

    def concerns(self, asked: RequestKind) -> bool:
        return self.what in _names(asked) and asked.size >= self.size


def _names(asked: RequestKind) -> tuple[str, ...]:
    return (asked.path,) if asked.model is None else (asked.path, MODEL + asked.model)


class Refusals:
    """The refusals of one server; `known` has them by `Refusal.what`."""

    def __init__(self) -> None:
        self.known: dict[str, Refusal] = {}

    def all(self) -> tuple[Refusal, ...]:
        """All refusals, confirmed or not."""
        return tuple(self.known.values())

    def replace(self, refusals: Iterable[Refusal]) -> None:
        """Take the refusals known to another process of this router."""
        self.known = {refusal.what: refusal for refusal in refusals}

    def clear(self) -> bool:
        """Drop all, for a new process or new settings; True if there were any."""
        had = bool(self.known)
        self.known = {}
        return had

    def refused(
        self, name: str, size: int, words: str, now: float, *, hold: float, body: int, sure: bool
    ) -> bool:
        """Another server has accepted a request that this one refused; True if that confirms it.

        `name` is the path or `model NAME`, `size` is 0 unless only large bodies are refused.
        `hold` is the duration of a first refusal. Unless `sure`, DOUBTS requests with different
        fingerprints `body` are needed.
        """
        refusal = self.known.get(name)
        if refusal is None:
            self._make_room()
            refusal = self.known[name] = Refusal(name, words, size, now)
        elif now < refusal.until:
            return False  # sent before the refusal was confirmed
        refusal.words, refusal.size = words, min(refusal.size, size)
        if not (sure or refusal.confirmed):
            if body != refusal.body:
                refusal.seen = refusal.seen + 1 if now - refusal.at < LONGEST else 1
            refusal.at, refusal.body = now, body
            if refusal.seen < DOUBTS:
                return False
        refusal.confirm(now, hold)
        return True

    def refused_again(self, name: str, now: float, *, hold: float) -> bool:
        """The server has refused a trial; True if that prolongs the refusal."""
        refusal = self.known.get(name)
        if refusal is None or not refusal.confirmed or now < refusal.until:
            return False
        refusal.confirm(now, hold)
        return True

    def answered(self, asked: RequestKind) -> bool:
        """The server has accepted such a request; True if that ends a confirmed refusal."""
        over = [refusal for refusal in self.known.values() if refusal.concerns(asked)]
        for refusal in over:
            del self.known[refusal.what]
        return any(refusal.confirmed for refusal in over)

    def relisted(self, before: Collection[str], listed: Collection[str]) -> bool:
        """A model list was read: refusals of removed and of new models end. True if any did."""
        refused = [what for what in self.known if what.startswith(MODEL)]
        over = [what for what in refused if not (_model(what) in listed and _model(what) in before)]
        for what in over:
            del self.known[what]
        return bool(over)

    def refuses(self, asked: RequestKind, now: float) -> bool:
        """Whether the server would refuse the request now."""
        return any(now < one.until and one.concerns(asked) for one in self.known.values())

    def active(self, now: float) -> tuple[tuple[str, int], ...]:
        """Names of what is refused now, with the sizes in bytes from which on."""
        return tuple([(one.what, one.size) for one in self.known.values() if now < one.until])

    def expire(self, now: float) -> bool:
        """Drop refusals without a recent trial; True if there were any."""
        old = [one.what for one in self.all() if now - max(one.at, one.until) > FORGET_AFTER]
        for what in old:
            del self.known[what]
        return bool(old)

    def reason(self) -> Reason:
        """The confirmed refusals; NONE if there is none."""
        known = [refusal for refusal in self.known.values() if refusal.confirmed]
        if not known:
            return NONE
        first, *others = [_reason(refusal) for refusal in known[:SHOWN]]
        if len(known) > SHOWN:
            others.append(because("more_refusals", n=len(known) - SHOWN))
        return Reason(first.code, first.values, tuple(others))

    def count(self) -> int:
        """The number of confirmed refusals."""
        return sum(refusal.confirmed for refusal in self.known.values())

    def moments(self) -> list[float]:
        """The times of the next trials."""
        return [refusal.until for refusal in self.known.values()]

    def _make_room(self) -> None:
        while len(self.known) >= MAX_REFUSALS:
            del self.known[min(self.known, key=lambda name: self.known[name].until)]


def _model(what: str) -> str:
    return what.removeprefix(MODEL)


def _reason(refusal: Refusal) -> Reason:
    values = {"words": refusal.words, "path": refusal.what}
    if refusal.what.startswith(MODEL):
        values = {"words": refusal.words, "model": _model(refusal.what)}
    if refusal.size:
        values["bytes"] = str(refusal.size)
    kind = "model" if "model" in values else "path"
    return Reason(f"refuses_long_{kind}" if refusal.size else f"refuses_{kind}", values)
