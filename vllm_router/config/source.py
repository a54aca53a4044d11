"""The file that a configuration is read from, with the files that it names."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from vllm_router.config import ssl_contexts
from vllm_router.config.memory import Memory
from vllm_router.config.parser import TABLES, parse
from vllm_router.config.schema import Config
from vllm_router.config.shared import missing_package
from vllm_router.config.toml_reader import MAX_FILE_BYTES, Reader
from vllm_router.errors import ConfigError

logger = logging.getLogger(__name__)


class Fingerprint(NamedTuple):
    """Metadata of a file; if it is equal, the file is taken as unchanged.

    `ctime_ns` is needed because a changed mode (a file made readable) keeps `mtime_ns`.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


Fingerprints = tuple[Fingerprint | str, ...]
"""One entry for the configuration file and each file it names; a file without metadata has the
error message as its entry, so that a file that vanishes has changed."""


class ConfigSource:
    """A configuration file on disk. It is open only during `load`.

    `loaded` has the fingerprints at the last `load`, None before the first.
    """

    def __init__(
        self,
        path: str | Path,
        environ: Mapping[str, str] | None = None,
        memory: Memory = Memory(),  # noqa: B008 (never changes)
        policies: Collection[str] | None = None,
    ) -> None:
        """`path` is shown in messages as given.

        See `parse` for the other arguments; `environ` is os.environ unless given.
        """
        self._policies = policies
        self.memory = memory
        self.path = path
        self.loaded: Fingerprints | None = None
        self._named: tuple[str, ...] = ()
        self._environ = os.environ if environ is None else environ

    def __repr__(self) -> str:
        return f"<ConfigSource {self.path}>"

    def fingerprints(self) -> Fingerprints:
        """The present fingerprints of the file and the files it named at the last `load`.

        Never raises, opens no file.
        """
        return tuple(_fingerprint(path) for path in (self.path, *self._named))

    def load(self) -> Config:
        """Read and validate the file. Raises ConfigError if it is unreadable or wrong.

        Fingerprints are taken before reading, so that a concurrent write is noticed afterwards.
        """
        first = _fingerprint(self.path)
        named: dict[str, Fingerprint | str] = {}
        passing = False

        def read(path: str | Path) -> bytes:
            nonlocal passing
            try:
                return _read(path)
            except ConfigError as error:
                passing = passing or error.passing
                raise

        def read_named(path: str) -> bytes:
            # Of a file that is read twice the older state counts: it may change in between.
            named.setdefault(path, _fingerprint(path))
            data = read(path)
            _warn_if_open(path, data)
            return data

        try:
            data = read(self.path)
            config = parse(
                data,
                str(self.path),
                self._environ,
                read_named,
                self.memory,
                self._policies,
            )
            reader = Reader(str(self.path), TABLES, data=data)
            for problem in ssl_contexts.problems(config):
                passing = passing or problem.passing
                reader.problem(reader.first_present(problem.paths), problem.text)
            for text in missing_package(config.shared):
                reader.problem("shared", text)
            reader.raise_problems()
            return config
        except ConfigError as error:
            error.passing = passing
            raise
        finally:
            self._named = tuple(named)
            self.loaded = (first, *named.values())


def _fingerprint(path: str | Path) -> Fingerprint | str:
    try:
        info = os.stat(path)
    except OSError as error:
        return _reason(error)
    except ValueError as error:  # a NUL in the path
        return str(error)
    return Fingerprint(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _warn_if_open(path: str, data: bytes) -> None:
    """Warn about files of keys that other users may read, and files that they may change."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    secret = b"PRIVATE KEY-----" in data or (b"-----BEGIN" not in data and bool(data.strip()))
    if mode & 0o026 and secret:
        logger.warning("%s: holds keys, but other users may read or change it: chmod 600", path)
    elif mode & 0o022:
        logger.warning("%s: other users may change it: chmod go-w", path)


def _read(path: str | Path) -> bytes:
    """Read at most MAX_FILE_BYTES + 1 bytes, which `parse` refuses. Never blocks on a pipe."""
    there = False
    try:
        kind = _kind(os.stat(path).st_mode)
        there = True
        if kind is None:
            # The file may have been replaced by a pipe since `stat`: do not block.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                kind = _kind(os.fstat(descriptor).st_mode)
                if kind is None:
                    return file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        text = f"{path}: cannot be read: {_reason(error)}"
        # The fingerprint changes with the owner and the mode.
        passing = there and not isinstance(error, PermissionError)
        raise ConfigError([text], passing=passing) from None
    raise ConfigError([f"{path}: expected a file, got {kind}"])


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _kind(mode: int) -> str | None:
    """A description of the file type; None for a regular file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "something else")
