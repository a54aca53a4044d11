"""The destinations of log and access log, which follow the configuration."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from vllm_router.config.log import LogSettings
from vllm_router.observability import formatting as logs
from vllm_router.observability.access_log import AccessLog
from vllm_router.observability.line_writer import FileTarget, LineWriter, StreamTarget, Target

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """Options of the command line that override `[log]`; None where the option is not given."""

    level: str | None = None
    form: str | None = None
    access: bool | str | None = None


class LineHandler(logging.Handler):
    """Passes formatted records to a writer: their arguments may change before it writes them."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        self._writer.put(self.format(record))
        self._writer.hurry()


class LogOutput:
    """Owns the writers and their threads; `close` ends them.

    `access` is the recorder that writes access lines; `form` is text or json. The log goes to
    `file`, or else to `stream` (stderr). With `with_log` False, another program has configured
    logging, which is left alone: only access lines are written. If several processes log to the
    same place, `tag` identifies this one, and lines stay whole.
    """

    def __init__(
        self,
        overrides: Overrides | None = None,
        *,
        file: Path | None = None,
        stream: TextIO | None = None,
        with_log: bool = True,
        tag: str = "",
    ) -> None:
        """Raises OSError if `file` cannot be written."""
        self.access = AccessLog()
        self.overrides = overrides or Overrides()
        self.file = file
        self._tag = tag
        self._with_log = with_log
        self.form = "text"
        self._target: bool | str = False
        self._file: LineWriter | None = None
        self._lost = 0
        target: Target = StreamTarget(stream or sys.stderr, shared=bool(tag))
        if file is not None:
            target = FileTarget(file, own=True)
        self._log = LineWriter(target, self._notice)
        self._handler = LineHandler(self._log)
        if with_log:
            logging.basicConfig(handlers=[self._handler], force=True)

    def apply(self, settings: LogSettings) -> None:
        """Apply new settings. Raises OSError, without any change, if a file cannot be opened."""
        overrides = self.overrides
        access = settings.access if overrides.access is None else overrides.access
        if access != self._target:
            self._switch(access)
        level = overrides.level or settings.level
        self.form = self.access.form = overrides.form or settings.format
        if self._with_log:
            logs.adjust(self._handler, level, self.form, self._tag)
        # In a separate file all access lines are logged; in the common log the level applies.
        alone = self._file is not None
        threshold = logging.getLevelNamesMapping()[level.upper()]
        self.access.threshold = logging.INFO if alone else threshold

    def follow(self, settings: LogSettings) -> None:
        """Apply the settings of a reload; an error is logged, and the old output stays."""
        try:
            self.apply(settings)
        except OSError as error:
            logger.error("cannot open the new log, the previous one stays in use: %s", error)

    def _switch(self, access: bool | str) -> None:
        before = self._file
        if isinstance(access, str):
            target: Target
            if access == "-":
                target = StreamTarget(sys.stdout, shared=bool(self._tag))
            else:
                target = FileTarget(access)
            self._file = self.access.writer = LineWriter(target, self._notice)
        else:
            self._file = None
            self.access.writer = self._log if access else None
        self._target = access
        if before is not None:
            before.close()
            self._lost += before.dropped

    def flush(self) -> None:
        """Wait up to a second until everything logged so far is written."""
        self._log.flush()

    def reopen(self) -> None:
        """Reopen the files, because they have been moved."""
        for writer in (self._log, self._file):
            if writer is not None:
                writer.reopen()
        logger.info("log files reopened")

    @property
    def dropped(self) -> int:
        """Lines lost since the start."""
        return self._lost + self._log.dropped + (self._file.dropped if self._file else 0)

    def close(self) -> None:
        """Write the queued lines; later records go directly to stderr."""
        if self._with_log:
            logs.configure(form=self.form)
        self.access.writer = None
        if self._file is not None:
            self._file.close()
        self._log.close()

    def _notice(self, count: int) -> str:
        formatter = logs.JsonFormatter() if self.form == "json" else logs.TextFormatter()
        return formatter.format(
            logging.makeLogRecord(
                {
                    "name": "vllm_router.observability.line_writer",
                    "levelname": "WARNING",
                    "msg": f"{count} log lines were dropped: the output was too slow",
                }
            )
        )
