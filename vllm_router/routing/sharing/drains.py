"""The drains of a fleet: the only state of the shared store that must not be lost.

The store has a map from the URL of a server to a record of the last order of an operator. An order
is a record of its own, also to end a drain: a map that lacks a server says nothing about it, as
after the store was emptied, and the routers that know the record write it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import msgspec

MAX_RECORDS = 4096
MAX_RECORD_BYTES = 256
MAX_URL = 2048


class _Record(msgspec.Struct, frozen=True, array_like=True):
    """`order` is random: two orders with the same content are two records."""

    on: bool
    order: bytes


_decoder = msgspec.msgpack.Decoder(_Record)


class Drains:
    """The orders that this router knows, and the orders that the store does not have yet."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[bytes, bool]] = {}
        self._unsent: dict[str, bytes] = {}

    def order(self, url: str, order: bytes, *, on: bool) -> bytes:
        """An operator of this router drains a server or takes it back; `order` is random.

        Returns the record.
        """
        record = msgspec.msgpack.encode(_Record(on, order))
        self._known[url] = self._unsent[url], _ = record, on
        self._forget_oldest()
        return record

    def unsent(self) -> dict[str, bytes]:
        """The records to be written to the store."""
        return dict(self._unsent)

    def written(self, records: Mapping[str, bytes]) -> None:
        """The store has these records."""
        for url, record in records.items():
            if self._unsent.get(url) == record:
                del self._unsent[url]

    def read(self, stored: Mapping[bytes, bytes]) -> None:
        """Follow the map of the store; records that cannot be read are ignored."""
        found = dict(_readable(stored))
        for url, (record, on) in found.items():
            if url not in self._unsent:
                self._known[url] = record, on
        for url, (record, on) in list(self._known.items()):
            if url not in found:
                if on:
                    self._unsent.setdefault(url, record)
                elif url not in self._unsent:
                    del self._known[url]
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        """Keep MAX_RECORDS: the store may have other records each time."""
        for records in (self._known, self._unsent):
            for url in list(islice(records, max(0, len(records) - MAX_RECORDS))):
                del records[url]

    def records(self) -> Iterator[tuple[str, bytes, bool]]:
        """URL, record, and whether the server is drained, by the last order for each server."""
        for url, (record, on) in self._known.items():
            yield url, record, on


def _readable(stored: Mapping[bytes, bytes]) -> Iterator[tuple[str, tuple[bytes, bool]]]:
    for key, record in list(stored.items())[:MAX_RECORDS]:
        if len(key) > MAX_URL or len(record) > MAX_RECORD_BYTES:
            continue
        try:
            yield key.decode(), (record, _decoder.decode(record).on)
        except (UnicodeDecodeError, msgspec.MsgspecError):
            continue
