"""The `[limits]` table. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_router.config.types import CountOrNone, CountOrZero, Flag, PerMinuteOrNone, Seconds


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What keeps an overload outside. Without the table every request is forwarded at once.

    max_in_flight: requests that the router has on one server at the same time, at most; None for
        no cap. A server may have a `max_in_flight` of its own.
    strict_capacity: servers without a cap of either kind have their max_concurrent_requests as it.
    queue_size: requests that may wait per model; 429 beyond.
    queue_timeout: seconds for which one may wait, 503 then.
    client_priority: whether `X-Vllm-Priority` and a body's `priority` decide who waits in front.
    key_requests_per_minute, key_max_concurrent_requests: of every key that has no such limit of
        its own.
    """

    max_in_flight: CountOrNone = None
    strict_capacity: Flag = False
    queue_size: CountOrZero = 64
    queue_timeout: Seconds = 30.0
    client_priority: Flag = True
    key_requests_per_minute: PerMinuteOrNone = None
    key_max_concurrent_requests: CountOrNone = None

    def cap_of(self, capacity: int) -> int | None:
        """The cap of a server with this max_concurrent_requests and no cap of its own."""
        if self.max_in_flight is not None:
            return self.max_in_flight
        return capacity if self.strict_capacity else None


LIMITS_KEYS: dict[str, Any] = {
    field.name: field.type for field in msgspec.structs.fields(LimitsConfig)
}
