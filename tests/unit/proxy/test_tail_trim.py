"""Where the kept end of a stream is cut."""

from __future__ import annotations

from support.scripted_server import event
from vllm_router.proxy.answers.opening import Verdict
from vllm_router.proxy.answers.tables import Api
from vllm_router.proxy.tail import KEPT, LONGEST_EVENT, TRIM_AT, StreamTail

HELLO = event("hello")


def test_stream_tail_trimmed_never_keeps_less_than_two_kilobytes():
    tail = StreamTail()
    total = 0
    for _ in range(2000):
        tail.add(HELLO)
        total += len(HELLO)
        assert sum(map(len, tail._pieces)) >= min(total, KEPT)
    assert KEPT == 2048


def test_stream_tail_huge_piece_of_whole_events_is_cut_between_two():
    tail = StreamTail()
    tail.add(HELLO * (2 * LONGEST_EVENT // len(HELLO)))
    assert tail.bytes.startswith(b"data: ")
    assert len(tail.bytes) < 2 * KEPT


def test_stream_tail_half_event_stays_unread_until_its_end():
    """What is left of an event that was too long is not taken for an event of its own."""
    tail = StreamTail()
    tail.add(b"data: " + b"x" * (LONGEST_EVENT + 1))
    tail.add(b"x" * TRIM_AT)
    tail.add(b"\n\n" + HELLO)
    assert tail.read(Api.CHAT).verdict is Verdict.UNFINISHED


def test_stream_tail_trimmed_half_event_is_still_half():
    """Its end may look like an event of its own."""
    tail = StreamTail()
    tail.add(b"data: " + b"x" * (LONGEST_EVENT + 1))
    tail.add(b"x" * TRIM_AT + b"\n" + event("", "stop").rstrip())
    tail.add(b"\n\n")
    assert tail.read(Api.CHAT).verdict is Verdict.UNFINISHED
