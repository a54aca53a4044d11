"""Detection of a terminal. Imports little: `run` calls it first."""

from __future__ import annotations

import os
import sys

_PLAIN = ("dumb", "unknown")


def on_terminal() -> bool:
    """True if a full-screen program can run on stdin and stdout.

    Rich draws nothing on terminals with the types in `_PLAIN`.
    """
    kind = os.environ.get("TERM", "dumb").strip().lower()
    return sys.stdin.isatty() and sys.stdout.isatty() and kind not in _PLAIN
