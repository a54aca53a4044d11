"""The store in Redis: a capped stream for batches, and a hash for drains.

Written for coredis 6.9, which runs on Trio. It is an extra, imported only when `[shared]` is
configured. Needs Redis 6 or later, or a server with the same protocol (RESP3).
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from importlib import import_module
from itertools import product
from typing import TYPE_CHECKING, Any

import trio

from vllm_router.config.shared import MISSING, SharedConfig, StoreAddress
from vllm_router.runtime.sharing.store import ENTRIES_PER_TURN, EntryId, Store, StoreError, Turn

if TYPE_CHECKING:
    from coredis import Redis

TIMEOUT = 1.0
"""Seconds for a connection or an answer; a store that takes longer counts as gone."""

MAX_ENTRIES = 10_000
"""Entries of the stream, give or take a hundred: eight routers write so many in four minutes."""

MAX_TEXT = 200
"""Characters of an error of the store that are shown."""

_FIELD = b"b"


async def open_redis(config: SharedConfig, use: Callable[[Store], Awaitable[None]]) -> None:
    """Connect to the Redis and call `use` with it. An `OpenStore`. Raises StoreError."""
    try:
        # 0.3 s of work, which would delay requests on the event loop's thread.
        await trio.to_thread.run_sync(import_module, "coredis")
    except ImportError:
        raise StoreError(MISSING) from None
    import coredis
    from coredis.retry import NoRetryPolicy

    # A failed connection is reported here; the library would log it with a traceback, too.
    logging.getLogger("coredis").setLevel(logging.CRITICAL)
    address = config.address
    host, port = address.hosts[0]
    if address.service is not None:
        host, port = await _primary(address)
    context = _context(config) if address.tls else None
    ours: Exception | None = None
    client = coredis.Redis(
        host=host,
        port=port,
        db=address.database,
        username=address.user,
        password=address.password,
        ssl_context=context,
        stream_timeout=TIMEOUT,
        connect_timeout=TIMEOUT,
        max_connections=2,
        client_name="vllm-router",
        verify_version=False,
        decode_responses=False,
        retry_policy=NoRetryPolicy(),
    )
    try:
        async with client as redis:
            try:
                await use(RedisStore(redis, config.fleet))
            except Exception as error:  # noqa: BLE001  kept: the client's nursery would wrap it
                ours = error
    except Exception as error:  # noqa: BLE001
        # Its background tasks fail in ways of their own when the connection breaks.
        if ours is None:
            raise StoreError(_words(error)) from None
    if ours is not None:
        raise ours


def _context(config: SharedConfig) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=config.ca.path if config.ca is not None else None)
    except (OSError, ValueError) as error:
        raise StoreError(f"shared.ca cannot be used: {error}") from None


async def _primary(address: StoreAddress) -> tuple[str, int]:
    """Ask the sentinels for the Redis that may be written to. Raises StoreError."""
    from coredis import Sentinel
    from coredis.connection import TCPLocation
    from coredis.retry import NoRetryPolicy

    assert address.service is not None
    problems = []
    options = {"stream_timeout": TIMEOUT, "connect_timeout": TIMEOUT, "verify_version": False}
    # A sentinel without a password refuses one, so it is asked without first.
    access: list[dict[str, Any]] = [{}]
    if address.password is not None:
        access.append({"username": address.user, "password": address.password})
    for (host, port), credentials in product(address.hosts, access):
        found: tuple[str, int] | None = None
        with trio.move_on_after(2 * TIMEOUT):
            async with Sentinel(
                [TCPLocation(host, port)],
                sentinel_kwargs=options | credentials,
                retry_policy=NoRetryPolicy(),
            ) as sentinels:
                try:
                    found = await sentinels.discover_primary(address.service)
                except Exception as error:  # noqa: BLE001  the next sentinel may know better
                    problems.append(_words(error))
        if found is not None:
            return found
    names = ", ".join(dict.fromkeys(problems)) or "no answer"
    raise StoreError(f"no sentinel names a Redis called {address.service}: {names}")


class RedisStore:
    """A `Store`; the names of its keys contain the fleet's."""

    def __init__(self, redis: Redis[bytes], fleet: str) -> None:
        self._redis = redis
        self._log = f"vllm-router:{fleet}:log"
        self._drains = f"vllm-router:{fleet}:drains"

    async def turn(self, batch: bytes | None, drains: Mapping[str, bytes], after: EntryId) -> Turn:
        from coredis.tokens import PureToken

        results: tuple[Any, ...] | None = None
        with trio.move_on_after(2 * TIMEOUT):
            try:
                async with self._redis.pipeline(transaction=False, raise_on_error=False) as queue:
                    # The library's `time` has lost the microseconds (6.9.0).
                    queue.create_request(b"TIME", callback=_as_it_is)
                    queue.hgetall(self._drains)
                    queue.xread({self._log: f"{after[0]}-{after[1]}"}, count=ENTRIES_PER_TURN)
                    if batch is not None:
                        queue.xadd(
                            self._log,
                            {_FIELD: batch},
                            trim_strategy=PureToken.MAXLEN,
                            trim_operator=PureToken.APPROXIMATELY,
                            threshold=MAX_ENTRIES,
                        )
                    if drains:
                        queue.hset(self._drains, dict(drains))
                results = queue.results
            except Exception as error:  # noqa: BLE001
                # Anything may come from the client library if the store answers nonsense.
                raise StoreError(_words(error)) from None
        if results is None:
            raise StoreError(f"no answer in {2 * TIMEOUT:g} s")
        try:
            return _read(results, wrote=batch is not None)
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise StoreError(f"an unexpected response: {_words(error)}") from None


def _as_it_is(response: Any, **_: Any) -> Any:
    return response


def _read(results: tuple[Any, ...], *, wrote: bool) -> Turn:
    """Check the answers. Raises StoreError, and other errors for answers of a wrong shape."""
    time, drains, log, *writes = results
    for result in (time, drains, log):
        if isinstance(result, Exception):
            raise StoreError(_words(result))
    seconds, micros = time
    entries = []
    for found in (log or {}).values():
        for entry in found:
            content = entry.field_values.get(_FIELD)
            # An entry without the field is of another program; it is passed over.
            entries.append((_entry_id(entry.identifier), bytes(content or b"")))
    written: EntryId | None = None
    problems = [_words(result) for result in writes if isinstance(result, Exception)]
    if wrote and not isinstance(writes[0], Exception):
        written = _entry_id(writes[0])
    if problems and not problems[0].startswith("OOM"):
        # Such as READONLY from a Redis that is a replica now: connect again.
        raise StoreError(problems[0])
    return Turn(
        now=int(seconds) * 1000 + int(micros) // 1000,
        written=written,
        problem=problems[0] if problems else "",
        drains={bytes(key): bytes(value) for key, value in drains.items()},
        entries=entries,
    )


def _entry_id(text: bytes) -> EntryId:
    milliseconds, _, number = text.partition(b"-")
    return int(milliseconds), int(number)


def _words(error: BaseException) -> str:
    """What went wrong, on one short line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.strerror:
        text = f"{text}: {cause.strerror}"
    return "".join(char if char.isprintable() else "?" for char in text)[:MAX_TEXT]
