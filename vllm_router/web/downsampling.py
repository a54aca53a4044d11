"""Downsampling of a figure from seconds to the last hour, for the feed and the monitor. Pure."""

from __future__ import annotations

from collections.abc import Iterable

MINUTES = 300
"""Values of five minutes, one per second."""

HOUR, FACTOR = 360, 10
"""Values of an hour, one per FACTOR seconds."""


def digest(name: str, values: Iterable[float | None]) -> float | None:
    """One value for several of a figure: the mean, but the maximum for high percentiles.

    None where there is no value.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    if name.endswith(("_p95", "_p99")):
        return max(known)
    return round(sum(known) / len(known), 4)
