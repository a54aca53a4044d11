"""Sign-in of the page: a single-use code becomes a key that is valid until the router ends. Pure.

`vllm-router open` requests a code as an administrator, and passes it to the browser in the fragment
of the page's URL, which browsers do not send to servers. The page exchanges it for a key and sends
that as `Authorization: Bearer`: there is no cookie that a page of another site could make a browser
send.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterable

from vllm_router.config.types import Secret, digest_of

CODE_SECONDS = 300.0
"""Seconds for which a code is valid."""

SESSION_SECONDS = 12 * 3600.0
"""Seconds after which a page must sign in again."""

MOST = 64
"""Codes, and keys, kept at a time; beyond that the oldest is dropped."""


class Sessions:
    """The codes and keys of one router. `clock` returns seconds and never decreases."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._codes: dict[Secret, float] = {}
        self._keys: dict[Secret, float] = {}

    def new_code(self) -> str:
        """Create a code for one page."""
        return _new(self._codes, self._clock() + CODE_SECONDS)

    def exchange(self, code: str) -> str | None:
        """The key for a code, which becomes invalid; None for an unknown code."""
        found = _find(self._codes, [code.encode("utf-8", "replace")], self._clock())
        if found is None:
            return None
        del self._codes[found]
        return _new(self._keys, self._clock() + SESSION_SECONDS)

    def holds(self, keys: Iterable[bytes]) -> bool:
        """True if one of these keys belongs to a signed-in page."""
        return bool(self._keys) and _find(self._keys, keys, self._clock()) is not None

    def end(self) -> None:
        """Invalidate all codes and keys: the administrators have changed."""
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
