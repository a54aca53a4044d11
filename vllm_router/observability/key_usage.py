"""Usage of each client key in the last minutes. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

STEP = 10
"""Seconds by which the window advances."""

WINDOW = 300
"""Seconds over which usage is summed up."""


class Usage(NamedTuple):
    """Figures of one key.

    requests: finished ones, refused ones included.
    refused: by the router, for a limit, the queue or a model that the key must not use.
    tokens: prompt and completion, as far as servers report them in `usage`.
    """

    requests: int = 0
    refused: int = 0
    tokens: int = 0

    def plus(self, other: Usage) -> Usage:
        return Usage(*map(sum, zip(self, other, strict=True)))

    def minus(self, other: Usage) -> Usage:
        return Usage(*(max(0, one - less) for one, less in zip(self, other, strict=True)))


class KeyUsage:
    """Usage by name of the key, from totals that only rise.

    Only keys that were used in a step take memory for it.
    """

    def __init__(self) -> None:
        self._steps: deque[dict[str, Usage]] = deque(maxlen=WINDOW // STEP)
        self._before: dict[str, Usage] = {}

    def advance(self, totals: Mapping[str, Usage]) -> None:
        """Called every STEP seconds."""
        self._steps.append(self._since(totals))
        self._before = dict(totals)

    def recent(self, totals: Mapping[str, Usage]) -> dict[str, Usage]:
        """The usage of about WINDOW seconds, by key; only keys that were used."""
        found: dict[str, Usage] = {}
        for step in (*self._steps, self._since(totals)):
            for name, usage in step.items():
                found[name] = usage.plus(found.get(name, Usage()))
        return found

    def _since(self, totals: Mapping[str, Usage]) -> dict[str, Usage]:
        """Usage since the last step."""
        rises = ((name, now.minus(self._before.get(name, Usage()))) for name, now in totals.items())
        return {name: rise for name, rise in rises if any(rise)}
