"""Hostile TLS: hellos that disconnect, half handshakes, invalid records."""

from __future__ import annotations

import contextlib
import socket
import ssl

from support.hostile import CHAT, EVERY_KIND, Hostile, Lab, read_all
from support.hostile_http1 import GOOD, HTTP1, post
from support.hostile_http2 import HTTP2


def client_hello(*protocols: str) -> bytes:
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.set_alpn_protocols(list(protocols))
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


HELLO = client_hello("h2", "http/1.1")


def hello_and_leave(there: Lab) -> None:
    """Each cost 30 KB, never freed, before the fix."""
    for _ in range(1500):
        with there.connection(bare=True) as sock:
            sock.sendall(HELLO)


def hello_and_stay(there: Lab) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(there.connection(bare=True)).sendall(HELLO)


def hello_read_and_leave(there: Lab) -> None:
    """Waits for the certificate, so that the handshake has been computed."""
    for _ in range(150):
        with there.connection(bare=True) as sock:
            sock.sendall(HELLO)
            sock.recv(65536)


def silent(there: Lab) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(there.connection(bare=True))


def handshake_and_leave(there: Lab) -> None:
    for _ in range(60):
        with there.connection():
            pass


def bare(name: str, data: bytes) -> Hostile:
    """Bytes in place of TLS."""

    def play(there: Lab) -> None:
        there.exchange(data, bare=True)

    return Hostile(name, play=play, tls=True)


def cut_in_half(there: Lab) -> None:
    """A request whose TLS ends without close_notify, in the middle of the body."""
    for _ in range(50):
        with there.connection() as sock:
            sock.sendall(post(CHAT, GOOD)[:-10])
            raw = socket.socket(fileno=sock.detach())
            raw.close()


def records_of_one_byte(there: Lab) -> None:
    with there.connection() as sock:
        for _ in range(1000):
            sock.sendall(b"a")
        read_all(sock)


TLS = [
    Hostile(
        "1 500 hellos that leave",
        play=hello_and_leave,
        tls=True,
        memory=60,
        peak=120,
        fronts=EVERY_KIND,
    ),
    Hostile("400 hellos that stay", play=hello_and_stay, tls=True),
    Hostile("150 half handshakes", play=hello_read_and_leave, tls=True, memory=25),
    Hostile("300 silent connections", play=silent, tls=True),
    Hostile("60 handshakes that leave", play=handshake_and_leave, tls=True, memory=25),
    Hostile("a body cut in half", play=cut_in_half, tls=True),
    Hostile("records of one byte", play=records_of_one_byte, tls=True),
    bare("half a hello", HELLO[:100]),
    bare("a hello and noise", HELLO + b"\xff" * 100_000),
    bare("a thousand hellos", HELLO * 1000),
    bare("a record of 64 KB", b"\x16\x03\x01\xff\xff" + bytes(70_000)),
    bare("alerts", b"\x15\x03\x01\x00\x02\x01\x00" * 10_000),
    bare("empty records", b"\x16\x03\x01\x00\x00" * 20_000),
    bare("plain HTTP", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    bare("SSL 2", b"\x80\x2e\x01\x00\x02" + bytes(200)),
]


def within_tls(rows: list[Hostile], *names: str) -> list[Hostile]:
    """Rows of another table, sent within TLS."""
    return [
        Hostile(row.name, row.sends, row.answer, row.closed, tls=True, play=row.play)
        for row in rows
        if row.name in names
    ]


TLS += within_tls(
    HTTP1,
    "a head without an end",
    "one-byte chunks",
    "endless trailers",
    "50 half requests",
    "pipelines whose clients leave",
)
TLS += within_tls(HTTP2, "100 000 PINGs", "no window at all", "30 connections that leave")
