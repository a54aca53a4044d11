"""The processes of a router started with `--workers`, and the load of each."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from support.router_process import RouterProcess, until

_FORKED = r"leader|worker \d+"


def pids(router: RouterProcess) -> dict[str, int]:
    """The running leader and workers, by name."""
    parents, names = {}, {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            head, _, rest = Path(f"/proc/{entry}/stat").read_text().rpartition(") ")
            parents[int(entry)] = int(rest.split()[1])
            if b"vllm_router.runtime.workers" in words:
                names[int(entry)] = words[-2].decode()
            elif re.fullmatch(_FORKED, name := head.partition(" (")[2]):
                names[int(entry)] = name
    ours = router.process.pid
    return {
        name: pid
        for pid, name in names.items()
        # The fork server of the router is between it and its workers.
        if ours in (parents[pid], parents.get(parents[pid]))
    }


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
