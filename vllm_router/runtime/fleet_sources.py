"""The configuration in force: the file's, with the servers that discovery sources have found."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from vllm_router.config.changes import changes
from vllm_router.config.discovered import merge, without_discovered
from vllm_router.config.schema import Config
from vllm_router.discovery.discovery import Discovery
from vllm_router.discovery.intake import Answers
from vllm_router.discovery.kinds import make_source
from vllm_router.discovery.news import News
from vllm_router.discovery.source_task import MakeSource
from vllm_router.errors import ConfigError

logger = logging.getLogger(__name__)

APPLY_GAP = 0.2
"""Seconds between two changes of the fleet by sources, so that a flapping source costs little."""


class FleetSources:
    """Merges what sources find into the configuration, through the same steps as a reload.

    `in_force` returns the merged configuration in force. `prepare` does the slow work for a new
    one, `apply(old, new, kind)` puts it in force; both may raise ConfigError.
    """

    def __init__(
        self,
        config: Config,
        answers: Answers,
        announce: Callable[[News], None],
        in_force: Callable[[], Config],
        prepare: Callable[[Config], Awaitable[None]],
        apply: Callable[[Config, Config, str], None],
        make: MakeSource = make_source,
    ) -> None:
        self.file_config = without_discovered(config)
        self.discovery = Discovery(config, answers, self._set_changed, announce, make)
        self._in_force = in_force
        self._prepare = prepare
        self._apply = apply
        self._changed = trio.Event()
        self._refused = ""

    def _set_changed(self) -> None:
        self._changed.set()

    async def prepare_file(self, new: Config) -> None:
        """`prepare` for a new file. Raises ConfigError."""
        await self._prepare(self._merged(new))

    def apply_file(self, old: Config, new: Config) -> None:
        """Put a new file in force, with the servers found so far. Raises ConfigError."""
        self._apply(self._in_force(), self._merged(new), "reload")
        self.file_config = new
        self.discovery.use(new)

    def _merged(self, file_config: Config) -> Config:
        merged = merge(file_config, self.discovery.found_for(file_config))
        self.discovery.note_conflicts(merged.problems)
        return merged.config

    async def run(self) -> None:
        """Run the sources and apply what they find, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.discovery.run)
            nursery.start_soon(self.discovery.review, lambda: bool(self.file_config.servers))
            while True:
                await self._changed.wait()
                self._changed = trio.Event()
                await self._take_found()
                await trio.sleep(APPLY_GAP)

    async def _take_found(self) -> None:
        old, new = self._in_force(), self._merged(self.file_config)
        if new == old:
            self._refused = ""
            return
        try:
            await self._prepare(new)
            # The file may have changed meanwhile.
            old, new = self._in_force(), self._merged(self.file_config)
            self._apply(old, new, "discovery")
        except ConfigError as error:
            refused, self._refused = self._refused, "; ".join(error.problems)
            if self._refused != refused:
                logger.error(
                    "the servers that were found cannot be used, the fleet stays as it is: %s",
                    self._refused,
                )
            if error.passing:
                self._set_changed()
            return
        self._refused = ""
        if new.servers != old.servers:
            logger.info("discovery: %s", changes(old, new))
