"""A large body is held in memory once, on its way in and out."""

from __future__ import annotations

import json
import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_router.http.client.tls_transport import TLS_PIECE, TlsTransport
from vllm_router.proxy.body import Bodies, BodyShare, read_body
from vllm_router.routing.prompt.blocks import Prompt
from vllm_router.routing.prompt.body_reader import read_routing_info
from vllm_router.routing.prompt.content import MEDIA_BYTES

MB = 1_000_000


async def test_large_body_in_parts_is_held_once():
    async def receive():
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": bytes([left]) * MB, "more_body": left > 0}

    left = 32
    bodies = Bodies()
    bodies.limit = 64 * MB
    tracemalloc.start()
    try:
        body = await read_body(receive, 64 * MB, BodyShare(bodies), None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert body == b"".join(bytes([number]) * MB for number in reversed(range(32)))
    assert peak < 1.5 * len(body)


async def test_large_body_is_encrypted_in_pieces_and_arrives_whole():
    class Stream:
        def __init__(self) -> None:
            self.pieces: list[bytes] = []
            self.transport_stream = SimpleNamespace(socket=None)

        async def send_all(self, data: bytes | memoryview) -> None:
            self.pieces.append(bytes(data))

    stream: Any = Stream()
    body = bytes(range(256)) * 4000
    assert await TlsTransport(stream).write(b"head", body)
    assert b"".join(stream.pieces) == b"head" + body
    assert max(map(len, stream.pieces)) <= TLS_PIECE


def picture(data: str) -> bytes:
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    content = [{"type": "text", "text": "What is this?"}, part]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()


def test_large_body_image_is_read_without_copy():
    body = picture("A" * 20 * MB)
    tracemalloc.start()
    try:
        facts = read_routing_info(
            b"/v1/chat/completions", b"application/json", body, with_prompt=True
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert facts.prompt.size == MEDIA_BYTES + len("\0user\0What is this?")
    assert peak < MB


def test_large_body_images_differ_by_ends_and_length():
    def chain(data: str) -> tuple[int, ...]:
        return read_routing_info(
            b"/v1/chat/completions", b"application/json", picture(data), with_prompt=True
        ).prompt.block_hashes

    data = "A" * MB
    assert chain(data) == chain(data)
    assert len({chain(data), chain("B" + data[1:]), chain(data[1:] + "B"), chain(data[1:])}) == 4


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "source": {"type": "base64", "data": "DATA"}},
        {"type": "input_image", "image_url": "DATA"},
        {"type": "input_audio", "input_audio": {"data": "DATA", "format": "wav"}},
        {"type": "image_url", "image_url": {"url": "DATA"}, "uuid": "1"},
    ],
    ids=["Anthropic", "Responses", "sound", "with more"],
)
def test_large_body_every_medium_has_equal_weight_and_own_hash(part: dict[str, Any]):
    def prompt(data: str) -> Prompt:
        content = [
            {"type": "text", "text": "What?"},
            json.loads(json.dumps(part).replace("DATA", data)),
        ]
        body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
        path = b"/v1/chat/completions"
        return read_routing_info(path, b"application/json", body, with_prompt=True).prompt

    a, b = prompt("A" * MB), prompt("A" * (MB - 1) + "B")
    assert a.size == b.size == MEDIA_BYTES + len("\0user\0What?")
    assert a.block_hashes != b.block_hashes
