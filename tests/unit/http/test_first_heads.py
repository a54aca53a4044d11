"""The first head of a new connection is not parsed again if an earlier one began with it."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from support.request_heads import HEAD, parsed, seen
from vllm_router.http.head_cache import (
    LONGEST_KNOWN_HEAD,
    MAX_FIRST_HEADS,
    CachedRequestParser,
    FirstHeads,
)
from vllm_router.http.request_head import Head

PEER = ("192.0.2.1", ("192.0.2.9", 80), "http")


class Connections:
    """New connections to one server; `parses` counts the heads that were parsed."""

    def __init__(self) -> None:
        self.firsts = FirstHeads()
        self.parses = 0

    def _parse(self, data: bytes, end: int) -> Head:
        self.parses += 1
        return parsed(data[:end])

    def connect(self, peer: Hashable = PEER) -> CachedRequestParser:
        return CachedRequestParser(self._parse, self.firsts, peer)

    def first(self, data: bytes, peer: Hashable = PEER) -> Head:
        """The first head of a new connection."""
        head = self.connect(peer).parse(data + b"body", len(data))
        assert head is not None
        return head


def test_first_heads_known_head_with_other_length_is_not_parsed():
    connections = Connections()
    connections.first(HEAD % b"5")
    for length in (b"5", b"0", b"123456", b"007"):
        assert seen(connections.first(HEAD % length)) == seen(parsed(HEAD % length))
    assert connections.parses == 1


def test_first_heads_requests_of_two_connections_do_not_change_each_other():
    connections = Connections()
    first, second = connections.connect(), connections.connect()
    one = first.parse(HEAD % b"5", len(HEAD % b"5"))
    two = second.parse(HEAD % b"66", len(HEAD % b"66"))
    assert one is not None
    assert two is not None
    assert (one.content_length, two.content_length) == (5, 66)
    assert (b"content-length", b"5") in one.headers
    assert (b"content-length", b"66") in two.headers
    first.parse(HEAD % b"7", len(HEAD % b"7"))
    assert two.content_length == 66
    assert one.memo is two.memo


@pytest.mark.parametrize(
    "peer",
    [
        ("192.0.2.2", ("192.0.2.9", 80), "http"),
        ("192.0.2.1", ("192.0.2.9", 81), "http"),
        ("192.0.2.1", ("192.0.2.9", 80), "https"),
    ],
)
def test_first_heads_other_peer_shares_nothing(peer):
    connections = Connections()
    one, two = connections.first(HEAD % b"5"), connections.first(HEAD % b"5", peer)
    assert connections.parses == 2
    assert one.memo is not two.memo


@pytest.mark.parametrize(
    "data",
    [
        HEAD.replace(b"X-Y", b"X-Z") % b"5",
        HEAD.replace(b"POST", b"PUT") % b"5",
        HEAD.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer other\r\n\r\n") % b"5",
    ],
)
def test_first_heads_other_head_is_parsed(data):
    connections = Connections()
    connections.first(HEAD % b"5")
    assert seen(connections.first(data)) == seen(parsed(data))
    assert connections.parses == 2


@pytest.mark.parametrize(
    "data",
    [
        HEAD.replace(b"X-Y", b"Expect: 100-continue\r\nX-Y") % b"5",
        HEAD.replace(b"Content-Length: %b", b"Transfer-Encoding: chunked"),
        HEAD.replace(b"X-Y", b"X-%b" % (b"y" * LONGEST_KNOWN_HEAD)) % b"5",
    ],
)
def test_first_heads_head_that_is_not_kept_is_parsed_again(data):
    connections = Connections()
    for parses in (1, 2, 3):
        assert seen(connections.first(data)) == seen(parsed(data))
        assert connections.parses == parses


def test_first_heads_length_with_too_many_digits_is_parsed_and_refused():
    connections = Connections()
    connections.first(HEAD % b"5")
    with pytest.raises(Exception, match="Content-Length"):
        connections.first(HEAD % (b"1" * 30))


def test_first_heads_many_different_heads_stay_bounded():
    connections = Connections()
    for number in range(3 * MAX_FIRST_HEADS):
        connections.first(HEAD.replace(b"X-Y", b"X-%d" % number) % b"5")
    assert len(connections.firsts._known) == MAX_FIRST_HEADS
