"""Detection of a terminal. Imports little: `run` calls it first."""

from __future__ import annotations

import os
import sys


def on_terminal() -> bool:
    """True if a full-screen program can run on stdin and stdout."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
