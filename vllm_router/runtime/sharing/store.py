"""The store between routers, as the task needs it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, Protocol, TypeAlias

from vllm_router.config.shared import SharedConfig

EntryId: TypeAlias = tuple[int, int]
"""Milliseconds of the store's clock, and a number. Entries of a log have increasing ids."""

BEGINNING: EntryId = (0, 0)

LATEST: EntryId = (2**64 - 1, 2**64 - 1)
"""After the last entry that a log can have."""

ENTRIES_PER_TURN = 100
"""Entries that one turn reads at most."""


class StoreError(Exception):
    """The store cannot be used now; the text is for operators."""


class TooMuchToRead(StoreError):
    """The answer is too long: an entry after the requested id was not written by a router."""


class Turn(NamedTuple):
    """The result of one turn.

    now: the store's clock, in milliseconds.
    written: the id of the new entry; None if the store refused to write.
    problem: why it refused; empty otherwise.
    drains: the map of the drains.
    entries: id and content of the entries after the id that was asked for, the oldest first.
    """

    now: int
    written: EntryId | None
    problem: str
    drains: Mapping[bytes, bytes]
    entries: list[tuple[EntryId, bytes]]


class Store(Protocol):
    """A log of batches and a map of drains that several routers share."""

    async def turn(self, batch: bytes | None, drains: Mapping[str, bytes], after: EntryId) -> Turn:
        """Append a batch, set records of drains, and read; one round trip. Raises StoreError."""


OpenStore: TypeAlias = Callable[[SharedConfig, Callable[[Store], Awaitable[None]]], Awaitable[None]]
"""Connects, and calls the function with the store until it raises. Raises StoreError."""
