"""Repeated request heads are not parsed again, and give the same result as parsing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from support.request_heads import HEAD, parsed, seen
from vllm_router.http.head_cache import CachedRequestParser
from vllm_router.http.http_error import HttpError


def knowing(data: bytes) -> CachedRequestParser:
    """A parser that has parsed `data`, and whose other parses give None."""
    known = CachedRequestParser(lambda data, end: heads.pop() if heads else None)
    heads = [parsed(data)]
    assert known.parse(data, len(data)) is not None
    return known


def test_request_head_cache_same_head_with_other_length_matches():
    known = knowing(HEAD % b"5")
    for length in (b"5", b"0", b"123456", b"007"):
        data = HEAD % length
        head = known.parse(data + b"body", len(data))
        assert head is not None
        assert seen(head) == seen(parsed(data))


def test_request_head_cache_headers_of_earlier_request_stay_unchanged():
    known = knowing(HEAD % b"5")
    first = known.parse(HEAD % b"6", len(HEAD % b"6"))
    assert first is not None
    fields = first.headers
    known.parse(HEAD % b"77", len(HEAD % b"77"))
    assert (b"content-length", b"6") in fields


def test_request_head_cache_other_difference_is_parsed():
    known = knowing(HEAD % b"5")
    for other in (
        HEAD.replace(b"POST", b"PUT ") % b"5",
        HEAD.replace(b"X-Y", b"X-Z") % b"5",
        HEAD.replace(b"z ", b"z") % b"5",
        HEAD.replace(b"\r\n\r\n", b"\r\nA: b\r\n\r\n") % b"5",
        HEAD % b"",
        HEAD % b"-1",
        HEAD % b"+5",
        HEAD % b"5, 5",
        HEAD % b"5\r\nContent-Length: 6",
        HEAD % b"5\r\nTransfer-Encoding: chunked",
        HEAD % b"1234567890123456789",
        HEAD % b"\xb2",
    ):
        assert known.parse(other, len(other)) is None


def test_request_head_cache_only_length_may_differ():
    for data in (
        b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n",
    ):
        assert knowing(data).parse(data, len(data)) is None


_name = st.sampled_from([b"Host", b"content-LENGTH", b"X-Content-Length", b"Connection", b"A"])
_value = st.sampled_from([b"h", b"5", b"close", b"\r\ncontent-length: 7", b"12 ", b"\t3", b"x:5"])
_heads = st.lists(st.tuples(_name, _value), max_size=5).map(
    lambda fields: (
        b"POST / HTTP/1.1\r\n" + b"".join(b"%b: %b\r\n" % field for field in fields) + b"\r\n"
    )
)


@given(_heads, _heads)
def test_request_head_cache_match_equals_parsing(first: bytes, second: bytes):
    try:
        known = knowing(first)
    except HttpError:
        return
    for data in (first, second):
        head = known.parse(data, len(data))
        if head is not None:
            assert seen(head) == seen(parsed(data))
