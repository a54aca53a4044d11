"""Lines written by a thread, so that a slow disk or a stopped reader never holds up the loop.

At most LIMIT lines wait; what comes on top is dropped and counted.
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
"""Lines that wait: some 5 MB, without the hashes of prompts."""

logger = logging.getLogger(__name__)

Entry = str | tuple[Callable[[Any], str], Any]
"""A finished line, or how to make one and of what; made in the thread. Without its newline."""


class Target(Protocol):
    """Where lines go. Called in the writer's thread; raises OSError."""

    name: str

    def write(self, text: str) -> None: ...

    def reopen(self) -> None: ...

    def close(self) -> None: ...


class StreamTarget:
    """A stream of somebody else's, such as stderr.

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
            # Past the stream's own lock: a thread stuck in it would hold up the loop's `print`.
            for piece in _pieces(text) if self._shared else (text,):
                _write_all(self._descriptor, piece)

    def reopen(self) -> None:
        """A stream has no path."""

    def close(self) -> None:
        """It is not ours."""


class FileTarget:
    """The end of a file, made if it is not there, readable by its owner and group.

    One that was moved or removed is begun anew, so that any program may rotate it.
    """

    def __init__(self, path: str | Path) -> None:
        """Makes its directory. Raises OSError if it cannot be opened."""
        self.name = str(path)
        self._path = Path(path)
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
        """Go on in the file that has the name now. The old one stays open if that fails."""
        opened = self._open()
        os.close(self._descriptor)
        self._descriptor = opened

    def close(self) -> None:
        os.close(self._descriptor)


def _pieces(text: str) -> Iterator[str]:
    """Whole lines, together no longer than what a pipe takes without letting others in between."""
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
            # Whoever shares a terminal or pipe with us may have made it non-blocking.
            select.select([], [descriptor], [], 1.0)


class LineWriter:
    """A thread and the lines that wait for it. `close` ends it.

    Of lines that are dropped a line among the others tells, made by `notice(count)`.
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
        """Have a line written. Never waits, never raises; any thread may call it."""

    @property
    def dropped(self) -> int:
        """Lines lost: there was no room for them, or they could not be written."""
        return self._gatherer.dropped + self._unwritten

    def hurry(self) -> None:
        """Have the lines put so far written soon."""
        self._gatherer.wake()

    def reopen(self) -> None:
        """Open the file anew before the next line: it has been moved away."""
        self._reopen = True
        self._gatherer.wake()

    def flush(self) -> bool:
        """Wait for the lines put before, a second at most; False if that was not enough."""
        return self._gatherer.flush()

    def close(self) -> bool:
        """Write what waits; False if there was not enough time."""
        if not self._gatherer.close():
            return False  # stuck in a write: the target stays open
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
    """The line of an entry, or none."""
    if isinstance(entry, str):
        return [entry]
    make, of = entry
    try:
        return [make(of)]
    except Exception:
        # A defect in one line must not end the thread that writes all others.
        logger.exception("a line could not be formatted and was dropped")
        return []
