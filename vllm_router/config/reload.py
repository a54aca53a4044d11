"""Hot reload of the configuration file: `Reloader` decides, `watch` is the task that polls.

The file is polled because `os.stat` costs 2 µs, follows symbolic links and works on every file
system: writes in place, atomic replacement and the link swap of a Kubernetes ConfigMap are all
noticed. inotify on the file misses the last two.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Protocol

import trio

from vllm_router.config.changes import changes
from vllm_router.config.schema import Config
from vllm_router.config.source import ConfigSource, Fingerprints
from vllm_router.errors import ConfigError, Problem

logger = logging.getLogger(__name__)

SETTLE_TIME = 0.1
"""Seconds that a changed file must stay unchanged before it is read: a half-written file may be
valid and lack half of the servers. Also longer than the resolution of file timestamps (4 to
10 ms), so that every later write changes the fingerprint."""

LOGGED_PROBLEMS = 5
"""Problems of a refused file in its log line; `last_error` has all of them."""


class Reload(enum.Enum):
    """The result of a poll or a reload."""

    APPLIED = "applied"
    UNCHANGED = "unchanged"
    REFUSED = "refused"


class RunInBackground(Protocol):
    """Runs a blocking function without blocking the event loop."""

    def __call__(self, function: Callable[[], Config], /) -> Awaitable[Config]: ...


async def _in_a_thread(function: Callable[[], Config]) -> Config:
    # Abandoned on cancel: a hanging file system must not block the shutdown.
    return await trio.to_thread.run_sync(function, abandon_on_cancel=True)


class Reloader:
    """Holds the current configuration and replaces it as a whole or not at all.

    current: the configuration in force.
    generation: starts at 1, incremented with every replacement.
    last_error: problems of the present file, one per line; None while the file is valid.
    last_problem: the parts of the first of them.
    applied_total, refused_total: counters.
    """

    def __init__(
        self,
        source: ConfigSource,
        current: Config,
        apply: Callable[[Config, Config], None],
        prepare: Callable[[Config], Awaitable[None]] | None = None,
        run_in_background: RunInBackground | None = None,
    ) -> None:
        """`current` is the result of `source.load()`.

        `prepare(new)` does the slow work that `apply` needs; `apply(old, new)` puts the new
        configuration in force, synchronously. Both may raise ConfigError to refuse it, `apply`
        only before it has changed anything. `run_in_background` runs `source.load`, which takes
        0.3 s for a thousand servers; a thread by default.
        """
        self.source = source
        self.current = current
        self.generation = 1
        self.last_error: str | None = None
        self.last_problem: Problem | None = None
        self.applied_total = 0
        self.refused_total = 0
        self._apply = apply
        self._prepare = prepare
        self._run_in_background: RunInBackground = run_in_background or _in_a_thread
        self._lock = trio.Lock()
        self._seen: Fingerprints | None = source.loaded
        self._try_again = False

    @property
    def settled(self) -> bool:
        """False if the file has changed and is not read yet: poll again after SETTLE_TIME."""
        return self._seen == self.source.loaded

    async def poll(self) -> Reload:
        """Reload if the file has changed before the last poll and not since.

        A file that could not be read for a passing reason is tried again at every poll.
        """
        seen, self._seen = self._seen, self.source.fingerprints()
        if self._seen != seen or (self.settled and not self._try_again):
            return Reload.UNCHANGED
        return await self.reload(force=False)

    async def reload(self, *, force: bool) -> Reload:
        """Read and apply the file; without `force` only if it has changed since it was read.

        A refused file changes `refused_total` and `last_error` and is logged once, however often it
        is tried again. Concurrent calls run one after the other.
        """
        async with self._lock:
            return await self._reload(force=force)

    async def _reload(self, *, force: bool) -> Reload:
        self._seen = self.source.fingerprints()
        again = self.settled and not force
        if again and not self._try_again:
            return Reload.UNCHANGED
        self._try_again = False
        old = self.current
        try:
            new = await self._run_in_background(self.source.load)
            if new != old:
                if self._prepare is not None:
                    await self._prepare(new)
                self._apply(old, new)
        except ConfigError as error:
            self._try_again = error.passing
            if again and self.last_error == "\n".join(error.problems):
                return Reload.UNCHANGED
            return self._refuse(error.problems, error.parts)
        except Exception as error:
            # A bug in reloading must not end the process that serves traffic.
            logger.exception("reload of %s failed", self.source.path)
            return self._refuse(
                [f"{self.source.path}: internal error {type(error).__name__} (see the log)"]
            )
        recovered, self.last_error = self.last_error is not None, None
        self.last_problem = None
        if new == old:
            if recovered or force:
                logger.info("configuration unchanged after a reload of %s", self.source.path)
            return Reload.UNCHANGED
        self.current = new
        self.generation += 1
        self.applied_total += 1
        logger.info("configuration applied, %s: %s", self.source.path, changes(old, new))
        return Reload.APPLIED

    def _refuse(
        self, problems: Sequence[str], parts: Mapping[str, Problem] = MappingProxyType({})
    ) -> Reload:
        self.last_error = "\n".join(problems)
        self.last_problem = parts.get(problems[0]) if problems else None
        self.refused_total += 1
        more = len(problems) - LOGGED_PROBLEMS
        logger.error(
            "configuration refused, keeping the current one: %s%s",
            "; ".join(problems[:LOGGED_PROBLEMS]),
            f"; and {more} more" if more > 0 else "",
        )
        return Reload.REFUSED


class Nudge:
    """Wakes `watch` for a forced reload. Several calls before it runs count as one."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def __call__(self) -> None:
        """Request a reload, for example on SIGHUP. Call from the Trio thread."""
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        """Wait for a call, at most `seconds`; True if there was one."""
        with trio.move_on_after(seconds):
            await self._event.wait()
        if not self._event.is_set():
            return False
        self._event = trio.Event()
        return True


async def watch(
    reloader: Reloader,
    nudge: Nudge,
    reloading: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Poll the file until cancelled. A nudge re-reads it at once, changed or not.

    `reloading()` is entered for a reload that a nudge has asked for.
    """
    while True:
        interval = reloader.current.settings.config_reload_interval
        pause = interval if reloader.settled else SETTLE_TIME
        if await nudge.wait(pause):
            with reloading():
                await reloader.reload(force=True)
        else:
            await reloader.poll()
