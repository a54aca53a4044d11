"""Connects to the Redis of `[shared]`: TLS, passwords, and sentinels that name the primary.

Written for coredis 6.9, which runs on Trio. It is an extra, imported only when `[shared]` is
configured. Needs Redis 6 or later, or a server with the same protocol (RESP3).
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

import trio

from vllm_router.config.shared import MISSING, SharedConfig
from vllm_router.http.client.tls_context import verifying_context
from vllm_router.runtime.sharing.redis_errors import words_of
from vllm_router.runtime.sharing.redis_sentinel import find_primary
from vllm_router.runtime.sharing.redis_store import TIMEOUT, RedisStore
from vllm_router.runtime.sharing.store import Store, StoreError

if TYPE_CHECKING:
    from coredis import Redis

CONTEXT_FOR = 60.0
"""Seconds for which a TLS context is used for new connections: the authorities may change."""


class RedisConnector:
    """Connects to the Redis of a configuration, again and again while it is gone."""

    def __init__(self) -> None:
        self._context: tuple[SharedConfig, float, ssl.SSLContext] | None = None

    async def open(self, config: SharedConfig, use: Callable[[Store], Awaitable[None]]) -> None:
        """Connect and call `use` with the store. An `OpenStore`. Raises StoreError."""
        try:
            # 0.3 s of work, which would delay requests on the event loop's thread.
            await trio.to_thread.run_sync(import_module, f"{__package__}.redis_connection")
        except ImportError:
            raise StoreError(MISSING) from None
        # A failed connection is reported here; the library would log it with a traceback, too.
        logging.getLogger("coredis").setLevel(logging.CRITICAL)
        context = await self._context_of(config)
        if config.address.service is None:
            place = config.address.hosts[0]
        else:
            place = await find_primary(config.address, partial(_is_primary, config, context))
        await _using(_client(config, context, place), use, config.fleet)

    async def _context_of(self, config: SharedConfig) -> ssl.SSLContext | None:
        """The TLS context of this configuration; reading the system's authorities takes 80 ms."""
        if not config.address.tls:
            return None
        now = trio.current_time()
        if self._context is not None:
            made_for, made_at, context = self._context
            if made_for is config and now - made_at <= CONTEXT_FOR:
                return context
        context = await trio.to_thread.run_sync(_new_context, config)
        self._context = config, now, context
        return context


def _new_context(config: SharedConfig) -> ssl.SSLContext:
    try:
        return verifying_context(config.ca.path if config.ca is not None else None)
    except (OSError, ValueError) as error:
        raise StoreError(f"shared.ca cannot be used: {error}") from None


def _client(
    config: SharedConfig, context: ssl.SSLContext | None, place: tuple[str, int]
) -> Redis[bytes]:
    import coredis
    from coredis.connection import TCPLocation
    from coredis.pool import ConnectionPool
    from coredis.retry import NoRetryPolicy

    from vllm_router.runtime.sharing.redis_connection import BoundedConnection

    address = config.address
    return coredis.Redis(
        connection_pool=ConnectionPool(
            connection_class=BoundedConnection,
            location=TCPLocation(*place),
            max_connections=2,
            db=address.database,
            username=address.user,
            password=address.password,
            ssl_context=context,
            stream_timeout=TIMEOUT,
            connect_timeout=TIMEOUT,
            client_name="vllm-router",
            decode_responses=False,
        ),
        verify_version=False,
        retry_policy=NoRetryPolicy(),
    )


async def _using(client: Redis[bytes], use: Callable[[Store], Awaitable[None]], fleet: str) -> None:
    ours: Exception | None = None
    try:
        async with client as redis:
            try:
                await use(RedisStore(redis, fleet))
            except Exception as error:  # noqa: BLE001  kept: the client's nursery would wrap it
                ours = error
    except Exception as error:  # noqa: BLE001
        # Its background tasks fail in ways of their own when the connection breaks.
        if ours is None:
            raise StoreError(words_of(error)) from None
    if ours is not None:
        raise ours


async def _is_primary(
    config: SharedConfig, context: ssl.SSLContext | None, place: tuple[str, int]
) -> str:
    """Why the Redis at this place cannot be used as the primary; empty if it can."""
    role = b"master"

    async def ask(store: Store) -> None:
        nonlocal role
        assert isinstance(store, RedisStore)
        role = await store.role()

    with trio.move_on_after(2 * TIMEOUT) as scope:
        try:
            await _using(_client(config, context, place), ask, config.fleet)
        except StoreError as error:
            return str(error)
    host, port = place
    if scope.cancelled_caught:
        return f"no answer from {host}:{port}"
    return "" if role == b"master" else f"{host}:{port} is a replica"
