"""A large body is held once, on its way in and on its way out."""

from __future__ import annotations

import tracemalloc
from typing import Any

from vllm_router.http1.transport import TLS_PIECE, TlsTransport
from vllm_router.proxy.request import Bodies, BodyShare, _read_body

MB = 1_000_000


async def test_body_that_comes_in_parts_is_held_once():
    async def receive():
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": bytes([left]) * MB, "more_body": left > 0}

    left = 32
    bodies = Bodies()
    bodies.limit = 64 * MB
    tracemalloc.start()
    try:
        body = await _read_body(receive, 64 * MB, BodyShare(bodies), None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert body == b"".join(bytes([number]) * MB for number in reversed(range(32)))
    assert peak < 1.5 * len(body)


async def test_body_is_encrypted_in_pieces_and_arrives_whole():
    class Stream:
        def __init__(self) -> None:
            self.pieces: list[bytes] = []

        async def send_all(self, data: bytes | memoryview) -> None:
            self.pieces.append(bytes(data))

    stream: Any = Stream()
    body = bytes(range(256)) * 4000
    assert await TlsTransport(stream).write(b"head", body)
    assert b"".join(stream.pieces) == b"head" + body
    assert max(map(len, stream.pieces)) <= TLS_PIECE
