"""Reading a large fleet in slices, between which other tasks run.

Reading a thousand servers for a page takes some 20 ms of CPU time, in which the router would
forward nothing. Three rules keep a page true all the same. A server is read once, in one slice, and
totals are sums over what was read. The page lists the servers that existed at its beginning. A
configuration that comes into force meanwhile starts the page again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TypeVar

import trio

from vllm_router.fleet.fleet import Fleet
from vllm_router.steps import Steps

SERVERS_AT_ONCE = 12
"""Servers that are read in one slice: 0.3 ms on the machine of docs/performance.md."""

VIEWS_AT_ONCE = 5
"""Servers whose views for the feed, the most that is read of a server, are made in one slice."""

TRIES = 3
"""Times that a page is begun while new configurations come into force in quick succession. The last
page has the servers of its beginning."""

T = TypeVar("T")
R = TypeVar("R")


def each(
    items: Sequence[T], read: Callable[[T], R], at_once: int = SERVERS_AT_ONCE
) -> Steps[list[R]]:
    """`[read(item) for item in items]` in slices. A few items take no step."""
    found: list[R] = []
    for begin in range(0, len(items), at_once):
        if begin:
            yield
        found += [read(item) for item in items[begin : begin + at_once]]
    return found


async def in_turns(steps: Steps[T]) -> T:
    """The result of the steps; other tasks run after each. Can be cancelled between two of them."""
    with closing(steps):
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            await trio.lowlevel.checkpoint()


async def of_one_fleet(fleet: Fleet, steps: Callable[[], Steps[T]]) -> T:
    """The result of steps that read the fleet, started again if the set of servers has changed."""
    tries = 0
    while True:
        tries += 1
        servers = fleet.servers
        found = await in_turns(steps())
        if fleet.servers is servers or tries == TRIES:  # each configuration has its own object
            return found
