"""Hot reload of the configuration file.

`ConfigSource` reads the file, `Reloader` decides, and `watch`, the only part that knows Trio,
sleeps and calls. The file is polled: `os.stat` costs 2 µs, follows symbolic links and works on
every file system, so that writes in place, atomic replacement and the link swap of a Kubernetes
ConfigMap are all seen; inotify on the file misses the last two.
"""

from __future__ import annotations

import enum
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import trio

from vllm_router.config import ssl_contexts as tls
from vllm_router.config.memory import Memory
from vllm_router.config.schema import Config, changes, parse
from vllm_router.config.toml_reader import MAX_FILE_BYTES
from vllm_router.errors import ConfigError

logger = logging.getLogger(__name__)

SETTLE_TIME = 0.1
"""Seconds that a changed file must stay as it is before it is read. A writer in the middle of its
work may leave a file that is valid and lacks half of the servers. It is also longer than the tick
of file timestamps (4 to 10 ms), so that no later write can go unseen within the same tick."""

LOGGED_PROBLEMS = 5
"""A log line names so many problems of a refused file; `last_error` has them all."""


class Fingerprint(NamedTuple):
    """What of a file's metadata tells that it may have changed.

    The change time is in it because a file made readable again keeps its modification time.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


Seen = tuple[Fingerprint | str, ...]
"""The fingerprints of the file and those it names, or why there is none: a file that vanishes has
changed, too."""


class ConfigSource:
    """The file a configuration comes from. Opens it only while it reads."""

    def __init__(
        self,
        path: str | Path,
        environ: Mapping[str, str] | None = None,
        memory: Memory = Memory(),  # noqa: B008 (never changes)
        policies: Collection[str] | None = None,
    ) -> None:
        """`path` is shown in messages as given; `environ` is os.environ unless given; defaults
        fit into `memory`; `policies` are the names that `policy` accepts, None accepts any.
        """
        self._policies = policies
        self.memory = memory
        self.path = path
        self.loaded: Seen | None = None
        self._named: tuple[str, ...] = ()
        self._environ = os.environ if environ is None else environ

    def __repr__(self) -> str:
        return f"<ConfigSource {self.path}>"

    def look(self) -> Seen:
        """What the file, and those it named last, look like now. Never raises, never opens one."""
        return tuple(_look(path) for path in (self.path, *self._named))

    def load(self) -> Config:
        """Read and check the file; raises ConfigError if it is unreadable or wrong.

        The fingerprint is taken first, so that a write during the reading is seen afterwards.
        """
        first = _look(self.path)
        named: dict[str, Fingerprint | str] = {}

        def read_named(path: str) -> bytes:
            named[path] = _look(path)
            data = _read(path)
            _warn_if_open(path, data)
            return data

        try:
            config = parse(
                _read(self.path),
                str(self.path),
                self._environ,
                read_named,
                self.memory,
                self._policies,
            )
            problems = tls.problems(config)
            if problems:
                raise ConfigError([f"{self.path}: {problem}" for problem in problems])
            return config
        finally:
            self._named = tuple(named)
            self.loaded = (first, *named.values())


def _look(path: str | Path) -> Fingerprint | str:
    try:
        info = os.stat(path)
    except OSError as error:
        return _reason(error)
    except ValueError as error:  # a NUL in the path
        return str(error)
    return Fingerprint(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _warn_if_open(path: str, data: bytes) -> None:
    """A file of keys that everybody may read, or others change, is worth a line."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    secret = b"PRIVATE KEY-----" in data or b"-----BEGIN" not in data
    if mode & 0o026 and secret:
        logger.warning("%s: others may read or change it, though it holds keys: chmod 600", path)
    elif mode & 0o022:
        logger.warning("%s: others may change it: chmod go-w", path)


