"""Put together the shared state of a router of one process; the leader of workers has its own."""

from __future__ import annotations

import platform
from collections.abc import Callable
from hashlib import blake2b

import msgspec
import trio

from vllm_router import __version__
from vllm_router.config.auth import KeyConfig
from vllm_router.config.schema import Config
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State, Transition
from vllm_router.observability.router_state import RouterState
from vllm_router.routing.sharing.messages import About, ServerLevel
from vllm_router.routing.sharing.outbox import Outbox, summed_levels
from vllm_router.routing.sharing.scrapes import SharedScrapes
from vllm_router.runtime.sharing.effects import RouterEffects
from vllm_router.runtime.sharing.process import ProcessShare
from vllm_router.runtime.sharing.redis_connector import RedisConnector
from vllm_router.runtime.sharing.store import OpenStore
from vllm_router.runtime.sharing.task import SharedState

OWN_SETTINGS = {"admin_listen": None}
"""Settings in which the routers of a fleet may differ."""


def configuration_digest(config: Config) -> str:
    """Equal for routers with equal configurations; secrets and found servers do not count."""
    servers = sorted(repr(server) for server in config.servers if server.source is None)
    settings = msgspec.structs.replace(config.settings, **OWN_SETTINGS)
    keys = config.auth.keys if config.auth is not None else ()
    parts = (servers, settings, config.models, config.limits, keys, config.discovery)
    return blake2b(repr(parts).encode("utf-8", "replace"), digest_size=6).hexdigest()


class _DigestOfLast:
    """`configuration_digest`, computed once for each configuration: 10 ms for 1000 servers."""

    def __init__(self) -> None:
        self._last: tuple[Config, str] | None = None

    def of(self, config: Config) -> str:
        if self._last is None or self._last[0] is not config:
            self._last = config, configuration_digest(config)
        return self._last[1]


def key_finder(router: RouterState) -> Callable[[str], KeyConfig | None]:
    """Finds an API key of the configuration in force by its name."""

    def find(name: str) -> KeyConfig | None:
        auth = router.config.auth
        if auth is None:
            return None
        return next((key for key in auth.keys if key.name == name), None)

    return find


CheckSoon = Callable[[Server], None]
"""Checks the health of a server without waiting for its interval."""


def router_effects(
    router: RouterState, check_soon: CheckSoon, scrapes: SharedScrapes
) -> RouterEffects:
    """The effects of other routers on a process that probes the servers."""
    return RouterEffects(router.proxy.context, key_finder(router), check_soon, scrapes)


def share_alone(
    router: RouterState,
    check_soon: CheckSoon,
    scrapes: SharedScrapes,
    open_store: OpenStore | None = None,
) -> SharedState:
    """The shared state of a router of one process."""
    context = router.proxy.context
    share = ProcessShare(context, "router", router_effects(router, check_soon, scrapes))
    context.owners.on_new = share.outbox.owner
    return share_through(router, share, share.outbox, scrapes, open_store or RedisConnector().open)


def share_through(
    router: RouterState,
    share: ProcessShare,
    outbox: Outbox,
    scrapes: SharedScrapes,
    open_store: OpenStore,
) -> SharedState:
    """The shared state of the router, of which `share` is this process's part."""
    fleet = router.fleet

    def ejected(change: Transition) -> None:
        server = fleet.servers.get(change.server)
        if change.new is State.EJECTED and server is not None:
            outbox.ejected(server.url)

    digest = _DigestOfLast()

    def about() -> About:
        config = router.config
        name = config.shared.name if config.shared is not None else None
        return About(
            name=name or platform.node()[:100],
            software=__version__,
            configuration=digest.of(config),
            age=trio.current_time() - router.started_at,
            served=sum(server.served for server in fleet.all_servers()),
        )

    def levels() -> dict[str, ServerLevel]:
        fleet.refresh_leases()
        queued = summed_levels((share.levels(), share.peers.siblings(trio.current_time())))
        found = {
            server.url: ServerLevel(0.0, server.in_flight)
            for server in fleet.all_servers()
            if server.in_flight
        }
        for url, level in queued.items():
            have = found.get(url)
            found[url] = ServerLevel(level.queued, have.in_flight if have else 0, level.adapters)
        scrapes.look({url: level.in_flight for url, level in found.items()}, trio.current_time())
        return found

    fleet.on_transition.append(ejected)
    return SharedState(
        fleet,
        router.proxy.context.key_limits,
        share.peers,
        share.settle,
        outbox,
        about,
        levels,
        scrapes,
        open_store,
    )
