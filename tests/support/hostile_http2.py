"""Hostile HTTP/2: floods of every frame, header bombs, window games."""

from __future__ import annotations

import contextlib
import time

from hpack import Encoder

from support.hostile import CHAT, Hostile, Lab, read_all
from support.hostile_http1 import GOOD

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


START = PREFACE + frame(SETTINGS)


def request(stream: int, path: str = "/livez", method: str = "GET", *, end: bool = True) -> bytes:
    fields = [(":method", method), (":scheme", "http"), (":authority", "a"), (":path", path)]
    block = Encoder().encode([*fields, ("content-type", "application/json")], huffman=False)
    return frame(HEADERS, block, END_HEADERS | end * END_STREAM, stream)


def setting(code: int, value: int) -> bytes:
    return code.to_bytes(2, "big") + value.to_bytes(4, "big")


def window(stream: int, size: int) -> bytes:
    return frame(WINDOW, size.to_bytes(4, "big"), stream=stream)


def rapid_resets() -> bytes:
    resets = (request(n, CHAT, "POST") + frame(RST, bytes(4), stream=n) for n in range(1, 8001, 2))
    return START + b"".join(resets)


def header_bomb() -> bytes:
    """One header of 4 KB, put into the table once and referenced 16 000 times."""
    block = Encoder().encode([(":method", "GET"), (":scheme", "http"), (":path", "/")])
    block += b"\x40\x01a\x7f\x81\x1e" + b"b" * 4000
    block += b"\xbe" * 16_000
    return START + b"".join(
        frame(HEADERS, block[:16_000], 0, stream)
        + frame(CONTINUATION, block[16_000:], END_HEADERS, stream)
        for stream in range(1, 41, 2)
    )


def open_streams(count: int, path: str) -> bytes:
    return START + b"".join(request(2 * n + 1, path, "POST", end=False) for n in range(count))


def no_window(there: Lab) -> None:
    """A hundred pages at once, with a window of zero."""
    tiny = PREFACE + frame(SETTINGS, setting(4, 0))
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(there.connection())
            sock.sendall(tiny + b"".join(request(2 * n + 1, "/metrics") for n in range(100)))
            read_all(sock)


def window_by_bytes(there: Lab) -> None:
    """Opens the window one byte at a time."""
    with there.connection() as sock:
        sock.sendall(PREFACE + frame(SETTINGS, setting(4, 1)) + request(1, "/metrics"))
        with contextlib.suppress(OSError):
            for _ in range(200):
                sock.sendall(window(1, 1) * 20)


def settings_games(there: Lab) -> None:
    """Streams that wait for a window which is opened and closed again and again."""
    with there.connection() as sock:
        pages = b"".join(request(2 * n + 1, "/metrics") for n in range(50))
        game = frame(SETTINGS, setting(4, 1)) + frame(SETTINGS, setting(4, 0))
        with contextlib.suppress(OSError):
            sock.sendall(PREFACE + frame(SETTINGS, setting(4, 0)) + pages + game * 2_000)
        read_all(sock)


def slow_bodies(there: Lab) -> None:
    """A hundred endless uploads on one connection; then it disconnects."""
    with there.connection() as sock:
        sock.sendall(open_streams(100, CHAT))
        for n in range(100):
            sock.sendall(frame(DATA, GOOD[:20], 0, 2 * n + 1))
        read_all(sock)


def many_connections(there: Lab) -> None:
    for _ in range(30):
        with there.connection() as sock:
            sock.sendall(START + request(1) + request(3, CHAT, "POST", end=False))
            sock.recv(100)


def slow_preface(there: Lab) -> None:
    with there.connection() as sock, contextlib.suppress(OSError):
        for byte in PREFACE:
            sock.sendall(bytes([byte]))
            time.sleep(0.002)


HTTP2 = [
    Hostile("the preface, and nothing else", PREFACE),
    Hostile("the preface in single bytes", play=slow_preface),
    Hostile("the preface, and then zeros", PREFACE + bytes(1_000_000), closed=True),
    Hostile("the preface, and then noise", PREFACE + b"\xff" * 1_000_000, closed=True),
    Hostile("30 000 SETTINGS", START + frame(SETTINGS) * 30_000, closed=True),
    Hostile(
        "30 000 SETTINGS of six",
        START + frame(SETTINGS, b"".join(setting(4, n) for n in range(6))) * 30_000,
        closed=True,
    ),
    Hostile("table size games", START + frame(SETTINGS, setting(1, 0) + setting(1, 4096)) * 20_000),
    Hostile("30 000 acknowledgements", START + frame(SETTINGS, flags=ACK) * 30_000, closed=True),
    Hostile("30 000 PINGs", START + frame(PING, bytes(8)) * 30_000, closed=True),
    Hostile("30 000 PING answers", START + frame(PING, bytes(8), ACK) * 30_000, closed=True),
    Hostile("20 000 PRIORITYs", START + frame(PRIORITY, bytes(4) + b"\1", 0, 1) * 20_000),
    Hostile("30 000 unknown frames", START + frame(77) * 30_000, closed=True),
    Hostile("20 000 GOAWAYs", START + request(1) + frame(GOAWAY, bytes(8)) * 20_000, closed=True),
    Hostile("4 000 rapid resets", rapid_resets(), closed=True),
    Hostile(
        "30 000 empty DATA",
        START + request(1, CHAT, "POST", end=False) + frame(DATA, stream=1) * 30_000,
        closed=True,
    ),
    Hostile(
        "30 000 DATA of padding",
        START + request(1, CHAT, "POST", end=False) + frame(DATA, b"\4aaaa", 8, 1) * 30_000,
        closed=True,
    ),
    Hostile(
        "20 000 DATA of a byte",
        START + request(1, CHAT, "POST", end=False) + frame(DATA, b"a", 0, 1) * 20_000,
    ),
    Hostile(
        "empty CONTINUATIONs",
        START + frame(HEADERS, b"\x82", 0, 1) + frame(CONTINUATION, b"", 0, 1) * 30_000,
        closed=True,
    ),
    Hostile(
        "endless CONTINUATIONs",
        START + frame(HEADERS, b"\x82", 0, 1) + frame(CONTINUATION, bytes(16_000), 0, 1) * 300,
        closed=True,
    ),
    Hostile("a header bomb", header_bomb()),
    Hostile("30 000 window updates", START + window(0, 1) * 30_000, closed=True),
    Hostile("a window of 2^32", START + window(0, (1 << 31) - 1) * 2, closed=True),
    Hostile("window updates of streams", START + request(1) + window(1, 1) * 30_000, closed=True),
    Hostile("a frame of 16 MB", START + b"\xff\xff\xff" + bytes(6) + bytes(500_000), closed=True),
    Hostile("pushes", START + frame(PUSH, bytes(8), 4, 1) * 100, closed=True),
    Hostile("1 000 streams at once", open_streams(1_000, CHAT)),
    Hostile("streams for pages at once", open_streams(100, "/explain")),
    Hostile("no window at all", play=no_window),
    Hostile("a window of single bytes", play=window_by_bytes),
    Hostile("a window opened and closed", play=settings_games),
    Hostile("100 uploads that never end", play=slow_bodies),
    Hostile("30 connections that leave", play=many_connections),
]
