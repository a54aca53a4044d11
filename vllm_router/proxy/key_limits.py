"""How much each client may ask for: requests per minute and at the same time. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_router.config.auth import KeyConfig
from vllm_router.errors import Refused

NEWEST = 0.1
"""Share of the last request in the mean time that a key's requests take."""


@dataclass(slots=True)
class Use:
    """Of one key. `tokens` is what was left of its minute's worth at `at`, `mean` the seconds
    that its requests took lately.
    """

    tokens: float
    at: float
    running: int = 0
    mean: float = 1.0

    def refill(self, rate: float, now: float) -> None:
        """Bring `tokens` up to date, for so many a minute. The bucket holds a minute's worth,
        though never less than one request."""
        self.tokens = min(max(rate, 1.0), self.tokens + (now - self.at) * rate / 60)
        self.at = now


def new_use(key: KeyConfig, now: float) -> Use:
    """Of a key that has not been used lately."""
    return Use(max(key.requests_per_minute or 0.0, 1.0), now)


class Usage:
    """What every key is using, by its name; kept across reloads."""

    def __init__(self) -> None:
        self._uses: dict[str, Use] = {}

    def enter(self, key: KeyConfig, now: float) -> None:
        """Count a request, which `leave` must end. Raises Refused, and counts nothing, if it is
        one too many.
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
                # when the next one of them will have ended, if they are evenly spread
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
        """A counted request has ended, after so many seconds."""
        use = self._uses[key.name]
        use.running -= 1
        use.mean += (took - use.mean) * NEWEST

    def running(self, name: str) -> int:
        """How many requests of a key are running."""
        use = self._uses.get(name)
        return use.running if use is not None else 0
