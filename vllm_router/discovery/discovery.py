"""Runs the sources of a configuration and holds the sets of targets that are in force."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from vllm_router.config.discovery import DiscoveryConfig, SourceConfig, Targets
from vllm_router.config.schema import Config
from vllm_router.discovery.intake import Answers
from vllm_router.discovery.kinds import make_source
from vllm_router.discovery.news import News
from vllm_router.discovery.source import SourceStatus
from vllm_router.discovery.source_task import MakeSource, SourceTask

START_PATIENCE = 10.0
"""Seconds for a source to answer after the start; then a router with other servers does without."""

LOOK_PAUSE = 1.0
"""Seconds between two looks at doubtful sets."""

_NO_SOURCES = DiscoveryConfig(sources=())


class Discovery:
    """The sources of a router.

    `answers` returns whether the checks of the server at a URL are good. `changed` is called when
    the targets in force have changed, `announce` with news for operators.
    """

    def __init__(
        self,
        config: Config,
        answers: Answers,
        changed: Callable[[], None],
        announce: Callable[[News], None],
        make: MakeSource = make_source,
    ) -> None:
        """Targets that `config` has already, from an earlier process, are in force at once."""
        self._config = config.discovery or _NO_SOURCES
        self._answers = answers
        self._changed = changed
        self._announce = announce
        self._make = make
        self._wanted = trio.Event()
        found = dict(config.found)
        self._tasks = {
            source.name: self._task(source, found.get(source.name))
            for source in self._config.sources
        }

    def _task(self, source: SourceConfig, targets: Targets | None) -> SourceTask:
        return SourceTask(
            source, self._config, targets, self._answers, self._changed, self._announce
        )

    @property
    def statuses(self) -> list[SourceStatus]:
        """The sources, in the order of the configuration."""
        return [task.status for task in self._tasks.values()]

    def found(self) -> dict[str, Targets]:
        """The targets in force, of the sources that have answered."""
        return {
            name: task.intake.targets
            for name, task in self._tasks.items()
            if task.intake.targets is not None
        }

    def found_for(self, config: Config) -> dict[str, Targets]:
        """The same for a new configuration, whose new sources have no targets yet.

        A running router does not wait for them.
        """
        new = config.discovery or _NO_SOURCES
        tasks = self._tasks_of(new)
        return {
            source.name: targets
            for source in new.sources
            if (targets := _targets_for(tasks.get(source.name))) is not None
        }

    def _tasks_of(self, new: DiscoveryConfig) -> dict[str, SourceTask]:
        """The present tasks of the sources of a new configuration, by the new names.

        Names follow the order of the file where a source has no id, so that another source may
        have the name now: the same settings count before the name.
        """
        left = dict(self._tasks)
        found = {}
        for source in sorted(new.sources, key=lambda one: one.name not in left):
            same = [name for name, task in left.items() if task.has_settings_of(source)]
            if same:
                found[source.name] = left.pop(source.name if source.name in same else same[0])
        for source in new.sources:
            if source.name not in found and source.name in left:
                found[source.name] = left.pop(source.name)
        return found

    def use(self, config: Config) -> None:
        """Follow the sources of a new configuration. A changed source keeps its last set."""
        old, new = self._config, config.discovery or _NO_SOURCES
        if new == old:
            return
        self._config = new
        before, known, self._tasks = self._tasks, self._tasks_of(new), {}
        for source in new.sources:
            task = known.get(source.name)
            if task is None or task.config != source or new.label_keys != old.label_keys:
                task = self._task(source, _targets_for(task))
            else:
                task.follow(new)
            self._tasks[source.name] = task
        for task in before.values():
            if task not in self._tasks.values():
                task.stop()
        self._wanted.set()

    def note_conflicts(self, problems: Mapping[str, tuple[str, ...]]) -> None:
        """Note targets that cannot be used beside the other servers, by source."""
        for name, task in self._tasks.items():
            task.note_conflicts(problems.get(name, ()))

    async def run(self) -> None:
        """Run the sources until cancelled."""
        for task in self._tasks.values():
            task.started = False
        async with trio.open_nursery() as nursery:
            while True:
                for task in self._tasks.values():
                    if not task.started:
                        task.started = True
                        nursery.start_soon(task.run, self._make)
                await self._wanted.wait()
                self._wanted = trio.Event()

    async def review(self, others: Callable[[], bool]) -> None:
        """Compare doubtful sets and priorities with the checks, until cancelled.

        Also ends the wait for sources that do not answer after the start, if there are servers
        without them; `others` returns whether the configuration file has any.
        """
        began = trio.current_time()
        while True:
            await trio.sleep(LOOK_PAUSE)
            now = trio.current_time()
            for task in list(self._tasks.values()):
                task.look_at_priorities()
                task.look_at_doubt(now)
            if now - began < START_PATIENCE or not (others() or any(self.found().values())):
                continue
            if [task for task in self._tasks.values() if task.stop_waiting()]:
                self._changed()


def _targets_for(task: SourceTask | None) -> Targets | None:
    """The targets in force of a source that has this task; none yet of a new source."""
    return () if task is None else task.intake.targets
