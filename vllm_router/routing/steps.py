"""Long work in slices: a generator that stops after each slice and returns its result at the end.

Pure code cannot wait, so it only says where it may be interrupted. The caller decides what happens
in between: `finish` goes on at once, `proxy.slices` lets other tasks run.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")

Steps: TypeAlias = Generator[None, None, T]
"""No slice may take more than about 5 ms, whatever the input."""


def finish(steps: Steps[T]) -> T:
    """Do all the work now: for short inputs, and where no other task waits."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
