"""Requests that the router refused, and requests that another server saved. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_router.observability.sliding import Rate

MINUTES = 300.0
"""Seconds over which refused and saved requests are counted."""

REASONS = {
    "missing_api_key": "unauthorized",
    "invalid_api_key": "unauthorized",
    "model_not_allowed": "forbidden",
    "admin_local_only": "forbidden",
    "cross_origin": "forbidden",
    "engine_control_closed": "forbidden",
    "sign_in_expired": "forbidden",
    "key_rate_exceeded": "limited",
    "key_concurrency_exceeded": "limited",
    "rate_limited": "limited",
    "queue_full": "queue",
    "queue_displaced": "queue",
    "queue_too_long": "queue",
    "queue_timeout": "queue",
    "no_server_available": "no_server",
    "bodies_full": "overload",
    "router_overloaded": "overload",
    "router_stopping": "overload",
}
"""Error codes that count as a refusal, by what operators call it. Other codes are failures of a
server, which are errors, or mistakes in the request."""


class TurnedAway:
    """Refusals by reason, and saved requests, from counters that others keep."""

    def __init__(self) -> None:
        self.saved_total = 0
        """Counted by the feed: an answered request with at least one failed attempt."""
        self._reasons = {reason: Rate(MINUTES) for reason in dict.fromkeys(REASONS.values())}
        self._refused = Rate()
        self._saved = Rate(MINUTES)
        self._saved_now = Rate()

    def read(self, by_code: Mapping[str, int], now: float) -> None:
        """Read the counters, at most a few times a second. `by_code` only rises."""
        totals = dict.fromkeys(self._reasons, 0)
        for code, count in by_code.items():
            reason = REASONS.get(code)
            if reason is not None:
                totals[reason] += count
        for reason, total in totals.items():
            self._reasons[reason].observe(total, now)
        self._refused.observe(sum(totals.values()), now)
        self._saved.observe(self.saved_total, now)
        self._saved_now.observe(self.saved_total, now)

    @property
    def per_second(self) -> float:
        """Refused requests, over the last seconds."""
        return round(self._refused.per_second, 3)

    @property
    def saved_per_second(self) -> float:
        return round(self._saved_now.per_second, 3)

    @property
    def recent(self) -> dict[str, int]:
        """Refused within MINUTES, by reason; only reasons that occur."""
        return {reason: round(rate.rise) for reason, rate in self._reasons.items() if rate.rise}

    @property
    def saved(self) -> int:
        """Saved within MINUTES."""
        return round(self._saved.rise)
