"""The processes of a router started with `--workers`, and the load of each."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from support.router_process import RouterProcess, until


def pids(router: RouterProcess) -> dict[str, int]:
    """The running leader and workers, by name."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(") ")[2].split()[1])
            if parent == router.process.pid and b"vllm_router.runtime.workers" in words:
                found[words[-2].decode()] = int(entry)
    return found


def family(router: RouterProcess) -> dict[str, int]:
    """The same, once all of them run."""
    until(lambda: len(pids(router)) == 3, "a leader and two workers")
    return pids(router)


def connections(router: RouterProcess) -> dict[str, int]:
    """How many clients each worker has, by its number."""
    page = router.get("/metrics").text
    pattern = r'^vllm_router_worker_connections\{worker="(\d+)"\} (\d+)'
    found = re.findall(pattern, page, re.MULTILINE)
    return {worker: int(count) for worker, count in found}
