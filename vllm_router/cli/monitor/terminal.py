"""Whether there is a terminal to draw on. Light: `run` asks before it loads anything."""

from __future__ import annotations

import os
import sys


def on_terminal() -> bool:
    """Whether a full-screen view can be shown and used."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
