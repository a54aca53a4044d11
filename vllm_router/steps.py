"""Long computations in slices: a generator that yields after each slice and returns the result.

Pure code cannot await, so it only marks where it may be interrupted. The caller decides what
happens in between: `finish` continues at once, `proxy.slices` lets other tasks run.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Sequence
from typing import TypeAlias, TypeVar

T = TypeVar("T")

Steps: TypeAlias = Generator[None, None, T]
"""No slice may take more than about 5 ms, whatever the input."""


def finish(steps: Steps[T]) -> T:
    """Run all slices now: for short inputs, and without other tasks."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def in_one_slice(steps: Steps[T]) -> T | None:
    """The result, None if it takes more than one slice: the rest is given up."""
    try:
        next(steps)
    except StopIteration as end:
        result: T = end.value
        return result
    steps.close()
    return None


WORK_PER_SLICE = 1 << 20
"""Units of work between two interruptions. A unit is one byte that is read a few times: 1 ns."""


class Work:
    """The rest of the work of a slice, shared by the generators of one computation.

    They subtract from `left`, and yield and set it to WORK_PER_SLICE once it is negative.
    """

    left = WORK_PER_SLICE


COPIED_AT_ONCE = 1 << 20
"""Bytes copied per slice: at most 1 ms into new memory."""


def joined(pieces: Sequence[bytes | memoryview]) -> Steps[bytes]:
    """`b"".join(pieces)` in slices: 64 MB take 20 ms."""
    # Allocated at once and written in place, so that nothing is moved while it grows.
    whole = io.BytesIO(bytes(sum(map(len, pieces))))
    for piece in pieces:
        view = memoryview(piece)
        for place in range(0, len(view), COPIED_AT_ONCE):
            whole.write(view[place : place + COPIED_AT_ONCE])
            yield
    return whole.getvalue()
