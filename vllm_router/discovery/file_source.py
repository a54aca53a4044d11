"""The source `file`: files in the format of Prometheus' file_sd, found by path or pattern."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence
from typing import NamedTuple

import trio

from vllm_router.config.discovery import FileSource, Found
from vllm_router.discovery.file_sd import (
    MAX_BYTES,
    BadDocument,
    UnreadDocument,
    read_json,
    read_yaml,
)
from vllm_router.discovery.source import Again, Sink

MAX_FILES = 1000
"""Files of one source that are read."""

SETTLE_TIME = 0.1
"""Seconds that a changed file must stay unchanged before it is read: it may be half written."""


class _Print(NamedTuple):
    """If it is equal, the file is taken as unchanged."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


Prints = dict[str, "_Print | str"]
"""By path; a file that cannot be examined has the reason."""


class Files:
    """Reads the files when they have changed, in a thread.

    A file that cannot be read keeps its last targets, and makes the source fail; a file that is
    gone has none. A file that could not be opened is tried again, changed or not: the router may
    have had no descriptor left.
    """

    def __init__(self, config: FileSource) -> None:
        self._config = config
        self._seen: Prints | None = None
        self._targets: dict[str, tuple[Found, ...]] = {}
        self._read: Prints = {}
        self._problems: dict[str, str] = {}
        self._left_out: dict[str, tuple[str, ...]] = {}
        self._unread: set[str] = set()

    async def run(self, sink: Sink, again: Again) -> None:
        """Look at the files every `interval` seconds."""
        while True:
            prints = await trio.to_thread.run_sync(self._look, abandon_on_cancel=True)
            settled = self._seen is None or prints == self._seen
            self._seen = prints
            if settled:
                await self._take(prints, sink)
            pause = self._config.interval if settled else min(SETTLE_TIME, self._config.interval)
            await again.wait(pause)

    def _look(self) -> Prints:
        """The present files, by path, without opening one. Runs in a thread."""
        prints: Prints = {}
        for pattern in self._config.paths:
            try:
                named = _expand(pattern)
            except (OSError, ValueError) as error:
                prints[pattern] = str(error)
                continue
            for path in named:
                prints[path] = _fingerprint(path)
        return prints

    async def _take(self, prints: Prints, sink: Sink) -> None:
        """Read what has changed, and report."""
        first = not self._read
        changed = [
            path
            for path, mark in prints.items()
            if self._read.get(path) != mark or path in self._unread
        ]
        gone = self._read.keys() - prints.keys()
        news = first or bool(gone)
        for path in gone:
            self._unread.discard(path)
            for known in (self._targets, self._problems, self._left_out, self._read):
                known.pop(path, None)
        for path in changed[:MAX_FILES]:
            mark = prints[path]
            tried = self._read.get(path) == mark
            await self._read_file(path, mark)
            news = news or not (tried and path in self._unread)
            self._read[path] = mark
        problem = "; ".join(self._problems.values())
        if not prints:
            problem = f"no file matches {', '.join(self._config.paths)}"
        if news and (self._targets or not problem):
            found = [target for targets in self._targets.values() for target in targets]
            left_out = [line for lines in self._left_out.values() for line in lines]
            sink.found(found, left_out)
        if problem:
            sink.failed(problem)
        elif not news:
            sink.confirmed()

    async def _read_file(self, path: str, mark: _Print | str) -> None:
        self._unread.discard(path)
        try:
            if isinstance(mark, str):
                raise BadDocument(mark)
            found, left_out = await trio.to_thread.run_sync(read_file, path, abandon_on_cancel=True)
        except BadDocument as error:
            self._problems[path] = f"{path}: {error}"
            if isinstance(error, UnreadDocument):
                self._unread.add(path)
            return
        self._problems.pop(path, None)
        self._targets[path] = found
        self._left_out[path] = tuple([f"{path}: {line}" for line in left_out])


def _expand(pattern: str) -> list[str]:
    """The files of a pattern in a fixed order. A name without wildcards stands for itself."""
    if glob.has_magic(pattern) and not os.path.lexists(pattern):
        return sorted(glob.glob(pattern))[: MAX_FILES + 1]
    return [pattern]


def _fingerprint(path: str) -> _Print | str:
    try:
        info = os.stat(path)
    except (OSError, ValueError) as error:
        return (error.strerror if isinstance(error, OSError) else None) or str(error)
    if not stat.S_ISREG(info.st_mode):
        return "expected a file, got something else"
    return _Print(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def read_file(path: str) -> tuple[tuple[Found, ...], Sequence[str]]:
    """The targets in a file. Raises BadDocument. Runs in a thread."""
    try:
        # The file may have been replaced by a pipe since it was examined: do not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise BadDocument("expected a file, got something else")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UnreadDocument(error.strerror or str(error)) from None
    return read_yaml(data) if path.endswith((".yml", ".yaml")) else read_json(data)
