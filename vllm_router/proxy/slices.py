"""Long work of pure code, done in slices between which the other tasks run."""

from __future__ import annotations

from contextlib import closing
from typing import TypeVar

import trio

from vllm_router.routing.prompt.steps import Steps

T = TypeVar("T")


async def in_slices(steps: Steps[T], turns: trio.Lock) -> T:
    """The result of the work. May be cancelled between two slices.

    Works that share `turns` take them one after the other, so that the loop does one slice in a
    turn of its own, however many there are.
    """
    with closing(steps):
        while True:
            async with turns:
                try:
                    next(steps)
                except StopIteration as end:
                    result: T = end.value
                    return result
