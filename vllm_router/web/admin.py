"""Administration: drain, undrain, reload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trio

from vllm_router.config.reload import Reload
from vllm_router.errors import Refused
from vllm_router.fleet.server import Server
from vllm_router.observability.key_usage import WINDOW, Usage
from vllm_router.observability.slices import each
from vllm_router.steps import Steps
from vllm_router.web.router import Router
from vllm_router.web.status import encoded, reload_state, state_of

SHOWN_KEYS = 20
"""Keys in `/admin/keys`."""


def server_view(server: Server, router: Router) -> dict[str, Any]:
    """One server as `/admin/servers` shows it; `in_flight` falls to 0 during a drain."""
    return {
        **state_of(server, router, trio.current_time()),
        "leaving": router.fleet.servers.get(server.name) is not server,
        "running": server.running,
        "waiting": server.waiting,
        "capacity": server.capacity,
        "capacity_source": server.capacity_estimate.source,
        "load": server.load,
        "models": list(server.models) if server.models is not None else None,
    }


def servers_view(router: Router) -> Steps[dict[str, Any]]:
    """`/admin/servers`."""
    servers = router.fleet.all_servers()
    return {"servers": (yield from each(servers, lambda one: encoded(server_view(one, router))))}


def keys_view(usage: Mapping[str, Usage]) -> dict[str, Any]:
    """`/admin/keys`: the keys with the most requests, and how many more were used."""
    order = sorted(usage.items(), key=lambda one: (-one[1].requests, one[0]))
    return {
        "seconds": WINDOW,
        "keys": [{"name": name, **used._asdict()} for name, used in order[:SHOWN_KEYS]],
        "more": max(0, len(order) - SHOWN_KEYS),
    }


def find(router: Router, name: str) -> Server:
    """The server with this name, including servers that are being removed. Raises Refused."""
    for server in router.fleet.all_servers():
        if server.name == name:
            return server
    known = ", ".join(router.fleet.servers)
    raise Refused(
        404,
        "server_not_found",
        f"There is no server {name!r}. There are: {known}.",
        values={"server": name, "known": known},
    )


def drain(router: Router, name: str, *, on: bool) -> dict[str, Any]:
    """Drain a server or take it back. Idempotent."""
    server = router.drain_server(name, on)
    if server is None:
        leaving = find(router, name)
        if not on:
            raise Refused(
                409,
                "server_leaving",
                f"{name} is no longer in the configuration: put it back.",
                values={"server": name},
            )
        server = leaving
    return server_view(server, router)


async def reload(router: Router) -> dict[str, Any]:
    """Read the configuration file now. Raises Refused with the problems found in it."""
    if router.reloader is None:
        raise Refused(
            409, "no_config_file", "The servers came from the command line: nothing to reload."
        )
    result = await router.reload()
    if result is Reload.REFUSED:
        problems = router.reloader.last_error or "refused, see the log"
        raise Refused(422, "config_refused", problems, values={"problem": problems})
    return {"result": result.value, **reload_state(router)}
