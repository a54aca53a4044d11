"""Servers that other processes make free, for those who wait here."""

from __future__ import annotations

import trio

from vllm_router.proxy.proxy import Proxy

LOOK_EVERY = 0.01
"""Seconds between two looks at the other processes' leases while somebody waits."""


async def admit(proxy: Proxy) -> None:
    """Let those in who wait for a server that another process has made free."""
    while True:
        gate = proxy.gate
        if gate is None or not gate.waiting:
            await trio.sleep(LOOK_EVERY * 5)
            continue
        await trio.sleep(LOOK_EVERY)
        proxy.fleet.look()
        gate.look(trio.current_time())
