"""The settings that active and passive health share."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from vllm_router.config.schema import Settings

FORGET_AFTER = 30.0
"""Seconds of good service after which one earlier failure of a server is forgotten."""


@dataclass(frozen=True, slots=True)
class HealthRules:
    """When a server is taken out and brought back; durations in seconds.

    rise, fall: good checks in a row until up, failed checks in a row until down.
    window, min_success_rate, max_response_time: sliding window of checks and its limits.
    failure_threshold: failed requests in a row until ejection.
    ejection_time: length of the first ejection.
    """

    rise: int = 2
    fall: int = 3
    window: int = 10
    min_success_rate: float = 0.8
    max_response_time: float = 10.0
    failure_threshold: int = 3
    ejection_time: float = 5.0

    def time_out(self, times: int) -> float:
        """How long a server stays out after this number of recent failures."""
        return min(self.ejection_time * times, max(60.0, self.ejection_time))


@functools.lru_cache(maxsize=2)  # a reload asks once per server
def health_rules(settings: Settings) -> HealthRules:
    """The health rules in the settings."""
    return HealthRules(
        rise=settings.health_check_rise,
        fall=settings.health_check_consecutive_failures,
        window=settings.health_check_window_size,
        min_success_rate=settings.health_check_min_success_rate,
        max_response_time=settings.health_check_max_response_time,
        failure_threshold=settings.failure_threshold,
        ejection_time=settings.auto_recovery_threshold,
    )
