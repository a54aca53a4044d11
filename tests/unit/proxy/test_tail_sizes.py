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


def long_event(name: str, end: bytes) -> bytes:
    """An event of /v1/responses of which exactly `end` is kept, with the line end behind it."""
    beginning = b'event: %b\ndata: {"type":"%b","text":"' % (name.encode(), name.encode())
    return beginning.ljust(LONGEST_EVENT, b"x") + end.ljust(KEPT - 2, b"y") + b"\n\n"


@pytest.mark.parametrize("end", [b"y", b":", b": ", b"\n: "])
@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("response.completed", Verdict.PROVEN),
        ("response.cancelled", Verdict.CUT),
        ("response.output_text.delta", Verdict.UNFINISHED),
    ],
)
def test_stream_tail_cut_event_is_judged_by_its_name_wherever_it_is_cut(name, verdict, end):
    tail = StreamTail()
    tail.add(long_event(name, end))
    assert tail.bytes.startswith(end)
    assert tail.read(Api.RESPONSES).verdict is verdict


@pytest.mark.parametrize("boundary", [b"\n\n", b"\r\n\r\n"])
@pytest.mark.parametrize("within", range(5))
def test_stream_tail_event_behind_a_cut_boundary_is_read(boundary, within):
    """The cut may fall before, into or behind the boundary of two events."""
    last = b'event: response.completed\ndata: {"type":"response.completed"}'
    last = last.ljust(KEPT - 2 - min(within, len(boundary)), b" ") + b"\n\n"
    tail = StreamTail()
    tail.add(b"data: ".ljust(LONGEST_EVENT, b"x") + boundary + last)
    assert tail.read(Api.RESPONSES).verdict is Verdict.PROVEN
