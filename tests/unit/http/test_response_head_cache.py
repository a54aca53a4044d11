"""Repeated response heads are not parsed again, and give the same result as parsing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import trio
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.errors import ConnectionLost
from vllm_router.http.client.connection import Connection
from vllm_router.http.head_cache import (
    LARGE_READ_SIZE,
    MAX_KNOWN_RESPONSES,
    KnownResponses,
    ResponseCache,
)
from vllm_router.http.io.async_socket import READ_SIZE

HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Fri, 27 Nov 2026 03:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-length: %d\r\ncontent-type: application/json\r\n\r\n"
)


class Scripted:
    """A transport that returns the given bytes, one read at a time, and then the end."""

    can_stream = False

    def __init__(self, reads: list[bytes]) -> None:
        self.reads = list(reads)

    async def read(self, until: float = math.inf, size: int = 0) -> bytes:
        return self.reads.pop(0) if self.reads else b""

    def write_nowait(self, head: bytes, body: bytes) -> bool:
        return True

    async def write(self, head: bytes, body: bytes) -> bool:
        return True

    def interrupt(self) -> bool:
        return False

    async def stream_into(self, take: Callable[[bytes], bool]) -> None:
        raise AssertionError

    def is_alive(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing to close."""


async def answer_of(connection: Connection) -> Any:
    """Every observable property of one response."""
    connection.send_nowait(b"GET / HTTP/1.1\r\n\r\n", b"")
    try:
        answer = await connection.read_head()
        body = b""
        while piece := await connection.read_body():
            body += piece
    except ConnectionLost as error:
        return type(error), connection.reusable
    head = answer.status, answer.headers, answer.content_length, answer.chunked
    return *head, body, connection.reusable


def parsed(reads: list[bytes], known: ResponseCache | None) -> Any:
    return trio.run(answer_of, Connection(Scripted(reads), known))


def knowing(*answers: bytes) -> ResponseCache:
    known = ResponseCache()
    for answer in answers:
        parsed([answer], known)
    return known


def test_response_head_cache_same_head_with_any_length_matches():
    known = knowing(HEAD % 5 + b"hello")
    for body in (b"hello", b"", b"other", b"x" * 70_000):
        data = HEAD % len(body) + body
        assert known.match(data) is not None
        assert parsed([data], known) == parsed([data], None)


def test_response_head_cache_headers_of_earlier_response_stay_unchanged():
    known = knowing(HEAD % 5 + b"hello")
    first, _ = known.match(HEAD % 2 + b"hi")
    known.match(HEAD % 3 + b"you")
    assert (b"content-length", b"2") in first.headers


def test_response_head_cache_other_difference_is_parsed():
    known = knowing(HEAD % 5 + b"hello")
    for data in (
        HEAD.replace(b"03:00:00", b"03:00:01") % 5 + b"hello",
        HEAD.replace(b"200 OK", b"500 No") % 5 + b"hello",
        HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") % 5 + b"hello",
        HEAD % 5 + b"hell",
        HEAD % 5 + b"hello" + HEAD % 0,
        (HEAD % 5)[:-2],
        HEAD.replace(b"%d", b"+5") + b"hello",
        HEAD.replace(b"%d", b"") + b"",
        b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD % 5 + b"hello",
        b"",
    ):
        assert known.match(data) is None
        assert parsed([data], known) == parsed([data], None)


def test_response_head_cache_only_whole_keep_alive_responses_are_remembered():
    for answer in (
        HEAD.replace(b"server", b"connection: close\r\nserver") % 5 + b"hello",
        HEAD.replace(b"content-length: %d", b"transfer-encoding: chunked") + b"0\r\n\r\n",
        HEAD.replace(b"content-length: %d\r\n", b"") + b"to the end",
        HEAD % 5 + b"hello" + b"junk",
        b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD % 5 + b"hello",
        b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n",
    ):
        known = knowing(answer)
        assert known.match(answer) is None, answer
        assert known.match(HEAD % 5 + b"hello") is None


def test_response_head_cache_unknown_head_continues_connection():
    known = knowing(HEAD % 2 + b"ok")
    strange = HEAD.replace(b"uvicorn", b"other") % 3 + b"yes"
    connection = Connection(Scripted([HEAD % 2 + b"ok", strange, HEAD % 4 + b"half"]), known)

    async def all_of_it() -> list[Any]:
        return [await answer_of(connection) for _ in range(3)]

    bodies = [answer[-2] for answer in trio.run(all_of_it)]
    assert bodies == [b"ok", b"yes", b"half"]


