"""The memory limit of this process: the lowest of its cgroups' limits and the machine's memory."""

from __future__ import annotations

import os
from pathlib import Path

_NO_LIMIT = 1 << 60
"""Version 1 expresses "no limit" as a number near 2^63."""


def memory_limit_mb(root: Path = Path("/")) -> float | None:
    """The limit in MB of 10^6 bytes; None if it cannot be read. `root` contains /proc and /sys."""
    found = [*_cgroup_limits(root), *_machine(root)]
    return min(found) / 1e6 if found else None


def _cgroup_limits(root: Path) -> list[int]:
    """The limits of the cgroup and its ancestors, version 2 and 1 (cgroups(7))."""
    limits: list[int] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # A container often sees its own cgroup as the root, whatever path /proc reports.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            text = _read(top.joinpath(*parts[:depth], name)).strip()
            if text.isdigit() and 0 < int(text) < _NO_LIMIT:
                limits.append(int(text))
    return limits


def _machine(root: Path) -> list[int]:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if name == "MemTotal" and words and words[0].isdigit():
            return [int(words[0]) * 1024]
    return []


def _read(path: Path) -> str:
    """The content of a file; empty if it cannot be read."""
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""
