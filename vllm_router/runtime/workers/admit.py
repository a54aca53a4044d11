"""Servers that other processes make free, for requests that wait here."""

from __future__ import annotations

import trio

from vllm_router.proxy.handler import Proxy
from vllm_router.runtime.workers.bells import Bells

LOOK_EVERY = 0.01
"""Seconds between two looks at the other processes while requests wait here; they ring before."""

IDLE_LOOK_EVERY = 0.05
"""The same while no request waits here, so that there is never much to catch up with."""


async def admit(proxy: Proxy, bells: Bells) -> None:
    """Give requests that wait here the servers that other processes have made free."""
    while True:
        gate = proxy.gate
        pause = LOOK_EVERY if gate is not None and gate.holds_waiters else IDLE_LOOK_EVERY
        with trio.move_on_after(pause):
            await bells.wait()
        gate = proxy.gate
        if gate is not None:
            proxy.fleet.look()
            gate.woken(trio.current_time())
