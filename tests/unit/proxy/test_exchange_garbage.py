"""Requests that are refused or fail leave no cycle of references behind.

A refused request that waits for the garbage collector keeps its body, of a megabyte perhaps, in
memory; overload refuses many of them.
"""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from support.fleet_makers import go_down
from support.proxy_harness import Client, Rig, lab
from support.scripted_server import Talk, answering, ok, silent
from vllm_router.errors import Refused
from vllm_router.proxy.attempt import Attempt
from vllm_router.proxy.attempt_history import AttemptHistory
from vllm_router.proxy.exchange import Exchange
from vllm_router.proxy.request import Request
from vllm_router.proxy.waiter import Waiter

LIMITS = {"max_in_flight": 1, "queue_size": 1, "queue_timeout": 2.0, "client_priority": True}


async def full(rig: Rig) -> None:
    assert (await rig.post()).status == 429


async def late(rig: Rig) -> None:
    assert (await rig.post()).status == 503


async def displaced(rig: Rig) -> None:
    first = rig.start(headers=[(b"x-vllm-priority", b"-1")])
    await wait_all_tasks_blocked()
    first.leave()
    await wait_all_tasks_blocked()


async def unknown(rig: Rig) -> None:
    assert (await rig.post({"model": "none"})).status == 404


async def without_server(rig: Rig) -> None:
    assert (await rig.post()).status == 503


async def busy(rig: Rig) -> list[Client]:
    clients = [rig.start()]
    await wait_all_tasks_blocked()
    return clients


async def busy_with_queue(rig: Rig) -> list[Client]:
    return await busy(rig) + await busy(rig)


async def down(rig: Rig) -> list[Client]:
    go_down(rig.server("a"), trio.current_time())
    return []


async def ready(rig: Rig) -> list[Client]:
    """The fleet as it is."""
    return []


async def closes(talk: Talk) -> None:
    await talk.request()


async def lost(rig: Rig) -> None:
    assert (await rig.post()).status == 502


async def left_by(rig: Rig, action: Callable[[Rig], Awaitable[None]]) -> set[type]:
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        await action(rig)
        gc.collect()
        return {type(thing) for thing in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(
    ("before", "action", "script"),
    [
        (busy_with_queue, full, silent),
        (busy_with_queue, displaced, silent),
        (busy, late, silent),
        (ready, unknown, answering(ok(b"{}"))),
        (down, without_server, answering(ok(b"{}"))),
        (ready, lost, closes),
    ],
    ids=["full", "displaced", "late", "unknown", "down", "lost"],
)
async def test_refused_request_leaves_no_garbage(autojump_clock, before, action, script, watched):
    async with lab(script, limits=LIMITS, watched=watched) as rig:
        others = await before(rig)
        left = await left_by(rig, action)
        for client in others:
            client.leave()
        await rig.settled()
        assert not left & {Attempt, AttemptHistory, Exchange, Refused, Request, Waiter}
