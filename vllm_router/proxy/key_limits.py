"""Rate and concurrency limits per API key. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vllm_router.config.auth import KeyConfig
from vllm_router.errors import Refused

NEWEST = 0.1
"""Weight of the last request in the mean duration of a key's requests."""


@dataclass(slots=True)
class Use:
    """The use of one key.

    A token bucket with `tokens` left at the time `at`, the number of running requests, the mean
    duration of recent requests in seconds, and the number of requests that this router has
    admitted.
    """

    tokens: float
    at: float
    running: int = 0
    mean: float = 1.0
    admitted: int = 0

    def refill(self, rate: float, now: float) -> None:
        """Add the tokens since `at`, `rate` per minute.

        The bucket holds one minute's tokens, and at least one.
        """
        self.tokens = min(max(rate, 1.0), self.tokens + (now - self.at) * rate / 60)
        self.at = now

    def spend(self, requests: float, least: float) -> None:
        """Take tokens, down to `least`."""
        self.tokens = max(min(self.tokens, least), self.tokens - requests)


def new_use(key: KeyConfig, now: float) -> Use:
    """The use of a key without recent requests: a full bucket."""
    return Use(max(key.requests_per_minute or 0.0, 1.0), now)


class KeyLimits:
    """The use of every key, by name; kept across reloads.

    routers: the routers that share the limits without hearing of each other: each enforces its
        part. 1 while they do hear of each other, see `spend`.
    """

    def __init__(self) -> None:
        self.routers = 1
        self._uses: dict[str, Use] = {}
        self._elsewhere: dict[str, int] = {}

    def enter(self, key: KeyConfig, now: float) -> None:
        """Count a request; the caller must call `leave` when it ends.

        Raises Refused, and counts nothing, if the key is at a limit.
        """
        rate, most = key.requests_per_minute, key.max_concurrent_requests
        use = self._uses.get(key.name)
        if use is None:
            use = self._use(key, now)
        if self.routers > 1:
            rate = rate / self.routers if rate is not None else None
            most = max(1, most // self.routers) if most is not None else None
        if most is not None and use.running >= most:
            raise Refused(
                429,
                "key_concurrency_exceeded",
                f"This key has {use.running} requests running already, its limit.",
                # the expected end of the next one, if their starts are evenly spread
                retry_after=max(1.0, use.mean / use.running),
            )
        if rate is not None:
            use.refill(rate, now)
            if use.tokens < 1:
                raise Refused(
                    429,
                    "key_rate_exceeded",
                    f"This key may send {key.requests_per_minute:g} requests a minute.",
                    retry_after=(1 - use.tokens) * 60 / rate,
                )
            use.tokens -= 1
        use.running += 1
        use.admitted += 1

    def leave(self, key: KeyConfig, took: float) -> None:
        """A counted request has ended, after `took` seconds."""
        use = self._uses[key.name]
        use.running -= 1
        use.mean += (took - use.mean) * NEWEST

    def running(self, name: str) -> int:
        """The number of running requests of a key."""
        use = self._uses.get(name)
        return use.running if use is not None else 0

    def _use(self, key: KeyConfig, now: float) -> Use:
        """The use of a key, which is made if it is the first one."""
        use = self._uses.get(key.name)
        if use is None:
            use = self._uses[key.name] = new_use(key, now)
            use.running = self._elsewhere.get(key.name, 0)
        return use

    # -- other routers ------------------------------------------------------------------------

    def own(self) -> Iterator[tuple[str, int, int]]:
        """Name, admitted and running requests of each key in this router."""
        for name, use in self._uses.items():
            yield name, use.admitted, max(0, use.running - self._elsewhere.get(name, 0))

    def spend(self, key: KeyConfig, requests: float, now: float, *, into_debt: bool = True) -> None:
        """Other routers have admitted requests of this key.

        The debt is at most one minute's requests; not `into_debt`, these make none.
        """
        rate = key.requests_per_minute
        if rate is not None:
            use = self._use(key, now)
            use.refill(rate, now)
            use.spend(requests, -max(rate, 1.0) if into_debt else 0.0)

    def run_elsewhere(self, running: Mapping[str, int]) -> None:
        """The running requests of all keys in other routers now."""
        for name in {**self._elsewhere, **running}:
            use = self._uses.get(name)
            if use is not None:
                use.running += running.get(name, 0) - self._elsewhere.get(name, 0)
        self._elsewhere = dict(running)
