"""Orders to drain servers, which routers keep for each other in a store that may lose them."""

from __future__ import annotations

import msgspec
import pytest

from vllm_router.routing.sharing.drains import MAX_RECORD_BYTES, MAX_RECORDS, MAX_URL, Drains

A, B = "http://a.test:1", "http://b.test:1"


def stored(drains: Drains) -> dict[bytes, bytes]:
    """A store that has all records of these drains."""
    return {url.encode(): record for url, record, _ in drains.records()}


def orders(drains: Drains) -> dict[str, bool]:
    return {url: on for url, _, on in drains.records()}


def test_drains_order_is_unsent_until_the_store_has_it():
    drains = Drains()
    record = drains.order(A, b"1", on=True)
    assert drains.unsent() == {A: record}
    assert list(drains.records()) == [(A, record, True)]
    drains.written({A: record, B: b"of another router"})
    assert drains.unsent() == {}
    assert orders(drains) == {A: True}


def test_drains_newer_order_stays_unsent_when_the_older_one_is_written():
    drains = Drains()
    first = drains.order(A, b"1", on=True)
    second = drains.order(A, b"2", on=False)
    drains.written({A: first})
    assert drains.unsent() == {A: second}


def test_drains_same_order_again_is_another_record():
    assert Drains().order(A, b"1", on=True) != Drains().order(A, b"2", on=True)


def test_drains_follow_the_store_but_not_over_an_unsent_order():
    other = Drains()
    other.order(A, b"1", on=True)
    other.order(B, b"2", on=True)
    drains = Drains()
    mine = drains.order(B, b"3", on=False)
    drains.read(stored(other))
    assert orders(drains) == {A: True, B: False}
    assert drains.unsent() == {B: mine}
    drains.written({B: mine})
    drains.read(stored(other))
    assert orders(drains) == {A: True, B: True}


def test_drains_lost_by_the_store_are_written_again_and_ends_of_drains_forgotten():
    other = Drains()
    record = other.order(A, b"1", on=True)
    other.order(B, b"2", on=False)
    drains = Drains()
    drains.read(stored(other))
    drains.read({})
    assert orders(drains) == {A: True}
    assert drains.unsent() == {A: record}


def test_drains_unsent_end_of_a_drain_outlives_an_empty_store():
    drains = Drains()
    record = drains.order(A, b"1", on=False)
    drains.read({})
    assert drains.unsent() == {A: record}
    assert orders(drains) == {A: False}


def test_drains_unsent_orders_are_bounded_and_the_oldest_is_dropped():
    drains = Drains()
    for number in range(MAX_RECORDS + 1):
        drains.order(f"http://{number}", b"1", on=True)
    unsent = drains.unsent()
    assert len(unsent) == MAX_RECORDS
    assert "http://0" not in unsent
    assert "http://1" in unsent


RECORD = msgspec.msgpack.encode([True, b"1"])
LONG = msgspec.msgpack.encode([True, b"x" * MAX_RECORD_BYTES])


@pytest.mark.parametrize(
    ("key", "record", "read"),
    [
        (A.encode(), RECORD, True),
        (b"u" * MAX_URL, RECORD, True),
        (b"u" * (MAX_URL + 1), RECORD, False),
        (A.encode(), msgspec.msgpack.encode([True, b"x" * (MAX_RECORD_BYTES - 4)]), True),
        (A.encode(), LONG, False),
        (b"\xff", RECORD, False),
        (A.encode(), b"\xc1", False),
        (A.encode(), msgspec.msgpack.encode(["yes", b"1"]), False),
    ],
)
def test_drains_unreadable_records_of_the_store_are_ignored(key: bytes, record: bytes, read: bool):
    drains = Drains()
    drains.read({key: record, B.encode(): RECORD})
    assert len(orders(drains)) == (2 if read else 1)
    assert orders(drains)[B]


def test_drains_of_a_store_with_other_records_each_time_are_bounded():
    drains = Drains()
    for turn in range(3):
        drains.read({f"http://{turn}-{n}".encode(): RECORD for n in range(MAX_RECORDS)})
        assert len(orders(drains)) == MAX_RECORDS
        assert len(drains.unsent()) <= MAX_RECORDS
    assert "http://2-0" in orders(drains)
