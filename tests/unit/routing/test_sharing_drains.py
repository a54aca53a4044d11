"""Orders to drain servers, which routers keep for each other in a store that may lose them."""

from __future__ import annotations

import msgspec
import pytest

from vllm_router.routing.sharing.drains import MAX_RECORD_BYTES, MAX_RECORDS, MAX_URL, Drains

A, B = "http://a.test:1", "http://b.test:1"
CLOCK = 1_700_000_000.0
"""Seconds by which the store's clock is ahead of the routers'."""


def ordered(**servers: bool) -> dict[bytes, bytes]:
    """A store with orders of another router, for the servers called a and b."""
    other = Drains()
    for name, on in servers.items():
        other.order(f"http://{name}.test:1", name.encode(), 10.0, on=on)
    return {url.encode(): record for url, record in other.unsent(CLOCK).items()}


def orders(drains: Drains) -> dict[str, bool]:
    return {url: on for url, _, on in drains.records()}


def unsent(drains: Drains) -> dict[str, bool]:
    return {url: msgspec.msgpack.decode(one)[0] for url, one in drains.unsent(CLOCK).items()}


def test_drains_order_is_unsent_until_the_store_has_it():
    drains = Drains()
    identity = drains.order(A, b"1", 10.0, on=True)
    sent = drains.unsent(CLOCK)
    assert [msgspec.msgpack.decode(one) for one in sent.values()] == [
        [True, b"1", 1_700_000_010_000]
    ]
    assert list(drains.records()) == [(A, identity, True)]
    drains.written(sent)
    assert drains.unsent(CLOCK) == {}
    drains.read({A.encode(): sent[A]})
    assert list(drains.records()) == [(A, identity, True)]


def test_drains_newer_order_stays_unsent_when_the_older_one_is_written():
    drains = Drains()
    drains.order(A, b"1", 10.0, on=True)
    first = drains.unsent(CLOCK)
    drains.order(A, b"2", 10.0, on=False)
    drains.written(first)
    assert unsent(drains) == {A: False}


def test_drains_same_order_again_is_another_record():
    assert Drains().order(A, b"1", 1.0, on=True) != Drains().order(A, b"2", 1.0, on=True)


def test_drains_follow_the_store_but_not_over_an_unsent_order():
    drains = Drains()
    drains.order(B, b"3", 10.0, on=False)
    drains.read(ordered(a=True, b=True))
    assert orders(drains) == {A: True, B: False}
    assert unsent(drains) == {B: False}
    drains.written(drains.unsent(CLOCK))
    drains.read(ordered(a=True, b=True))
    assert orders(drains) == {A: True, B: True}


@pytest.mark.parametrize(
    ("made_at", "stored_at", "dropped"),
    [
        (10.0, 60.0, True),
        (10.0, 11.0, False),  # as good as at the same time
        (60.0, 10.0, False),
        (10.0, 3600.0, False),  # by a clock that was wrong
    ],
)
def test_drains_unsent_order_is_dropped_for_a_later_one(
    made_at: float, stored_at: float, dropped: bool
):
    drains, other = Drains(), Drains()
    drains.order(A, b"1", made_at, on=True)
    other.order(A, b"2", stored_at, on=False)
    stored = {url.encode(): record for url, record in other.unsent(CLOCK).items()}
    drains.drop_outdated(stored, CLOCK, 100.0)
    drains.read(stored)
    assert orders(drains) == {A: not dropped}
    assert unsent(drains) == ({} if dropped else {A: True})


def test_drains_unsent_order_outlives_records_without_a_time():
    drains = Drains()
    drains.order(A, b"1", 10.0, on=False)
    drains.drop_outdated({A.encode(): RECORD}, CLOCK, 100.0)
    assert unsent(drains) == {A: False}


def test_drains_lost_by_the_store_are_written_again_and_ends_of_drains_forgotten():
    stored = ordered(a=True, b=False)
    drains = Drains()
    drains.read(stored)
    drains.read({})
    assert orders(drains) == {A: True}
    assert drains.unsent(CLOCK + 5) == {A: stored[A.encode()]}


def test_drains_unsent_end_of_a_drain_outlives_an_empty_store():
    drains = Drains()
    drains.order(A, b"1", 10.0, on=False)
    drains.read({})
    assert unsent(drains) == {A: False}
    assert orders(drains) == {A: False}


def test_drains_unsent_orders_are_bounded_and_the_oldest_is_dropped():
    drains = Drains()
    for number in range(MAX_RECORDS + 1):
        drains.order(f"http://{number}", b"1", 10.0, on=True)
    left = unsent(drains)
    assert len(left) == MAX_RECORDS
    assert "http://0" not in left
    assert "http://1" in left


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
        assert len(drains.unsent(CLOCK)) <= MAX_RECORDS
    assert "http://2-0" in orders(drains)
