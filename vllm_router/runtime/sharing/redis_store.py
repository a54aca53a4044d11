"""The store in Redis: a capped stream for batches, and a hash for drains.

A client of the Redis can write anything under these keys. So answers are bounded, see
`redis_connection.py`, and what is long is not converted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import trio

from vllm_router.routing.sharing.drains import MAX_RECORDS
from vllm_router.runtime.sharing.redis_errors import TooLong, words_of
from vllm_router.runtime.sharing.store import (
    ENTRIES_PER_TURN,
    EntryId,
    StoreError,
    TooMuchToRead,
    Turn,
)

if TYPE_CHECKING:
    from coredis import Redis

TIMEOUT = 1.0
"""Seconds for a connection or an answer; a store that takes longer counts as gone."""

MAX_ENTRIES = 10_000
"""Entries of the stream, give or take a hundred: eight routers write so many in four minutes."""

MAX_FIELDS = 16
"""Fields of an entry that are looked through; the entries of routers have one."""

LATEST_TIME = 2**53
"""Milliseconds beyond which the store's clock is nonsense."""

_FIELD = b"b"


class RedisStore:
    """A `Store`; the names of its keys contain the fleet's."""

    def __init__(self, redis: Redis[bytes], fleet: str) -> None:
        self._redis = redis
        self._log = f"vllm-router:{fleet}:log"
        self._drains = f"vllm-router:{fleet}:drains"

    async def role(self) -> bytes:
        """The role of the Redis: `master`, or `slave` for a replica. Raises StoreError."""
        try:
            answer = (await self._pipeline([(b"ROLE",)]))[0]
            return bytes(answer[0])
        except (TypeError, ValueError, LookupError):
            # This user must not send ROLE. A replica then refuses the first write.
            return b"master"

    async def turn(self, batch: bytes | None, drains: Mapping[str, bytes], after: EntryId) -> Turn:
        commands: list[tuple[Any, ...]] = [
            (b"TIME",),
            # All records of a map that is not too long; the first ones of a longer map.
            (b"HSCAN", self._drains, 0, b"COUNT", MAX_RECORDS + 1),
            (
                *(b"XREAD", b"COUNT", ENTRIES_PER_TURN),
                *(b"STREAMS", self._log, f"{after[0]}-{after[1]}"),
            ),
        ]
        if batch is not None:
            trim = (b"MAXLEN", b"~", MAX_ENTRIES)
            commands.append((b"XADD", self._log, *trim, b"*", _FIELD, batch))
        if drains:
            fields = [part for record in drains.items() for part in record]
            commands.append((b"HSET", self._drains, *fields))
        results = await self._pipeline(commands)
        for key, result in zip(("", self._drains, self._log), results, strict=False):
            if isinstance(result, Exception):
                raise StoreError(f"{key}: {words_of(result)}" if key else words_of(result))
        try:
            return _read(results, wrote=batch is not None)
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise StoreError(f"an unexpected response: {words_of(error)}") from None

    async def _pipeline(self, commands: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        """The answers to these commands, errors among them, as they come. Raises StoreError."""
        results: tuple[Any, ...] | None = None
        with trio.move_on_after(2 * TIMEOUT):
            try:
                async with self._redis.pipeline(transaction=False, raise_on_error=False) as queue:
                    for name, *arguments in commands:
                        queue.create_request(name, *arguments, callback=_as_it_is)
                results = queue.results
            except TooLong as error:
                raise TooMuchToRead(str(error)) from None
            except Exception as error:  # noqa: BLE001
                # Anything may come from the client library if the store answers nonsense.
                raise StoreError(words_of(error)) from None
        if results is None:
            raise StoreError(f"no answer in {2 * TIMEOUT:g} s")
        return results


def _as_it_is(response: Any, **_: Any) -> Any:
    return response


def _read(results: tuple[Any, ...], *, wrote: bool) -> Turn:
    """Check the answers. Raises StoreError, and other errors for answers of a wrong shape."""
    (seconds, micros), (_, drains), log, *writes = results
    now = int(seconds) * 1000 + int(micros) // 1000
    if not 0 < now < LATEST_TIME:
        raise ValueError(f"a clock at {now} ms")
    entries = [
        (_entry_id(identifier), _content(fields))
        for found in (log or {}).values()
        for identifier, fields in found[:ENTRIES_PER_TURN]
    ]
    written: EntryId | None = None
    problems = [words_of(result) for result in writes if isinstance(result, Exception)]
    if wrote and not isinstance(writes[0], Exception):
        written = _entry_id(writes[0])
    if problems and not problems[0].startswith("OOM"):
        # Such as READONLY from a Redis that is a replica now: connect again.
        raise StoreError(problems[0])
    return Turn(
        now=now,
        written=written,
        problem=problems[0] if problems else "",
        drains={bytes(key): bytes(value) for key, value in _pairs(drains, MAX_RECORDS)},
        entries=entries,
    )


def _content(fields: list[Any] | None) -> bytes:
    """The batch in an entry; empty in an entry of another program."""
    found = (bytes(value) for key, value in _pairs(fields or [], MAX_FIELDS) if key == _FIELD)
    return next(found, b"")


def _pairs(flat: list[Any], most: int) -> Iterator[tuple[Any, Any]]:
    """The first pairs of a list of keys and values in turn."""
    return zip(flat[: 2 * most : 2], flat[1 : 2 * most : 2], strict=True)


def _entry_id(text: bytes) -> EntryId:
    milliseconds, _, number = text.partition(b"-")
    return int(milliseconds), int(number)
