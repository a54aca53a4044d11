"""Format log records as text or JSON.

Many logged values are chosen by others (headers, paths, server responses). No control character is
written unescaped, and only the first line of a text record begins at the left margin: no value can
imitate a record.
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
"""Prefix of each continuation line of a record, such as a traceback."""


def visible(text: str) -> str:
    """`text` with every character that is not printable on one line escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def configure(level: str = "info", form: str = "text", stream: TextIO | None = None) -> None:
    """Send all log records to `stream` (stderr), replacing earlier handlers.

    `level`, one of LEVELS, applies to the router; other packages log from WARNING, because httpx
    alone would log every probe.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    logging.basicConfig(handlers=[handler], force=True)
    adjust(handler, level, form)


def adjust(handler: logging.Handler, level: str, form: str, tag: str = "") -> None:
    """Configure a handler's form and level, as in `configure`.

    `tag` identifies this process among several that write to the same place.
    """
    handler.setFormatter(JsonFormatter(tag) if form == "json" else TextFormatter(tag))
    threshold = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger().setLevel(max(threshold, logging.WARNING))
    logging.getLogger("vllm_router").setLevel(threshold)


def configure_if_unset() -> bool:
    """Configure logging with the defaults if the embedding program has not done so.

    Returns False if it has.
    """
    if logging.getLogger().handlers:
        return False
    configure()
    return True


def timestamp(unix: float) -> str:
    """An RFC 3339 time in UTC with milliseconds."""
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
        """Format the record, with a traceback on separate lines."""
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
        # Not stored in record.exc_text, where other handlers' formatters would find it.
        parts = [self.formatException(record.exc_info)] if record.exc_info else []
        if record.stack_info:
            parts.append(self.formatStack(record.stack_info))
        return "\n".join(parts).split("\n") if parts else []


class JsonFormatter(TextFormatter):
    """One object per line: `time`, `level`, `logger`, `message`, perhaps `traceback`."""

    def format(self, record: logging.LogRecord) -> str:
        """Format the record in ASCII, so that readers need not know the encoding."""
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
        # The only control character that JSON does not escape.
        return json.dumps(fields).replace("\x7f", "\\u007f")
