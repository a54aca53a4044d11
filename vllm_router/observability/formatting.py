"""What the router says about itself: lines on stderr, as text or as JSON.

Much of what is logged was chosen by others (header values, paths, what a server answered). So no
control character leaves this module unescaped, and only the first line of a text record begins
at the left margin: no value can pass for a record of its own.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from functools import lru_cache
from typing import TextIO

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")

_CONTINUED = "  | "
"""Begins every further line of a record, such as those of a traceback."""


def visible(text: str) -> str:
    """`text` with everything that does not show as a character of one line written as an escape."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def configure(level: str = "info", form: str = "text", stream: TextIO | None = None) -> None:
    """Send all log records to `stream` (stderr), replacing what was set up before.

    `level`, one of LEVELS, is the router's own; other packages speak from warning upwards only:
    httpx alone would write a line for every probe.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    logging.basicConfig(handlers=[handler], force=True)
    adjust(handler, level, form)


def adjust(handler: logging.Handler, level: str, form: str, tag: str = "") -> None:
    """Let `handler` write in this form what `level` allows, as `configure` does.

    `tag` names this one of several processes that write to the same place.
    """
    handler.setFormatter(JsonFormatter(tag) if form == "json" else TextFormatter(tag))
    threshold = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger().setLevel(max(threshold, logging.WARNING))
    logging.getLogger("vllm_router").setLevel(threshold)


def configure_if_unset() -> bool:
    """The defaults, unless somebody has set up logging: for a start by another's command.

    False if somebody has.
    """
    if logging.getLogger().handlers:
        return False
    configure()
    return True


def timestamp(unix: float) -> str:
    """UTC, to the millisecond, as RFC 3339 has it."""
    seconds, milliseconds = divmod(int(unix * 1000), 1000)
    return f"{_second(seconds)}.{milliseconds:03d}Z"


@lru_cache(maxsize=64)
def _second(unix: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix))


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z WARNING supervisor: server a: up -> down`."""

    def __init__(self, tag: str = "") -> None:
        super().__init__()
        self._tag = tag

    def format(self, record: logging.LogRecord) -> str:
        """The record, a traceback on lines of its own."""
        name = (
            record.name.rpartition(".")[2]
            if record.name.startswith("vllm_router.")
            else record.name
        )
        when = timestamp(record.created)
        tag = f" [{self._tag}]" if self._tag else ""
        lines = [f"{when} {record.levelname:<7}{tag} {name}: {visible(record.getMessage())}"]
        lines += [_CONTINUED + visible(line) for line in self._traceback(record)]
        return "\n".join(lines)

    def _traceback(self, record: logging.LogRecord) -> list[str]:
        # Not kept in record.exc_text, where another handler's formatter would find it.
        parts = [self.formatException(record.exc_info)] if record.exc_info else []
        if record.stack_info:
            parts.append(self.formatStack(record.stack_info))
        return "\n".join(parts).split("\n") if parts else []


class JsonFormatter(TextFormatter):
    """One object per line: `time`, `level`, `logger`, `message`, perhaps `traceback`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record in ASCII alone: whatever reads it needs to know no encoding."""
        fields = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._tag:
            fields["worker"] = self._tag
        if traceback := self._traceback(record):
            fields["traceback"] = "\n".join(traceback)
        # The one control character that JSON leaves as it is.
        return json.dumps(fields).replace("\x7f", "\\u007f")
