"""Defaults of the settings that say how much memory the router may take. Pure.

Where the memory is limited (a container, a small machine), a default that does not fit would end
with the kernel killing the process, without a word in its log.
"""

from __future__ import annotations

from typing import Any, NamedTuple

PROCESS_MB = 64.0
"""What one idle process of the router takes."""

LEAST_BODIES_MB = 4.0
LEAST_PREFIXES_MB = 1.0


class Memory(NamedTuple):
    """What a configuration must fit into: the limit in MB of 10^6 bytes, None for none, and the
    number of worker processes.
    """

    limit_mb: float | None = None
    workers: int = 1

    @property
    def idle_mb(self) -> float:
        """All processes, before anything is asked: with several workers, two more than those."""
        return PROCESS_MB * (self.workers + 2 if self.workers > 1 else 1)


def fitting(usual: dict[str, float], memory: Memory) -> dict[str, float]:
    """The defaults for `max_body_mb`, `max_bodies_mb` and `prefix_memory_mb`: the usual, or less.

    Bodies get half of what the idle processes leave, the records of cached prefixes a sixteenth of
    the limit; the rest is for streams and for what an interpreter loses to fragmentation.
    """
    if memory.limit_mb is None:
        return usual
    bodies = max(LEAST_BODIES_MB, (memory.limit_mb - memory.idle_mb) / 2)
    prefixes = max(LEAST_PREFIXES_MB, memory.limit_mb / 16 / memory.workers)
    most = {"max_body_mb": bodies, "max_bodies_mb": bodies, "prefix_memory_mb": prefixes}
    return {key: min(value, float(round(most[key]))) for key, value in usual.items()}


def memory_line(settings: Any, memory: Memory) -> tuple[bool, str] | None:
    """What the log should say at the start: whether it is a warning, and the line.

    None where there is no limit, or so high a one that nothing follows from it.
    """
    if memory.limit_mb is None:
        return None
    most = memory.idle_mb + settings.max_bodies_mb + settings.prefix_memory_mb * memory.workers
    told = (
        f"memory limit {memory.limit_mb:.0f} MB: max_bodies_mb is {settings.max_bodies_mb:g}, "
        f"max_body_mb {settings.max_body_mb:g}, prefix_memory_mb {settings.prefix_memory_mb:g}"
    )
    if most > memory.limit_mb:
        return True, f"{told}; that may take {most:.0f} MB: lower them, or raise the limit"
    return (False, told) if memory.limit_mb < 2 * most else None