def test_response_head_of_another_server_is_not_parsed():
    others = KnownResponses()
    first, second = ResponseCache(others), ResponseCache(others)
    data = HEAD % 5 + b"hello"
    parsed([data], first)
    head, body = second.match(HEAD % 2 + b"hi")
    assert (head.status, head.content_length, body) == (200, 2, b"hi")
    assert head.memo is first.match(data)[0].memo
    assert parsed([data], second) == parsed([data], None)


def test_response_head_of_one_server_stays_when_another_sends_its_own():
    others = KnownResponses()
    first, second = ResponseCache(others), ResponseCache(others)
    data, later = HEAD % 5 + b"hello", HEAD.replace(b"03:00:00", b"03:00:01") % 5 + b"later"
    parsed([data], first)
    assert second.match(data) is not None
    parsed([later], second)
    assert first.match(data)[1] == b"hello"
    assert second.match(later)[1] == first.match(later)[1] == b"later"


def test_response_heads_of_other_servers_are_bounded():
    others = KnownResponses()
    answers = [
        HEAD.replace(b"03:00:00", b"%08d" % second) % 1 + b"x"
        for second in range(MAX_KNOWN_RESPONSES + 1)
    ]
    for data in answers:
        parsed([data], ResponseCache(others))
    assert ResponseCache(others).match(answers[0]) is None
    assert ResponseCache(others).match(answers[1]) is not None
    long = HEAD.replace(b"uvicorn", b"x" * 5000) % 1 + b"x"
    parsed([long], ResponseCache(others))
    assert ResponseCache(others).match(long) is None


PARTS = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.0 200 OK\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"content-length: 3\r\n",
        b"Content-Length:3 \r\n",
        b"content-length: 12\r\n",
        b"content-length: 3, 3\r\n",
        b"transfer-encoding: chunked\r\n",
        b"connection: close\r\n",
        b"a: b\r\n",
        b"\r\n",
        b"abc",
        b"3\r\nabc\r\n0\r\n\r\n",
    ]
)
WHOLE = st.integers(0, 30).map(lambda size: HEAD % size + b"x" * size)
DATA = st.one_of(WHOLE, st.lists(PARTS, max_size=8).map(b"".join))


@given(st.lists(st.tuples(DATA, st.integers(0, 400)), min_size=1, max_size=6))
def test_response_head_cache_any_sequence_equals_parsing(answers: list[tuple[bytes, int]]):
    others = KnownResponses()
    servers = [ResponseCache(others), ResponseCache(others)]
    for number, (data, cut) in enumerate(answers):
        reads = [piece for piece in (data[:cut], data[cut:]) if piece]
        assert parsed(reads, servers[number % 2]) == parsed(reads, None)


def large(length: int, *, first: bytes = b"date: now") -> bytes:
    head = b"HTTP/1.1 200 OK\r\n%b\r\ncontent-length: %d\r\n\r\n" % (first, length)
    return head + b"x" * length


class Sized(Scripted):
    """Notes the sizes of the reads."""

    def __init__(self, reads: list[bytes]) -> None:
        super().__init__(reads)
        self.sizes: list[int] = []

    async def read(self, until: float = math.inf, size: int = 0) -> bytes:
        self.sizes.append(size)
        return await super().read(until)


def heads_of(known: ResponseCache, *answers: list[bytes]) -> tuple[list[Any], list[list[int]]]:
    heads, sizes = [], []
    for reads in answers:
        transport = Sized(reads)
        connection = Connection(transport, known)

        async def read(connection: Connection = connection) -> Any:
            connection.send_nowait(b"GET / HTTP/1.1\r\n\r\n", b"")
            head = await connection.read_head()
            while await connection.read_body():
                pass
            return head

        heads.append(trio.run(read))
        sizes.append(transport.sizes)
    return heads, sizes


def test_response_cache_large_response_makes_next_reads_larger():
    whole = large(READ_SIZE)
    pieces = [whole[:READ_SIZE], whole[READ_SIZE:]]
    _, sizes = heads_of(ResponseCache(), [large(400)], pieces, [whole])
    assert sizes == [[READ_SIZE], [READ_SIZE, LARGE_READ_SIZE], [LARGE_READ_SIZE]]


def test_response_cache_parsed_heads_with_other_length_share_memo():
    known = ResponseCache()
    heads, _ = heads_of(
        known, *([answer[:80_000], answer[80_000:]] for answer in (large(90_000), large(100_000)))
    )
    assert heads[0].memo is heads[1].memo
    assert heads[0].content_length == 90_000
    assert (b"content-length", b"90000") in heads[0].headers


def test_response_cache_other_fields_or_places_share_no_memo():
    known = ResponseCache()
    heads, _ = heads_of(
        known,
        [large(10)],
        [large(10, first=b"date: later")],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ndate: now\r\n\r\nhi"],
    )
    assert len({id(head.memo) for head in heads}) == 3
