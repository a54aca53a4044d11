"""Ends a process whose parent has died and whose event loop is blocked.

A process drains when its parent dies, if its event loop notices. A blocked process would keep the
port for ever, so that no successor could bind it.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

GRACE_S = 10.0
"""Seconds beyond the longest orderly shutdown."""


def end_when_orphaned(line: int, patience: Callable[[], float]) -> None:
    """Watch the parent's end of `line` in a thread; if it closes, exit the process later.

    The process ends `patience()` + GRACE_S seconds after the parent's death, without cleanup.
    """
    descriptor = os.dup(line)  # the event loop may close the original
    thread = threading.Thread(target=_watch, args=(descriptor, patience), daemon=True)
    thread.start()


def _watch(descriptor: int, patience: Callable[[], float]) -> None:
    poll = select.poll()
    poll.register(descriptor, 0)  # POLLHUP is always reported
    poll.poll()
    time.sleep(patience() + GRACE_S)
    os._exit(1)
