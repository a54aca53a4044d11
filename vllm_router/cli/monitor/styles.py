"""Colours and cells that the monitor's parts share. Pure."""

from __future__ import annotations

from rich.cells import cell_len
from rich.text import Text

PUT_OUT = ("asleep", "paused")
"""States in which an operator has put a server."""

STATE_STYLES = {
    "up": "green",
    "full": "yellow",
    "draining": "blue",
    "asleep": "magenta",
    "paused": "magenta",
    "refusing": "yellow",
    "silent": "bold yellow",
    "unknown": "dim",
    "down": "bold red",
    "ejected": "bold red",
}


def heat(load: float) -> str:
    """The colour of a load: calm below 70 %, alarming from 90 %."""
    return "red" if load >= 0.9 else "yellow" if load >= 0.7 else "green"


def cut(text: str, width: int) -> str:
    """Cut or pad to exactly `width` cells; wide characters count as two."""
    cell = Text(text)
    cell.truncate(width, overflow="ellipsis", pad=True)
    return cell.plain


def right(text: str, width: int) -> str:
    """Like `cut`, with the text at the right edge."""
    shown = cut(text, width).rstrip()
    return " " * (width - cell_len(shown)) + shown
