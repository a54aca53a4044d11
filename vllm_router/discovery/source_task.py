"""One running source: its task, its targets, and what is known of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import msgspec
import trio

from vllm_router.config.discovered import Read, read_targets
from vllm_router.config.discovery import (
    DiscoveryConfig,
    Found,
    SourceConfig,
    Targets,
    TargetState,
)
from vllm_router.discovery.intake import Answers, Intake
from vllm_router.discovery.kinds import kind_and_place
from vllm_router.discovery.news import News, news
from vllm_router.discovery.priorities import up_to, used_priority
from vllm_router.discovery.source import SHOWN_PROBLEMS, Again, Source, SourceStatus

logger = logging.getLogger(__name__)

RESTART_PAUSE = 1.0
"""Seconds before a source that failed by a bug is started again."""

MakeSource = Callable[[SourceConfig], Source]


class SourceTask:
    """Runs a source and takes its sets; implements `Sink`.

    `discovery` has what is common to all sources. `targets` are in force already, None if there are
    none yet. `changed` is called when the targets in force have changed, `announce` with news for
    operators.
    """

    def __init__(
        self,
        config: SourceConfig,
        discovery: DiscoveryConfig,
        targets: Targets | None,
        answers: Answers,
        changed: Callable[[], None],
        announce: Callable[[News], None],
    ) -> None:
        self.config = config
        self.intake = Intake(targets, discovery.keep_for, discovery.second_look)
        self.status = SourceStatus(config.name, *kind_and_place(config))
        self.again = Again()
        self.started = False
        self._discovery = discovery
        self._answers = answers
        self._changed = changed
        self._announce = announce
        self._scope = trio.CancelScope()
        self._asked_for: float | None = None
        self._said: Targets = ()
        self._found: tuple[Found, ...] = ()
        self._read = Read((), ())
        self._priority: int | None = None
        self._bad: tuple[str, ...] = ()
        self._conflicts: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<SourceTask {self.config.name}>"

    async def run(self, make: MakeSource) -> None:
        """Run the source until `stop`."""
        with self._scope:
            while True:
                try:
                    await make(self.config).run(self, self.again)
                except Exception as error:
                    # A bug in one source must not end the others; the traceback is in the log.
                    logger.exception("source %s failed", self.config.name)
                    self.failed(f"internal error {type(error).__name__} (see the log)")
                await trio.sleep(RESTART_PAUSE)

    def has_settings_of(self, config: SourceConfig) -> bool:
        """Whether this is the same source, perhaps with another name."""
        return msgspec.structs.replace(self.config, name=config.name) == config

    def stop(self) -> None:
        self._scope.cancel(reason="source removed or changed")

    def follow(self, discovery: DiscoveryConfig) -> None:
        """Apply new patience to a source that has not changed itself."""
        self._discovery = discovery
        self.intake.keep_for = discovery.keep_for
        self.intake.second_look = discovery.second_look

    def stop_waiting(self) -> bool:
        """Do without the first set; returns whether it was missing."""
        if self.intake.targets is not None:
            return False
        self.intake.targets = ()
        return True

    # -- Sink ---------------------------------------------------------------------------------

    def found(self, targets: Collection[Found], problems: Sequence[str] = ()) -> None:
        # Most sources say the same at every look, and a thousand targets take 30 ms of the loop.
        # Other `label_keys` make a new task.
        if (found := tuple(targets)) != self._found:
            self._found, self._read = found, read_targets(found, self.config, self._discovery)
        valid, bad = self._read
        self._note_bad((*problems, *bad))
        self._said = valid
        self._answered()
        self._offer(self._in_use())

    def confirmed(self) -> None:
        self._answered()
        if self.intake.doubt and self.intake.offered is not None:
            self._offer(self.intake.offered)

    def failed(self, problem: str) -> None:
        status = self.status
        status.failures += 1
        if status.failing_since is None:
            status.failing_since = trio.current_time()
            self._tell("source_failed", problem=problem)
        status.problem = problem

    def _answered(self) -> None:
        status = self.status
        status.answered_at = trio.current_time()
        status.answers += 1
        if status.failing_since is not None:
            self._tell("source_answers", level=logging.INFO)
        status.problem = status.failing_since = None

    def _tell(self, code: str, *, level: int = logging.WARNING, **values: object) -> None:
        """Log news of the source, and announce it to operators."""
        item = news(code, source=self.status.name, **values)
        logger.log(level, "%s", item.text)
        self._announce(item)

    # -- targets that are left out -------------------------------------------------------------

    def note_conflicts(self, problems: tuple[str, ...]) -> None:
        """Targets of the set in force that cannot be used beside the other servers."""
        self._conflicts = problems
        self._show_skipped()

    def _note_bad(self, problems: tuple[str, ...]) -> None:
        self._bad = problems
        self._show_skipped()

    def _show_skipped(self) -> None:
        status = self.status
        problems = (*self._bad, *self._conflicts)
        shown = problems[:SHOWN_PROBLEMS]
        if problems and shown != status.skipped:
            if len(problems) > 1:
                self._tell("source_left_out_more", problem=problems[0], n=len(problems) - 1)
            else:
                self._tell("source_left_out", problem=problems[0])
        status.skipped, status.skipped_total = shown, len(problems)

    # -- priorities ---------------------------------------------------------------------------

    def look_at_priorities(self) -> None:
        """Use servers of a lower or higher priority if the checks have changed."""
        if any(target.priority != self._said[0].priority for target in self._said):
            targets = self._in_use()
            if targets != self.intake.offered:
                self._offer(targets)

    def _in_use(self) -> Targets:
        """The last set, with the state DRAIN for servers whose priority is not used."""
        priority = used_priority(self._said, self._answers)
        if self._said:
            before, self._priority = self._priority, priority
            if before is not None and priority != before:
                self._tell("source_priority", now=priority, before=before)
        shown = up_to(self._said, priority, TargetState.WAIT)
        self.status.states = dict(Counter(target.state for target in shown))
        return up_to(self._said, priority, TargetState.DRAIN)

    # -- doubt --------------------------------------------------------------------------------

    def look_at_doubt(self, now: float) -> None:
        """Compare a doubtful set with the checks; ask the source again when it is time."""
        due = self.intake.look_due
        if due is None:
            self._asked_for = None
            return
        self._note_intake(changed=self.intake.reconsider(now, self._answers))
        due = self.intake.look_due
        if due is not None and now >= due and self._asked_for != due:
            self._asked_for = due
            self.again()

    def _offer(self, targets: Targets) -> None:
        changed = self.intake.offer(targets, trio.current_time(), self._answers)
        self._note_intake(changed=changed)

    def _note_intake(self, *, changed: bool) -> None:
        doubt, values = self.intake.doubt, self.intake.doubt_values
        if doubt and not self.status.doubt:
            self._tell("source_doubt", doubt=doubt, named=values["named"], kept=values["kept"])
        self.status.doubt, self.status.doubt_values = doubt, values
        if changed:
            self._changed()
