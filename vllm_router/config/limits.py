"""The `[limits]` table. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_router.config.types import (
    Bool,
    NonNegativeInt,
    PerMinuteOrNone,
    PositiveIntOrNone,
    Seconds,
)


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Overload protection. Without this table every request is forwarded at once.

    max_in_flight: limit of concurrent requests per server; None for no limit. A server's own
        `max_in_flight` takes precedence.
    strict_capacity: use max_concurrent_requests as the limit of servers without any other; a
        server without it has no limit.
    queue_size: requests that may wait per model; 429 beyond.
    queue_timeout: seconds a request may wait; 503 afterwards.
    client_priority: whether `X-Vllm-Priority` and the body's `priority` order the queue.
    session_admission: whether a new session waits until it fits into a server's KV cache beside the
        admitted ones.
    session_idle: seconds without a request after which a session is no longer admitted.
    key_requests_per_minute, key_max_concurrent_requests: limits of client keys without their own.
    """

    max_in_flight: PositiveIntOrNone = None
    strict_capacity: Bool = False
    queue_size: NonNegativeInt = 64
    queue_timeout: Seconds = 30.0
    client_priority: Bool = True
    session_admission: Bool = False
    session_idle: Seconds = 30.0
    key_requests_per_minute: PerMinuteOrNone = None
    key_max_concurrent_requests: PositiveIntOrNone = None

    def cap_of(self, capacity: int | None) -> int | None:
        """The limit of a server with this max_concurrent_requests and no max_in_flight."""
        if self.max_in_flight is not None:
            return self.max_in_flight
        return capacity if self.strict_capacity else None


LIMITS_KEYS: dict[str, Any] = {
    field.name: field.type for field in msgspec.structs.fields(LimitsConfig)
}
