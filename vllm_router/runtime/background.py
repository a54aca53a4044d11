"""Background tasks that are started again after an unexpected error."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

logger = logging.getLogger(__name__)

RESTART_PAUSE = 1.0
"""Seconds before a failed task is started again."""

Task = Callable[[], Awaitable[None]]


class BackgroundTasks:
    """Counts the restarts of all tasks that run under `keep_running`."""

    def __init__(self) -> None:
        self.restarts = 0

    async def keep_running(self, name: str, task: Task) -> None:
        """Run a task for ever. An exception is logged, and the task is started again."""
        while True:
            try:
                await task()
            except Exception:
                # Requests are still served without this task; the traceback is in the log.
                logger.exception("task %s failed; restarting it in %g s", name, RESTART_PAUSE)
                self.restarts += 1
            await trio.sleep(RESTART_PAUSE)
