"""Lines written by a thread, so that a slow disk or reader never blocks the event loop.

At most LIMIT lines are queued; further lines are dropped and counted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from vllm_router.observability.background_writer import BackgroundWriter

LIMIT = 10_000
"""Queued lines: about 5 MB, without prompt hashes."""

logger = logging.getLogger(__name__)

Entry = str | tuple[Callable[[Any], str], Any]
"""A finished line, or a function and its argument; called in the thread. Without newline."""


class Target(Protocol):
    """The destination of lines. Called in the writer's thread; raises OSError."""

    name: str

    def write(self, text: str) -> None: ...

    def reopen(self) -> None: ...

    def close(self) -> None: ...


class StreamTarget:
    """An existing stream, such as stderr, which is not closed.

    If it is `shared` with other processes, lines of up to PIPE_BUF bytes stay whole in a pipe.
    """

    def __init__(self, stream: TextIO, *, shared: bool = False) -> None:
        self._shared = shared
        self.name = getattr(stream, "name", "a stream")
        self._stream = stream
        self._descriptor: int | None = None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._descriptor = stream.fileno()

    def write(self, text: str) -> None:
        if self._descriptor is None:
            self._stream.write(text)
        else:
            # Bypass the stream's lock: a blocked thread would hold it against `print` on the event
            # loop.
            for piece in _pieces(text) if self._shared else (text,):
                _write_all(self._descriptor, piece)

    def reopen(self) -> None:
        """A stream has no path to reopen."""

    def close(self) -> None:
        """The stream belongs to the caller."""


class FileTarget:
    """Appends to a file, created readable by owner and group if it does not exist.

    If the file is moved or removed, a new one is created, so that any program may rotate it.
    """

    def __init__(self, path: str | Path, *, own: bool = False) -> None:
        """Open the file. Raises OSError.

        own: the program chose the path, so that a missing directory is created. In a path that an
        operator gave it is rather a mistake.
        """
        self.name = str(path)
        self._path = Path(path)
        if own:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = self._open()

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def write(self, text: str) -> None:
        if self._moved():
            self.reopen()
        _write_all(self._descriptor, text)

    def _moved(self) -> bool:
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return True

    def reopen(self) -> None:
        """Open the file that has the path now. If that fails, the old file stays open."""
        opened = self._open()
        os.close(self._descriptor)
        self._descriptor = opened

    def close(self) -> None:
        os.close(self._descriptor)


def _pieces(text: str) -> Iterator[str]:
    """Groups of whole lines, each at most the size that a pipe accepts atomically."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        length = len(line.encode("utf-8", "backslashreplace"))
        if size and size + length > select.PIPE_BUF:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += length
    yield "".join(piece)


def _write_all(descriptor: int, text: str) -> None:
    data = memoryview(text.encode("utf-8", "backslashreplace"))
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            # Another process that shares the terminal or pipe may have made it non-blocking.
            select.select([], [descriptor], [], 1.0)


class LineWriter:
    """A thread and its queue of lines. `close` ends it.

    If lines are dropped, a line made by `notice(count)` reports it.
    """

    def __init__(self, target: Target, notice: Callable[[int], str]) -> None:
        self.target = target
        self._notice = notice
        self._unwritten = 0
        self._noticed = 0
        self._reopen = False
        self._failing = False
        self._gatherer = BackgroundWriter("log writer", LIMIT, self._write)
        self.put: Callable[[Entry], None] = self._gatherer.put
        """Queue a line. Never blocks, never raises; callable from any thread."""

    @property
    def dropped(self) -> int:
        """Lines lost because the queue was full or a write failed."""
        return self._gatherer.dropped + self._unwritten

    def hurry(self) -> None:
        """Write the queued lines soon."""
        self._gatherer.wake()

    def reopen(self) -> None:
        """Reopen the file before the next line, because it has been moved."""
        self._reopen = True
        self._gatherer.wake()

    def flush(self) -> bool:
        """Wait up to a second for the queued lines; returns False on timeout."""
        return self._gatherer.flush()

    def close(self) -> bool:
        """Write the queued lines; returns False on timeout."""
        if not self._gatherer.close():
            return False  # blocked in a write: the target stays open
        with contextlib.suppress(OSError):
            self.target.close()
        return True

    # -- in the thread ------------------------------------------------------------------------

    def _write(self, entries: list[Entry]) -> None:
        if self._reopen:
            self._reopen = False
            try:
                self.target.reopen()
            except OSError as error:
                logger.error(
                    "cannot reopen %s, the old file stays in use: %s",
                    self.target.name,
                    error.strerror,
                )
        lines = [entry for entry in entries if isinstance(entry, str)]
        if len(lines) < len(entries):
            lines = [line for entry in entries for line in _lines(entry)]
        lost = self._gatherer.dropped
        if lost != self._noticed:
            lines.append(self._notice(lost - self._noticed))
            self._noticed = lost
        if not lines:
            return
        try:
            self.target.write("\n".join(lines) + "\n")
        except OSError as error:
            self._unwritten += len(lines)
            if not self._failing:
                self._failing = True
                logger.error(
                    "cannot write to %s, lines are dropped: %s", self.target.name, error.strerror
                )
        else:
            self._failing = False


def _lines(entry: Entry) -> list[str]:
    """The line of an entry, or an empty list if it cannot be formatted."""
    if isinstance(entry, str):
        return [entry]
    make, of = entry
    try:
        return [make(of)]
    except Exception:
        # A defect in one line must not end the thread that writes all others.
        logger.exception("a line could not be formatted and was dropped")
        return []
