"""The interface of a source, and what is known of each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from vllm_router.config.discovery import Found, TargetState

SHOWN_PROBLEMS = 10
"""Bad targets of a source that are listed; the rest are only counted."""


class Sink(Protocol):
    """Takes what a source has found. All methods return at once."""

    def found(self, targets: Collection[Found], problems: Sequence[str] = ()) -> None:
        """A complete set of targets; `problems` has a line for each part that was left out."""

    def confirmed(self) -> None:
        """The source has said that its last set is still right."""

    def failed(self, problem: str) -> None:
        """The source could not be read; its last set stays in force."""


class Again:
    """Asks a source to look again, before its next look is due."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def __call__(self) -> None:
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        """Wait until it is called, at most `seconds`; True if it was."""
        with trio.move_on_after(seconds):
            await self._event.wait()
        if not self._event.is_set():
            return False
        self._event = trio.Event()
        return True


class Source(Protocol):
    """A place that names servers."""

    async def run(self, sink: Sink, again: Again) -> None:
        """Follow the place until cancelled. Never raises for what is wrong outside the router."""


@dataclass(slots=True)
class SourceStatus:
    """A source, for metrics, `/health`, feed and log. Times are of Trio's clock, in seconds.

    place: where it looks, without secrets.
    answered_at: when it last confirmed its set; None before its first answer.
    problem: why its last look failed; None while it answers.
    doubt: why targets that its last set lacks stay in force; empty if none do. doubt_values: as
        `Intake` has them.
    skipped: lines about bad targets, at most SHOWN_PROBLEMS; skipped_total counts all.
    states: the targets of its last set by state.
    """

    name: str
    kind: str
    place: str
    answered_at: float | None = None
    failing_since: float | None = None
    problem: str | None = None
    doubt: str = ""
    doubt_values: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    skipped_total: int = 0
    states: dict[TargetState, int] = field(default_factory=dict)
    answers: int = 0
    failures: int = 0

    def age(self, now: float) -> float | None:
        """Seconds since the source last confirmed its set."""
        return now - self.answered_at if self.answered_at is not None else None
