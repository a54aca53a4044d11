"""Rate and concurrency limits per API key. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_router.config.auth import KeyConfig
from vllm_router.errors import Refused

NEWEST = 0.1
"""Weight of the last request in the mean duration of a key's requests."""


@dataclass(slots=True)
class Use:
    """The use of one key.

    A token bucket with `tokens` left at the time `at`, the number of running requests, and the mean
    duration of recent requests in seconds.
    """

    tokens: float
    at: float
    running: int = 0
    mean: float = 1.0

    def refill(self, rate: float, now: float) -> None:
        """Add the tokens since `at`, `rate` per minute.

        The bucket holds one minute's tokens, and at least one.
        """
        self.tokens = min(max(rate, 1.0), self.tokens + (now - self.at) * rate / 60)
        self.at = now


def new_use(key: KeyConfig, now: float) -> Use:
    """The use of a key without recent requests: a full bucket."""
    return Use(max(key.requests_per_minute or 0.0, 1.0), now)


class Usage:
    """The use of every key, by name; kept across reloads."""

    def __init__(self) -> None:
        self._uses: dict[str, Use] = {}

    def enter(self, key: KeyConfig, now: float) -> None:
        """Count a request; the caller must call `leave` when it ends.

        Raises Refused, and counts nothing, if the key is at a limit.
        """
        rate, most = key.requests_per_minute, key.max_concurrent_requests
        use = self._uses.get(key.name)
        if use is None:
            use = self._uses[key.name] = new_use(key, now)
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
                    f"This key may send {rate:g} requests a minute.",
                    retry_after=(1 - use.tokens) * 60 / rate,
                )
            use.tokens -= 1
        use.running += 1

    def leave(self, key: KeyConfig, took: float) -> None:
        """A counted request has ended, after `took` seconds."""
        use = self._uses[key.name]
        use.running -= 1
        use.mean += (took - use.mean) * NEWEST

    def running(self, name: str) -> int:
        """The number of running requests of a key."""
        use = self._uses.get(name)
        return use.running if use is not None else 0
