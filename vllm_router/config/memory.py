"""Defaults of the settings that bound the router's memory. Pure.

With limited memory (a container, a small machine), defaults that do not fit would end in the
kernel killing the process without a log line.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MEMORY_SETTINGS = ("max_body_mb", "max_bodies_mb", "prefix_memory_mb")
"""Keys of `[config]` whose defaults depend on the memory."""

PROCESS_MB = 64.0
"""Memory of one idle router process, in MB."""

MIN_BODIES_MB = 4.0
MIN_PREFIX_INDEX_MB = 1.0


class Memory(NamedTuple):
    """The memory that a configuration must fit into.

    `limit_mb` is the limit in MB of 10^6 bytes, None without a limit; `workers` the number of
    worker processes.
    """

    limit_mb: float | None = None
    workers: int = 1

    @property
    def idle_mb(self) -> float:
        """Memory of all idle processes. Several workers need two more: leader and parent."""
        return PROCESS_MB * (self.workers + 2 if self.workers > 1 else 1)

    @property
    def indexes(self) -> int:
        """Prefix indexes: one per worker, and one in the leader of several."""
        return self.workers + 1 if self.workers > 1 else 1


def fit_sizes(defaults: dict[str, float], memory: Memory) -> dict[str, float]:
    """The `defaults` of the MEMORY_SETTINGS, reduced where they exceed the memory.

    Bodies get half of the memory beyond the idle processes, the prefix indexes a sixteenth of the
    limit. The rest is for streams and for fragmentation of the interpreter's heap.
    """
    if memory.limit_mb is None:
        return defaults
    bodies = max(MIN_BODIES_MB, (memory.limit_mb - memory.idle_mb) / 2)
    prefixes = max(MIN_PREFIX_INDEX_MB, memory.limit_mb / 16 / memory.indexes)
    limits = {"max_body_mb": bodies, "max_bodies_mb": bodies, "prefix_memory_mb": prefixes}
    return {key: min(value, float(round(limits[key]))) for key, value in defaults.items()}


def memory_line(settings: Any, memory: Memory) -> tuple[bool, str] | None:
    """The log line about memory at the start, and whether it is a warning.

    None without a limit, or if the limit is at least twice the need.
    """
    if memory.limit_mb is None:
        return None
    needed = memory.idle_mb + settings.max_bodies_mb + settings.prefix_memory_mb * memory.indexes
    text = (
        f"memory limit {memory.limit_mb:.0f} MB: max_bodies_mb is {settings.max_bodies_mb:g}, "
        f"max_body_mb {settings.max_body_mb:g}, prefix_memory_mb {settings.prefix_memory_mb:g}"
    )
    if needed > memory.limit_mb:
        return True, f"{text}; together up to {needed:.0f} MB: lower them, or raise the limit"
    return (False, text) if memory.limit_mb < 2 * needed else None
