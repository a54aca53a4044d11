"""The router's command, with the number of Trio tasks in a file for other processes.

python counted.py FILE run --config ...
"""

from __future__ import annotations

import mmap
import struct
import sys
from typing import Any

import trio

from vllm_router.cli.main import main


class TaskCount(trio.abc.Instrument):
    """Eight bytes in a file, the number of tasks alive now."""

    def __init__(self, file: str) -> None:
        with open(file, "w+b") as opened:
            opened.truncate(8)
            self._memory = mmap.mmap(opened.fileno(), 8)
        self._tasks = 0

    def _add(self, change: int) -> None:
        self._tasks += change
        struct.pack_into("<q", self._memory, 0, self._tasks)

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self._add(1)

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        self._add(-1)


if __name__ == "__main__":
    count = TaskCount(sys.argv.pop(1))
    run = trio.run

    def counted_run(*args: Any, **options: Any) -> Any:
        return run(*args, instruments=[count], **options)

    trio.run = counted_run  # type: ignore[assignment]  # the command has no option for it
    main()
