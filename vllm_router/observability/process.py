"""Resource usage of the router's own process."""

from __future__ import annotations

import os
import time

_PAGE = os.sysconf("SC_PAGE_SIZE")


def cpu_seconds() -> float:
    """CPU time of the process since its start, user and system."""
    return time.process_time()


def rss_bytes() -> int:
    """Resident memory; 0 if the system does not report it (no Linux /proc)."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0
