"""The drains of a fleet: the only state of the shared store that must not be lost.

The store has a map from the URL of a server to a record of the last order of an operator. An order
is a record of its own, also to end a drain: a map that lacks a server says nothing about it, as
after the store was emptied, and the routers that know the record write it again.

A record has the time of its order on the store's clock: an order that was given while its router
did not reach the store is dropped if another router has had a later one meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import msgspec

MAX_RECORDS = 4096
MAX_RECORD_BYTES = 256
MAX_URL = 2048

LATER = 2.0
"""Seconds by which an order is later for sure: the store's clock is known up to a slow answer."""


class Order(msgspec.Struct, frozen=True, array_like=True):
    """An operator's order for one server.

    order: random: two orders with the same content are two records.
    at: milliseconds on the store's clock; 0 in records of older versions, and until it is written.
    """

    on: bool
    order: bytes
    at: int = 0


class _Unsent(NamedTuple):
    """`made_at` is the router's time of the order, in seconds; None for a record of the store."""

    record: Order
    made_at: float | None

    def dated(self, clock: float) -> Order:
        """The record as it is written; `clock` is added to a time to have it on the store's."""
        if self.made_at is None:
            return self.record
        return msgspec.structs.replace(self.record, at=max(0, round((self.made_at + clock) * 1000)))


_decoder = msgspec.msgpack.Decoder(Order)


class Drains:
    """The orders that this router knows, and the orders that the store does not have yet."""

    def __init__(self) -> None:
        self._known: dict[str, Order] = {}
        self._unsent: dict[str, _Unsent] = {}

    def order(self, url: str, order: bytes, now: float, *, on: bool) -> bytes:
        """An operator of this router drains a server or takes it back; `order` is random.

        Returns the identity of the order, see `records`.
        """
        record = self._known[url] = Order(on, order)
        self._unsent[url] = _Unsent(record, now)
        self._forget_oldest()
        return _identity(record)

    def unsent(self, clock: float) -> dict[str, bytes]:
        """The records to be written to the store, whose clock is ahead of ours by this."""
        return {
            url: msgspec.msgpack.encode(unsent.dated(clock)) for url, unsent in self._unsent.items()
        }

    def written(self, records: Mapping[str, bytes]) -> None:
        """The store has these records."""
        for url, content in records.items():
            unsent, record = self._unsent.get(url), _decoder.decode(content)
            if unsent is not None and unsent.record.order == record.order:
                self._known[url] = record
                del self._unsent[url]

    def read(self, stored: Mapping[bytes, bytes]) -> None:
        """Follow the map of the store; records that cannot be read are ignored."""
        found = dict(_readable(stored))
        for url, record in found.items():
            if url not in self._unsent:
                self._known[url] = record
        for url, record in list(self._known.items()):
            if url not in found:
                if record.on:
                    self._unsent.setdefault(url, _Unsent(record, None))
                elif url not in self._unsent:
                    del self._known[url]
        self._forget_oldest()

    def drop_outdated(self, stored: Mapping[bytes, bytes], clock: float, now: float) -> None:
        """Drop unsent orders for which the store has later ones, after an outage.

        Orders that are later than now are of a store's clock that was wrong: they do not count.
        """
        for url, record in _readable(stored):
            unsent = self._unsent.get(url)
            if unsent is None:
                continue
            later = record.at / 1000 - unsent.dated(clock).at / 1000
            if later > LATER and record.at / 1000 <= now + clock + LATER:
                del self._unsent[url]

    def _forget_oldest(self) -> None:
        """Keep MAX_RECORDS: the store may have other records each time."""
        for records in (self._known, self._unsent):
            for url in list(islice(records, max(0, len(records) - MAX_RECORDS))):
                del records[url]

    def records(self) -> Iterator[tuple[str, bytes, bool]]:
        """URL, identity of the order, and whether the server is drained, by the last orders."""
        for url, record in self._known.items():
            yield url, _identity(record), record.on


def _identity(record: Order) -> bytes:
    return bytes([record.on]) + record.order


def _readable(stored: Mapping[bytes, bytes]) -> Iterator[tuple[str, Order]]:
    for key, record in list(stored.items())[:MAX_RECORDS]:
        if len(key) > MAX_URL or len(record) > MAX_RECORD_BYTES:
            continue
        try:
            yield key.decode(), _decoder.decode(record)
        except (UnicodeDecodeError, msgspec.MsgspecError):
            continue
