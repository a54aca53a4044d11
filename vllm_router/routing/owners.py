"""The servers of stored responses of the Responses API. Pure.

vLLM keeps stored responses in the memory of one process, and their ids do not name it: the router
notes the id of each answer. Ids are kept as digests, so that long ones take no more memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import NamedTuple

KEPT = 1 << 16
"""Responses that are remembered at least; at most twice as many. One takes about 150 bytes."""

LONGEST_ID = 512
"""Characters of an id; vLLM's have 37. Longer ones are not looked up."""


class Owner(NamedTuple):
    """`url` of the server; `key` is the name of the client's key, empty without one."""

    url: str
    key: str


Entry = tuple[bytes, str, str]
"""The digest of an id, and the fields of its owner; sent between processes."""


class Owners:
    """Owners by id, in two generations: the older one is dropped when the newer one is full. O(1).

    `on_new` is called with entries from answers to this process, not from other processes.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self.on_new: Callable[[Entry], None] | None = None
        self._kept = kept
        self._newer: dict[bytes, Owner] = {}
        self._older: dict[bytes, Owner] = {}
        self._equal: dict[Owner, Owner] = {}

    def __len__(self) -> int:
        return len(self._newer) + len(self._older)

    def remember(self, identifier: str, url: str, key: str) -> None:
        """A server has answered with this id. The last answer counts."""
        digest = _digest(identifier)
        self._add(digest, Owner(url, key))
        if self.on_new is not None:
            self.on_new((digest, url, key))

    def take(self, entry: Entry) -> None:
        """Take over an entry of another process.

        An entry without a key, of a process that has found the server by asking, keeps a known key.
        """
        digest, url, key = entry
        if not key:
            known = self._newer.get(digest) or self._older.get(digest)
            if known is not None and known.url == url:
                key = known.key
        self._add(digest, Owner(url, key))

    def find(self, identifier: str) -> Owner | None:
        """The owner of a response; None if it is not known. Keeps an entry that is used."""
        digest = _digest(identifier)
        owner = self._newer.get(digest)
        if owner is None:
            owner = self._older.get(digest)
            if owner is not None:
                self._add(digest, owner)
        return owner

    def entries(self) -> Iterator[Entry]:
        """All entries, older ones first."""
        for known in (self._older, self._newer):
            for digest, (url, key) in known.items():
                yield digest, url, key

    def _add(self, digest: bytes, owner: Owner) -> None:
        self._older.pop(digest, None)
        self._newer[digest] = self._equal.setdefault(owner, owner)
        if len(self._newer) >= self._kept:
            self._older, self._newer, self._equal = self._newer, {}, {}


def _digest(identifier: str) -> bytes:
    return blake2b(identifier.encode("utf-8", "surrogatepass"), digest_size=16).digest()
