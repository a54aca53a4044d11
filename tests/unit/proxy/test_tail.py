"""The kept end of a response: bounded for any length, and enough to read its end."""

from __future__ import annotations

import tracemalloc

import pytest

from support.scripted_server import DONE, event
from vllm_router.proxy.answers.events import block_start
from vllm_router.proxy.answers.opening import Verdict
from vllm_router.proxy.answers.tables import Api
from vllm_router.proxy.tail import KEPT, LONGEST_EVENT, TRIM_AT, PlainTail, StreamTail

HELLO = event("hello")


@pytest.mark.parametrize("size", [1, 100, 4096, 65536])
def test_stream_tail_long_stream_keeps_bounded_end(size):
    tail = StreamTail()
    stream = HELLO * (4_000_000 // len(HELLO) if size > 1 else 300)
    most = 0
    for number, start in enumerate(range(0, len(stream), size)):
        tail.add(stream[start : start + size])
        if number % 16 == 0:
            most = max(most, sum(map(len, tail._pieces)))
    assert most <= TRIM_AT + 16 * size
    kept = tail.bytes
    assert stream.endswith(kept)
    assert KEPT <= len(kept) <= TRIM_AT + size


def test_stream_tail_endless_event_keeps_bounded_end():
    tail = StreamTail()
    piece = b"x" * 65536
    tail.add(b"data: ")
    most = 0
    for _ in range(100):
        tail.add(piece)
        most = max(most, sum(map(len, tail._pieces)))
    assert most <= 2 * LONGEST_EVENT + 2 * len(piece)


def test_stream_tail_long_stream_frees_its_memory():
    tail = StreamTail()
    tracemalloc.start()
    try:
        for _ in range(2000):
            tail.add(bytearray(10_000))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 4 * LONGEST_EVENT


@pytest.mark.parametrize("last", [b"", event("", "stop") + DONE])
def test_stream_tail_after_trimming_reads_the_end(last):
    tail = StreamTail()
    for _ in range(1000):
        tail.add(HELLO)
    tail.add(last)
    verdict = tail.read(Api.CHAT).verdict
    assert (verdict is Verdict.UNFINISHED) == (not last)


def test_stream_tail_last_event_of_half_a_megabyte_is_kept_whole():
    tail = StreamTail()
    long = b"data: " + b"x" * (LONGEST_EVENT // 2) + b"\n\n"
    tail.add(HELLO * 1000)
    for start in range(0, len(long), 1000):
        tail.add(long[start : start + 1000])
    assert tail.bytes.endswith(long)


def test_json_tail_keeps_little_of_last_piece():
    tail = PlainTail(json=False, has_length=True)
    for _ in range(100):
        tail.add(b"x" * 65536)
    assert len(tail.bytes) == KEPT


@pytest.mark.parametrize("json", [True, False])
def test_plain_tail_reads_token_counts_of_json_only(json):
    tail = PlainTail(json=json, has_length=True)
    tail.add(b'{"usage": {"prompt_tokens": 3, "completion_tokens": 4}}')
    assert (tail.read(Api.OTHER).usage is not None) == json


@pytest.mark.parametrize("boundary", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_block_start_is_behind_the_last_boundary_wherever_that_is(boundary):
    assert block_start(boundary + b"data: x", 8) == len(boundary)
    assert block_start(b"data: x" + boundary + b"data: y", 16) == 7 + len(boundary)
    assert block_start(b"data: x", 7) == 0


@pytest.mark.parametrize(("body", "whole"), [(b'{"a": [1, 2]}', True), (b'{"a": [1, 2]', False)])
@pytest.mark.parametrize("has_length", [True, False])
def test_json_tail_early_end_is_unfinished_only_without_length(body, whole, has_length):
    tail = PlainTail(json=True, has_length=has_length)
    for byte in body:
        tail.add(bytes([byte]))
    unfinished = tail.read(Api.OTHER).verdict is Verdict.UNFINISHED
    assert unfinished == (not has_length and not whole)
