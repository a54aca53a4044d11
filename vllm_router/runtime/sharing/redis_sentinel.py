"""Asks the sentinels of `[shared]` which Redis is the primary."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import product
from typing import Any

import trio

from vllm_router.config.shared import StoreAddress
from vllm_router.runtime.sharing.redis_errors import words_of
from vllm_router.runtime.sharing.redis_store import TIMEOUT
from vllm_router.runtime.sharing.store import StoreError

Place = tuple[str, int]
"""Host and port."""


async def find_primary(address: StoreAddress, judge: Callable[[Place], Awaitable[str]]) -> Place:
    """The Redis that may be written to. Raises StoreError.

    `judge` says why a Redis cannot be the primary; empty if it is. A sentinel that was cut off
    from the others names the old one, which is gone or a replica: the next sentinel is asked then.
    """
    assert address.service is not None
    problems: list[str] = []
    judged: set[Place] = set()
    # A sentinel without a password refuses one, so it is asked without first.
    access: list[dict[str, Any]] = [{}]
    if address.password is not None:
        access.append({"username": address.user, "password": address.password})
    for (host, port), credentials in product(address.hosts, access):
        found = await _ask(address.service, host, port, credentials, problems)
        if found is None or found in judged:
            continue
        judged.add(found)
        problem = await judge(found)
        if not problem:
            return found
        problems.append(problem)
    names = ", ".join(dict.fromkeys(problems)) or "no answer"
    raise StoreError(f"no sentinel names a Redis called {address.service}: {names}")


async def _ask(
    service: str, host: str, port: int, credentials: dict[str, Any], problems: list[str]
) -> Place | None:
    from coredis import Sentinel
    from coredis.connection import TCPLocation
    from coredis.retry import NoRetryPolicy

    options = {"stream_timeout": TIMEOUT, "connect_timeout": TIMEOUT, "verify_version": False}
    found: Place | None = None
    with trio.move_on_after(2 * TIMEOUT):
        async with Sentinel(
            [TCPLocation(host, port)],
            sentinel_kwargs=options | credentials,
            retry_policy=NoRetryPolicy(),
        ) as sentinels:
            try:
                # The library's `discover_primary` hides why a sentinel does not answer.
                place: Any = await sentinels.sentinels[0].sentinel_get_master_addr_by_name(service)
                if place:
                    name, number = place
                    found = (name.decode() if isinstance(name, bytes) else name), int(number)
                else:
                    problems.append(f"{host}:{port} does not know it")
            except Exception as error:  # noqa: BLE001  the next sentinel may know better
                problems.append(words_of(error))
    return found
