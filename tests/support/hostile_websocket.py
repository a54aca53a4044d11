"""Hostile websockets: frames of every kind and size at the feed."""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterable

from support.hostile import EVERY_KIND, Hostile, Lab
from support.websocket_frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    close_code,
    frame,
    upgrade,
)

FEED = "/ws/load"
UP = upgrade(FEED)
DEFLATE = upgrade(FEED, "Sec-WebSocket-Extensions: permessage-deflate")


def closes_with(code: int, *pieces: bytes, deflate: bool = False) -> Callable[[Lab], None]:
    """A play that sends these pieces after the handshake and expects a close frame with a code."""

    def play(there: Lab) -> None:
        with there.connection() as sock:
            sock.sendall(DEFLATE if deflate else UP)
            came = b""
            while b"\r\n\r\n" not in came:
                came += sock.recv(65536)
            came = came.partition(b"\r\n\r\n")[2]
            with contextlib.suppress(OSError):
                for piece in pieces:
                    sock.sendall(piece)
            with contextlib.suppress(ConnectionError):
                while close_code(came) is None and (more := sock.recv(65536)):
                    came += more
            assert close_code(came) == code, (close_code(came), came[-100:])

    return play


@functools.cache
def bomb(size: int) -> bytes:
    """A compressed message of so many zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (packer.compress(bytes(size)) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]


def unread(there: Lab) -> None:
    """Thirty feed clients that read nothing."""
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(there.connection()).sendall(UP)


def open_and_leave(there: Lab) -> None:
    for number in range(30):
        with there.connection() as sock:
            sock.sendall(UP)
            if number % 2:
                sock.recv(1000)


def many(piece: bytes, count: int) -> Iterable[bytes]:
    return [piece] * count


_ENDLESS = frame(TEXT, length=1 << 30)

WEBSOCKET = [
    Hostile(
        "a frame of 1 GB",
        play=closes_with(1009, _ENDLESS, *many(bytes(65536), 500)),
        fronts=EVERY_KIND,
    ),
    Hostile(
        "a frame of 2^63",
        play=closes_with(1009, frame(BINARY, length=(1 << 63) - 1), *many(bytes(65536), 500)),
    ),
    Hostile(
        "endless fragments",
        play=closes_with(
            1009,
            frame(TEXT, b"a", fin=False),
            *many(frame(CONTINUATION, b"a" * 60_000, fin=False), 300),
        ),
    ),
    Hostile(
        "empty fragments",
        play=closes_with(
            1008, frame(TEXT, fin=False), *many(frame(CONTINUATION, fin=False) * 10_000, 30)
        ),
        fronts=EVERY_KIND,
    ),
    Hostile("empty messages", play=closes_with(1008, *many(frame(TEXT) * 10_000, 30))),
    Hostile("small messages", play=closes_with(1008, *many(frame(TEXT, b"a") * 10_000, 30))),
    Hostile("pings", play=closes_with(1008, *many(frame(PING, bytes(125)) * 1_000, 30))),
    Hostile("pongs", play=closes_with(1008, *many(frame(PONG) * 10_000, 30))),
    Hostile(
        "a compressed bomb",
        play=lambda there: closes_with(1009, frame(BINARY, bomb(100_000_000), rsv=4), deflate=True)(
            there
        ),
    ),
    Hostile(
        "compressed bombs in fragments",
        play=lambda there: closes_with(
            1009,
            frame(BINARY, bomb(20_000_000)[:100], rsv=4, fin=False),
            *many(frame(CONTINUATION, bomb(20_000_000), fin=False), 20),
            deflate=True,
        )(there),
    ),
    Hostile(
        "compressed nonsense",
        play=closes_with(1007, frame(TEXT, b"\xff" * 99, rsv=4), deflate=True),
    ),
    Hostile("unmasked", play=closes_with(1002, frame(TEXT, b"a", masked=False))),
    Hostile("an unknown opcode", play=closes_with(1002, frame(7, b"a"))),
    Hostile("not UTF-8", play=closes_with(1007, frame(TEXT, b"\xc0\x80"))),
    Hostile("closed twice", play=closes_with(1000, frame(CLOSE, b"\x03\xe8") * 1_000)),
    Hostile("frames before the answer", UP + frame(TEXT, b"a") * 10_000),
    Hostile("frames without an upgrade", frame(TEXT, b"a" * 100) * 1_000, b" 4(00|31) "),
    Hostile("no key", UP.replace(b"Sec-WebSocket-Key", b"X"), b" 400 "),
    Hostile("version 99", UP.replace(b"Version: 13", b"Version: 99"), b" 400 "),
    Hostile("60 KB of protocols", upgrade(FEED, "Sec-WebSocket-Protocol: " + "a," * 29_000)),
    Hostile("60 KB of extensions", upgrade(FEED, "Sec-WebSocket-Extensions: " + "a;b," * 14_000)),
    Hostile("a websocket elsewhere", upgrade("/livez"), b" 40"),
    Hostile("a websocket for chats", upgrade("/v1/chat/completions"), b" 40"),
    Hostile("clients that read nothing", play=unread),
    Hostile("30 that leave", play=open_and_leave),
]
