"""Hostile HTTP/1.1: heads, bodies, chunks, trailers, pipelines."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from support.hostile import CHAT, PATIENCE, Hostile, Lab, read_until

GOOD = b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"a"}]}'


def head(method: str, path: str, *fields: str, version: str = "1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: a", *fields]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def post(path: str, body: bytes, *fields: str, kind: str = "application/json") -> bytes:
    length = f"Content-Length: {len(body)}"
    return head("POST", path, f"Content-Type: {kind}", length, *fields) + body


def chunked(path: str, body: bytes) -> bytes:
    fields = "Content-Type: application/json", "Transfer-Encoding: chunked"
    return head("POST", path, *fields) + body


def one_byte_chunks(path: str) -> bytes:
    """A valid body of 30 000 bytes in as many chunks."""
    body = GOOD[:-1] + b" " * (30_000 - len(GOOD)) + b"}"
    return chunked(path, b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")


def drip(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def pipeline_and_leave(there: Lab) -> None:
    for _ in range(20):
        with there.connection() as sock:
            sock.sendall(post(CHAT, GOOD) * 20 + head("GET", "/livez") * 50)


def half_requests(there: Lab) -> None:
    """Fifty connections with an endless request each, all at once."""
    with contextlib.ExitStack() as stack:
        for number in range(50):
            sock = stack.enter_context(there.connection())
            whole = post(CHAT if number % 2 else "/explain", GOOD)
            sock.sendall(whole[: 10 + number % (len(whole) - 10)])


def resets(there: Lab) -> None:
    for number in range(100):
        sock = socket.create_connection(("127.0.0.1", there.port), timeout=PATIENCE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, (1).to_bytes(4, "little") + bytes(4))
        sock.sendall(post(CHAT, GOOD)[: number % 150 + 1])
        sock.close()


def reads_nothing(there: Lab) -> None:
    """Requests a hundred pages and reads none of them."""
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            sock = stack.enter_context(there.connection())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(2)
            with contextlib.suppress(OSError):
                sock.sendall(head("GET", "/metrics") * 100)


def sends_behind_a_refusal(there: Lab) -> bytes:
    """Goes on sending a body that was refused for its length."""
    with there.connection() as sock:
        sock.sendall(head("POST", CHAT, "Content-Length: 99999999999"))
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                sock.sendall(bytes(65536))
        return read_until(sock, b"\r\n\r\n")


HTTP1 = [
    Hostile("nothing, and it leaves", b""),
    Hostile("half a head", b"POST / HTTP/1.1\r\nHost: a\r\n"),
    Hostile("a head without an end", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 50_000, b" 431 ", True),
    Hostile("a line without an end", b"GET /" + b"a" * 1_000_000, b" 431 ", True),
    Hostile("10 000 fields", head("GET", "/livez", *["a: b"] * 10_000), b" 431 ", True),
    Hostile("10 000 fields of a chat", head("POST", CHAT, *["a: b"] * 10_000), b" 431 ", True),
    Hostile("1 000 Connection fields", head("GET", "/livez", *["Connection: a"] * 998), b" 200 "),
    Hostile("a field of 60 KB", head("GET", "/livez", "a: " + "b" * 60_000), b" 200 "),
    Hostile("a target of 60 KB", head("POST", "/v1/" + "%41" * 20_000), b" 40[0-9] "),
    Hostile("60 KB of query", head("GET", "/explain?" + "a&" * 30_000), b" 400 "),
    Hostile("60 KB of path segments", head("GET", "/a" * 30_000), b" 404 "),
    Hostile("a head in single bytes", lambda: drip(head("GET", "/livez", "a: " + "b" * 500), 1)),
    Hostile("empty lines only", b"\r\n" * 200_000),
    Hostile("zeros", bytes(1_000_000), b" (400|431) ", True),
    Hostile("line feeds only", b"\n" * 100_000, b" 4(00|31) ", True),
    Hostile("TRACE", head("TRACE", "/"), b" (405|501) "),
    Hostile("CONNECT", head("CONNECT", "a:443"), b" (400|405|501) "),
    Hostile("HTTP/0.9", b"GET /\r\n\r\n", b" (400|505) ", True),
    Hostile("HTTP/9.9", b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", b" (400|505) ", True),
    Hostile("a negative length", head("POST", CHAT, "Content-Length: -1"), b" 400 ", True),
    Hostile(
        "a length of 10^18", head("POST", CHAT, "Content-Length: 1" + "0" * 17), b" (400|413) "
    ),
    Hostile("length and chunks", chunked(CHAT, b"")[:-2] + b"Content-Length: 1\r\n\r\n", b" 400 "),
    Hostile("one-byte chunks", one_byte_chunks(CHAT), b" 200 "),
    Hostile("one-byte chunks for a page", one_byte_chunks("/explain"), b" 200 "),
    Hostile("a chunk extension of 1 MB", chunked(CHAT, b"1;" + b"a" * 1_000_000), b" 400 "),
    Hostile(
        "50 000 chunk extensions",
        chunked(CHAT, b"1;a=b;c=d;e=f\r\na\r\n" * 50_000),
    ),
    Hostile("the same for a page", chunked("/explain", b"1;a=b;c\r\na\r\n" * 50_000)),
    Hostile("a chunk of 2^60", chunked(CHAT, b"1" + b"0" * 15 + b"\r\n" + bytes(100_000)), b""),
    Hostile("a chunk size of 1 MB", chunked(CHAT, b"0" * 1_000_000), b" 400 "),
    Hostile("endless trailers", chunked(CHAT, b"0\r\n" + b"a: b\r\n" * 100_000), b" 400 "),
    Hostile("one endless trailer", chunked("/explain", b"0\r\na: " + b"b" * 500_000), b" 400 "),
    Hostile("200 pipelined pages", head("GET", "/livez") * 200, b" 200 "),
    Hostile("200 pipelined chats", post(CHAT, GOOD) * 200, b" 200 "),
    Hostile("pipelines whose clients leave", play=pipeline_and_leave),
    Hostile("50 half requests", play=half_requests),
    Hostile("100 resets", play=resets),
    Hostile("pages that are not read", play=reads_nothing),
    Hostile("a refused body that goes on", play=sends_behind_a_refusal),
    Hostile("500 expectations", head("POST", CHAT, "Expect: " + "100-continue," * 500), b" 417 "),
    Hostile("upgrade to anything", head("GET", "/livez", "Connection: Upgrade", "Upgrade: a")),
]
