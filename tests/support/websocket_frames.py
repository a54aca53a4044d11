"""Websocket frames built by hand: any opcode, length and flag, valid or not."""

from __future__ import annotations

import struct

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def upgrade(path: str, *fields: str) -> bytes:
    """The handshake's request."""
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: a",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        *fields,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    masked: bool = True,
    length: int | None = None,
) -> bytes:
    """A client's frame; `length` overrides the announced payload length. The mask is 0."""
    size = len(payload) if length is None else length
    first = fin << 7 | rsv << 4 | opcode
    flag = masked << 7
    if size < 126:
        head = struct.pack("!BB", first, flag | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first, flag | 126, size)
    else:
        head = struct.pack("!BBQ", first, flag | 127, size)
    return head + bytes(4) * masked + payload


def frames_in(data: bytes) -> list[tuple[int, bytes]]:
    """Opcode and payload of a server's frames."""
    found = []
    while len(data) >= 2:
        size, start = data[1] & 127, 2
        if size == 126:
            size, start = struct.unpack("!H", data[2:4])[0], 4
        elif size == 127:
            size, start = struct.unpack("!Q", data[2:10])[0], 10
        found.append((data[0] & 15, data[start : start + size]))
        data = data[start + size :]
    return found


def close_code(data: bytes) -> int | None:
    """The code of the close frame among a server's frames."""
    for opcode, payload in frames_in(data):
        if opcode == CLOSE and len(payload) >= 2:
            return int.from_bytes(payload[:2], "big")
    return None
