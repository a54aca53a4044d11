"""At which sizes the kept end of a stream is cut, and what is read after that."""

from __future__ import annotations

import pytest

from support.scripted_server import DONE, event
from vllm_router.proxy.answers.ending import read_ending
from vllm_router.proxy.answers.opening import Verdict
from vllm_router.proxy.answers.tables import Api
from vllm_router.proxy.tail import KEPT, LONGEST_EVENT, TRIM_AT, StreamTail

HELLO = event("hello")


def test_stream_tail_is_not_cut_before_its_limit():
    tail = StreamTail()
    stream = HELLO * (TRIM_AT // len(HELLO))
    tail.add(stream.ljust(TRIM_AT, b"\n"))
    assert len(tail.bytes) == TRIM_AT
    tail.add(b"\n")
    assert KEPT <= len(tail.bytes) < 2 * KEPT


def test_stream_tail_trimmed_long_event_is_trimmed_again_at_twice_its_size():
    tail = StreamTail()
    tail.add(b"data: " + b"x" * TRIM_AT)
    kept = len(tail.bytes)
    assert kept == TRIM_AT + 6
    tail.add(b"\n\n" + HELLO * 100)
    assert len(tail.bytes) > kept
    tail.add(HELLO * 100)
    assert KEPT <= len(tail.bytes) < 2 * KEPT


def test_stream_tail_longest_event_is_whole_up_to_its_limit():
    for size, whole in ((LONGEST_EVENT, True), (LONGEST_EVENT + 1, False)):
        tail = StreamTail()
        tail.add(b"x" * size)
        assert (len(tail.bytes) == size) is whole
        if not whole:
            assert len(tail.bytes) == KEPT
            # The end of the cut event, then whole ones: the last is read again.
            tail.add(b"\n\n" + HELLO * 2000 + event("", "stop") + DONE)
            assert tail.read(Api.CHAT).verdict is not Verdict.UNFINISHED


@pytest.mark.parametrize("end", [b"", DONE])
def test_stream_tail_cut_event_is_forgotten_with_the_next_whole_one(end):
    long = event("y" * 2 * TRIM_AT, "stop") + end
    tail = StreamTail()
    tail.add(b"x" * (LONGEST_EVENT + 1))
    tail.add(b"\n\n" + long)
    assert tail.bytes == long
    assert tail.read(Api.CHAT) == read_ending(Api.CHAT, long)


def test_stream_tail_cut_event_is_not_read():
    """What is kept of it may look like an event."""
    inner = event("", "stop")
    tail = StreamTail()
    tail.add((b"x" * LONGEST_EVENT).ljust(LONGEST_EVENT + KEPT - len(inner), b"x") + inner)
    assert tail.read(Api.CHAT) == read_ending(Api.CHAT, tail.bytes, beginning=b"")
