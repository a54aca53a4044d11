"""The end of a process whose parent has died and whose own loop is stuck.

A process drains when its parent dies, but only if its loop can hear of it. One that cannot would
keep the port for ever, and no successor could have it.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

GRACE_S = 10.0
"""Seconds beyond what an orderly end may take."""


def end_when_orphaned(line: int, patience: Callable[[], float]) -> None:
    """Watch, in a thread, for the end of the parent, which holds the other end of `line`.

    `patience()` seconds and GRACE_S later the process is ended as it is.
    """
    descriptor = os.dup(line)  # the loop may close the other when it ends
    thread = threading.Thread(target=_watch, args=(descriptor, patience), daemon=True)
    thread.start()


def _watch(descriptor: int, patience: Callable[[], float]) -> None:
    poll = select.poll()
    poll.register(descriptor, 0)  # POLLHUP is always told
    poll.poll()
    time.sleep(patience() + GRACE_S)
    os._exit(1)
