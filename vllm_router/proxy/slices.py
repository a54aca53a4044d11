"""Long computations in slices, so that other tasks run in between."""

from __future__ import annotations

from contextlib import closing
from typing import TypeVar

import trio

from vllm_router.steps import Steps

T = TypeVar("T")


async def in_slices(steps: Steps[T], turns: trio.Lock) -> T:
    """The result of a computation. Can be cancelled between two slices.

    Computations that share `turns` alternate: however many there are, one slice runs per turn of
    the event loop.
    """
    with closing(steps):
        while True:
            async with turns:
                try:
                    next(steps)
                except StopIteration as end:
                    result: T = end.value
                    return result
