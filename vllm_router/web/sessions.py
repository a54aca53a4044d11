"""Sign-in of the page: a code that works once becomes a key that ends with the router. Pure.

`vllm-router open` asks for a code by the way that only administrators have, and hands it to the
browser in the fragment of the page's URL, which no browser sends to a server. The page exchanges
it for a key, which it sends as `Authorization: Bearer`: there is no cookie that another site's
page could make a browser send.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterable

from vllm_router.config.types import Secret, digest_of

CODE_SECONDS = 300.0
"""For which a code may wait to be used."""

SESSION_SECONDS = 12 * 3600.0
"""After which a page has to sign in again."""

MOST = 64
"""Codes, and keys, that are kept at a time; beyond, the oldest is forgotten."""


class Sessions:
    """The codes and keys of one router. `clock` gives seconds, and only rises."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._codes: dict[Secret, float] = {}
        self._keys: dict[Secret, float] = {}

    def new_code(self) -> str:
        """A code for one page."""
        return _new(self._codes, self._clock() + CODE_SECONDS)

    def exchange(self, code: str) -> str | None:
        """The key for a code, which has been used then; None if there is no such code."""
        found = _find(self._codes, [code.encode("utf-8", "replace")], self._clock())
        if found is None:
            return None
        del self._codes[found]
        return _new(self._keys, self._clock() + SESSION_SECONDS)

    def holds(self, keys: Iterable[bytes]) -> bool:
        """Whether one of these keys is of a page that has signed in."""
        return bool(self._keys) and _find(self._keys, keys, self._clock()) is not None

    def end(self) -> None:
        """Forget all: who may administrate has changed."""
        self._codes.clear()
        self._keys.clear()


def _new(kept: dict[Secret, float], until: float) -> str:
    while len(kept) >= MOST:
        del kept[next(iter(kept))]
    secret = secrets.token_urlsafe(32)
    kept[digest_of(secret)] = until
    return secret


def _find(kept: dict[Secret, float], given: Iterable[bytes], now: float) -> Secret | None:
    found = None
    for secret in given:
        digest = digest_of(secret.decode("latin-1"))
        for known, until in kept.items():
            if hmac.compare_digest(known, digest) and now < until:
                found = known
    return found
