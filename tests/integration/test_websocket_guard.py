"""Websocket clients that break the protocol, or send more than a feed client needs to."""

from __future__ import annotations

import contextlib
import zlib

import pytest
import trio

from integration.test_hypercorn_bridge import H2Client, still_serves
from support.front_harness import Client, connected, running, soon
from support.websocket_frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    close_code,
    frame,
    frames_in,
    upgrade,
)

MAX_MESSAGE = 65536


async def opened(client: Client, *fields: str) -> None:
    await client.send(upgrade("/ws", *fields))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += await client.stream.receive_some(1)
    assert head.startswith(b"HTTP/1.1 101 ")


async def sent_until_closed(client: Client, piece: bytes, most: int) -> bytes:
    """Send a piece up to `most` times; returns the bytes received until the router closes."""
    came = b""

    async def send() -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            for _ in range(most):
                await client.send(piece)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        with contextlib.suppress(trio.BrokenResourceError):
            while more := await client.stream.receive_some(65536):
                came += more
        nursery.cancel_scope.cancel()
    return came


FLOODS = {
    "endless frame": (frame(TEXT, length=1 << 30), bytes(65536), 1009),
    "endless frame of 2^63": (frame(BINARY, length=(1 << 63) - 1), bytes(65536), 1009),
    "large fragments": (
        frame(TEXT, b"a", fin=False),
        frame(CONTINUATION, b"a" * 60_000, fin=False),
        1009,
    ),
    "empty fragments": (frame(TEXT, fin=False), frame(CONTINUATION, fin=False) * 1000, 1008),
    "empty messages": (b"", frame(TEXT) * 1000, 1008),
    "pings": (b"", frame(PING, b"a" * 125) * 100, 1008),
    "pongs": (b"", frame(PONG) * 1000, 1008),
    "pings between fragments": (
        frame(TEXT, fin=False),
        (frame(CONTINUATION, fin=False) + frame(PING)) * 500,
        1008,
    ),
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_websocket_flood_is_closed_with_its_code(flood):
    first, again, code = FLOODS[flood]
    async with running() as on, connected(on.port) as client:
        await opened(client)
        await client.send(first)
        came = await sent_until_closed(client, again, 2000)
        assert close_code(came) == code
        await soon(lambda: not on.front.connections)
        assert await still_serves(on.port)


WRONG = {
    "unmasked": (frame(TEXT, b"a", masked=False), 1002),
    "unknown opcode": (frame(5, b"a"), 1002),
    "unknown control opcode": (frame(11, b"a"), 1002),
    "reserved bit": (frame(TEXT, b"a", rsv=2), 1002),
    "fragmented ping": (frame(PING, b"a", fin=False), 1002),
    "long ping": (frame(PING, b"a" * 126), 1002),
    "continuation of nothing": (frame(CONTINUATION, b"a"), 1002),
    "text within text": (frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), 1002),
    "not UTF-8": (frame(TEXT, b"\xff"), 1007),
    "close with one byte": (frame(CLOSE, b"\x03"), 1002),
    "close with a reserved code": (frame(CLOSE, (1005).to_bytes(2, "big")), 1002),
    "long length for a short payload": (b"\x81\xfe\x00\x01" + bytes(4) + b"a", 1002),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_websocket_invalid_frame_is_closed_with_its_code(wrong):
    data, code = WRONG[wrong]
    async with running() as on, connected(on.port) as client:
        await opened(client)
        await client.send(data)
        assert close_code(await client.rest()) == code
        await soon(lambda: not on.front.connections)


async def test_websocket_close_is_answered_and_ends_the_connection():
    async with running() as on, connected(on.port) as client:
        await opened(client)
        await client.send(frame(CLOSE, (1000).to_bytes(2, "big")))
        assert close_code(await client.rest()) == 1000


async def test_websocket_well_behaved_client_is_served():
    async with running() as on, connected(on.port) as client:
        await opened(client)
        came = b""
        for _ in range(5):
            await client.send(frame(PING, b"p") + frame(TEXT, b"a" * (MAX_MESSAGE // 2)))
        while (
            sum(opcode == TEXT for opcode, _ in frames_in(came)) < 5 or came.count(b"\x8a\x01p") < 5
        ):
            came += await client.stream.receive_some(65536)
        assert close_code(came) is None


async def test_websocket_message_size_limit_is_exact():
    async with running() as on, connected(on.port) as client:
        await opened(client)
        await client.send(frame(TEXT, b"a" * MAX_MESSAGE))
        came = b""
        while (TEXT, b"a" * MAX_MESSAGE) not in frames_in(came):
            came += await client.stream.receive_some(65536)
        await client.send(frame(TEXT, b"a" * (MAX_MESSAGE + 1)))
        assert close_code(came + await client.rest()) == 1009


async def test_websocket_compression_bomb_is_closed_as_too_big():
    async with running() as on, connected(on.port) as client:
        await opened(client, "Sec-WebSocket-Extensions: permessage-deflate")
        bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = bomb.compress(bytes(50_000_000)) + bomb.flush(zlib.Z_SYNC_FLUSH)
        await client.send(frame(BINARY, packed[:-4], rsv=4))
        assert close_code(await client.rest()) == 1009
        await soon(lambda: not on.front.connections)


async def test_websocket_over_http2_endless_frame_ends_only_its_stream():
    async with running() as on, connected(on.port) as raw:
        client = H2Client(raw)
        await client.flush()
        await client.events()
        extra = [(b":protocol", b"websocket"), (b"sec-websocket-version", b"13")]
        stream = client.h2.get_next_available_stream_id()
        fields = [(b":method", b"CONNECT"), (b":scheme", b"http"), (b":authority", b"a")]
        client.h2.send_headers(stream, [*fields, (b":path", b"/ws"), *extra])
        await client.flush()
        await client.events()
        client.h2.send_data(stream, frame(TEXT, bytes(16000), length=1 << 30))
        ended = False
        while not ended:
            while client.h2.local_flow_control_window(stream) > 16000:
                client.h2.send_data(stream, bytes(16000))
            await client.flush()
            events = await client.events()
            assert events, "the connection has ended"
            ended = any(type(e).__name__ in ("StreamEnded", "StreamReset") for e in events)
        other = client.request()
        assert await client.statuses(other) == {other: b"200"}
