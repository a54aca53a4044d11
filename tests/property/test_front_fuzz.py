"""Any bytes at the public port.

The next client is served, nothing leaks, and no connection fails in an unforeseen way.
"""

from __future__ import annotations

import logging

import hyperframe.frame
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from property.test_http1_server_fuzz import conversations
from support.front_harness import QUICK, Limits, connected, post, running, soon
from support.fuzzing import EXAMPLES

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + hyperframe.frame.SettingsFrame(0).serialize()

HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@st.composite
def frames(draw):
    """HTTP/2 frames with valid headers and random contents."""
    payload = draw(st.binary(max_size=40))
    head = len(payload).to_bytes(3, "big") + bytes([draw(st.integers(0, 11))])
    head += bytes([draw(st.sampled_from([0, 1, 4, 5, 0x24, 0x25]))])
    return head + draw(st.integers(0, 9)).to_bytes(4, "big") + payload


# HPACK: literal fields without indexing, so that any octets can stand in them.
def literal(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


@st.composite
def header_frames(draw):
    names = [b":method", b":path", b":scheme", b":authority", b":protocol", b"x", b"content-length"]
    values = st.one_of(
        st.sampled_from([b"GET", b"CONNECT", b"/", b"http", b"a", b"5", b"websocket", b""]),
        st.binary(max_size=8),
    )
    fields = b"".join(
        literal(name, draw(values)) for name in names if draw(st.integers(0, 3))
    )  # fmt: skip
    stream = draw(st.sampled_from([1, 3, 5, 7]))
    flags = draw(st.sampled_from([4, 5]))
    head = len(fields).to_bytes(3, "big") + bytes([1, flags]) + stream.to_bytes(4, "big")
    return head + fields


http2 = st.lists(st.one_of(frames(), header_frames()), max_size=6).map(
    lambda sent: [PREFACE, *sent]
)
websockets = st.lists(st.binary(max_size=40), max_size=3).map(lambda sent: [HANDSHAKE, *sent])


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
def test_front_any_input_leaves_server_serving(kind, caplog):
    @settings(max_examples=EXAMPLES // 25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.one_of(conversations(), http2, websockets), min_size=5, max_size=15))
    def check(clients):
        caplog.clear()
        trio.run(attack, kind, clients)
        failures = [r for r in caplog.records if r.msg == "a connection failed"]
        assert failures == []

    with caplog.at_level(logging.ERROR):
        check()


async def attack(kind: str, clients: list[list[bytes]]) -> None:
    limits = Limits(linger=0.05, max_linger=QUICK.max_linger)
    async with running(kind, limits=limits) as on:
        for pieces in clients:
            async with connected(on.port) as client:
                try:
                    for piece in pieces:
                        await client.send(piece)
                        await trio.lowlevel.checkpoint()
                except trio.BrokenResourceError:
                    continue
        async with connected(on.port) as client:
            await client.send(post())
            assert (await client.reply()).status == 200
        await soon(lambda: not on.front.connections and not on.app.active)
