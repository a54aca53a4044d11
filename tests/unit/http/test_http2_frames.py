"""Splitting of HTTP/2 input into pieces of few frames, and the allowance of control frames."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.http.hypercorn.allowance import Allowance
from vllm_router.http.hypercorn.h2_frames import FRAMES_PER_PIECE, PREFACE, FrameCutter

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING = 0, 1, 2, 3, 4, 6
GOAWAY, WINDOW_UPDATE, CONTINUATION = 7, 8, 9


def frame(kind: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + bytes(4) + payload


FRAMES = st.lists(
    st.tuples(st.integers(0, 12), st.binary(max_size=300), st.sampled_from([0, 1, 8])), max_size=120
)


@given(FRAMES, st.lists(st.integers(1, 400), min_size=1))
def test_cutter_any_split_keeps_bytes_and_counts(frames, sizes):
    stream = bytes(PREFACE) + b"".join(frame(*one) for one in frames)
    whole = FrameCutter().cut(stream)
    cutter, pieces, position, turn = FrameCutter(), [], 0, 0
    while position < len(stream):
        size = sizes[turn % len(sizes)]
        pieces += cutter.cut(stream[position : position + size])
        position, turn = position + size, turn + 1
    for found in (whole, pieces):
        assert b"".join(piece.data for piece in found) == stream
        updates = sum(kind == WINDOW_UPDATE for kind, _, _ in frames)
        assert sum(piece.updates for piece in found) == updates
    assert sum(p.overhead for p in whole) == sum(p.overhead for p in pieces)
    assert len(whole) <= len(frames) // FRAMES_PER_PIECE + 1


@pytest.mark.parametrize(
    ("one", "overhead"),
    [
        (frame(DATA, b"a"), 0),
        (frame(DATA), 1),
        (frame(DATA, bytes(100), flags=8), 1),
        (frame(DATA, bytes(1000), flags=8), 0),
        (frame(HEADERS, b"a"), 0),
        (frame(RST_STREAM, bytes(4)), 0),
        (frame(PRIORITY, bytes(5)), 1),
        (frame(SETTINGS), 1),
        (frame(PING, bytes(8)), 1),
        (frame(GOAWAY, bytes(8)), 1),
        (frame(CONTINUATION), 1),
        (frame(77), 1),
    ],
)
def test_cutter_counts_frames_outside_requests(one, overhead):
    (piece,) = FrameCutter().cut(bytes(PREFACE) + one)
    assert (piece.overhead, piece.updates) == (overhead, 0)


def test_cutter_overlong_frame_is_detected_by_head():
    for length, overlong in [(16384, False), (16385, True), (0xFFFFFF, True)]:
        head = length.to_bytes(3, "big") + bytes(6)
        pieces = FrameCutter().cut(bytes(PREFACE) + frame(SETTINGS) + head)
        assert [piece.overlong for piece in pieces] == [overlong]


def test_cutter_large_frames_stay_whole():
    data = bytes(PREFACE) + frame(DATA, bytes(16000)) * 3
    assert [len(piece.data) for piece in FrameCutter().cut(data)] == [len(data)]


def test_allowance_refills_with_time_up_to_the_burst():
    allowance = Allowance(now=10.0, burst=100, per_second=20.0)
    assert all(allowance.take(now=10.0) for _ in range(100))
    assert not allowance.take(now=10.0)
    assert allowance.take(now=10.075)
    assert not allowance.take(now=10.075)
    assert allowance.take(now=1e6, count=100)
    assert not allowance.take(now=1e6)


def test_allowance_earned_counts_on_top():
    allowance = Allowance(now=0.0, burst=10, per_second=1.0)
    assert allowance.take(now=0.0, count=10)
    allowance.earn(5)
    assert allowance.take(now=0.0, count=5)
    assert not allowance.take(now=0.0)