def _read(path: str | Path) -> bytes:
    """At most MAX_FILE_BYTES + 1 bytes, which `parse` refuses; never blocks on a pipe."""
    try:
        kind = _kind(os.stat(path).st_mode)
        if kind is None:
            # Between the two calls the file may have become a pipe: do not wait for it.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                kind = _kind(os.fstat(descriptor).st_mode)
                if kind is None:
                    return file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read: {_reason(error)}"]) from None
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
    """What it is if it is no regular file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "something else")


class Reload(enum.Enum):
    """What came of a look at the file."""

    APPLIED = "applied"
    UNCHANGED = "unchanged"
    REFUSED = "refused"


class Beside(Protocol):
    """Runs a function without holding up the loop."""

    def __call__(self, function: Callable[[], Config], /) -> Awaitable[Config]: ...


async def _in_a_thread(function: Callable[[], Config]) -> Config:
    # A file system that hangs must not keep the router from ending.
    return await trio.to_thread.run_sync(function, abandon_on_cancel=True)


class Reloader:
    """Keeps the configuration in force, and replaces it whole or not at all.

    `current` is in force; `generation` counts from 1 and rises with every replacement;
    `last_error` holds the problems of the file as it is now, one a line, and is None while it is
    good; `applied_total` and `refused_total` only rise.
    """

    def __init__(
        self,
        source: ConfigSource,
        current: Config,
        apply: Callable[[Config, Config], None],
        prepare: Callable[[Config], Awaitable[None]] | None = None,
        beside: Beside | None = None,
    ) -> None:
        """`current` comes from `source.load()`.

        `apply(old, new)` puts a new configuration in force, synchronously. It may raise
        ConfigError to refuse it, before it has changed anything. `prepare(new)` may do what takes
        long before, and raise ConfigError, too. `beside` runs the reading of the file, which takes
        0.3 s for a thousand servers; a thread does unless it is given.
        """
        self.source = source
        self.current = current
        self.generation = 1
        self.last_error: str | None = None
        self.applied_total = 0
        self.refused_total = 0
        self._apply = apply
        self._prepare = prepare
        self._beside: Beside = beside or _in_a_thread
        self._lock = trio.Lock()
        self._seen: Seen | None = source.loaded

    @property
    def settled(self) -> bool:
        """False while the file has changed and waits to be read: poll again in SETTLE_TIME."""
        return self._seen == self.source.loaded

    async def poll(self) -> Reload:
        """Look at the file, and read it if it has changed and stayed so since the last look."""
        seen, self._seen = self._seen, self.source.look()
        if self.settled or self._seen != seen:
            return Reload.UNCHANGED
        return await self.reload(force=False)

    async def reload(self, *, force: bool) -> Reload:
        """Read the file, unless it is the one read last and `force` is off, and apply it.

        A refused file changes nothing but the counters, `last_error` and one log line. One reload
        after the other, whoever asks for them.
        """
        async with self._lock:
            return await self._reload(force=force)

    async def _reload(self, *, force: bool) -> Reload:
        self._seen = self.source.look()
        if self.settled and not force:
            return Reload.UNCHANGED
        old = self.current
        try:
            new = await self._beside(self.source.load)
            if new != old:
                if self._prepare is not None:
                    await self._prepare(new)
                self._apply(old, new)
        except ConfigError as error:
            return self._refuse(error.problems)
        except Exception as error:
            # A defect in here must not end the process that serves the traffic.
            logger.exception("reload of %s failed", self.source.path)
            return self._refuse([f"{self.source.path}: {type(error).__name__} (see the log)"])
        recovered, self.last_error = self.last_error is not None, None
        if new == old:
            if recovered or force:
                logger.info("configuration read again, %s changes nothing", self.source.path)
            return Reload.UNCHANGED
        self.current = new
        self.generation += 1
        self.applied_total += 1
        logger.info("configuration applied, %s: %s", self.source.path, changes(old, new))
        return Reload.APPLIED

    def _refuse(self, problems: tuple[str, ...] | list[str]) -> Reload:
        self.last_error = "\n".join(problems)
        self.refused_total += 1
        more = len(problems) - LOGGED_PROBLEMS
        logger.error(
            "configuration refused, the one in force stays: %s%s",
            "; ".join(problems[:LOGGED_PROBLEMS]),
            f"; and {more} more" if more > 0 else "",
        )
        return Reload.REFUSED


class Nudge:
    """Wakes `watch` for a forced reload. Several nudges before it runs count as one."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def __call__(self) -> None:
        """Ask for a reload, e.g. on SIGHUP; from the Trio thread."""
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        """Wait so long, or until a nudge comes; True if it did."""
        with trio.move_on_after(seconds):
            await self._event.wait()
        if not self._event.is_set():
            return False
        self._event = trio.Event()
        return True


async def watch(reloader: Reloader, nudge: Nudge) -> None:
    """Follow the file until cancelled. A nudge re-reads it at once, changed or not."""
    while True:
        interval = reloader.current.settings.config_reload_interval
        pause = interval if reloader.settled else SETTLE_TIME
        if await nudge.wait(pause):
            await reloader.reload(force=True)
        else:
            await reloader.poll()
