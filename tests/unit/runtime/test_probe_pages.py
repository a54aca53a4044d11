"""Pages that probes read: bounded in bytes for any response and any compression."""

from __future__ import annotations

import gzip
import itertools
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Iterable
from typing import Self

import httpx
import pytest

from vllm_router.errors import UnusablePage
from vllm_router.http.client.page import PIECE, read_pieces, read_whole

MB = 1_000_000


class Body(httpx.AsyncByteStream):
    """A body that has not been read yet, as the transport returns it."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        piece = next(self._pieces, None)
        if piece is None:
            raise StopAsyncIteration
        return piece


def response(pieces: bytes | Iterable[bytes], encoding: str = "") -> httpx.Response:
    headers = {"content-encoding": encoding.encode("latin-1")} if encoding else {}
    stream = Body([pieces] if isinstance(pieces, bytes) else pieces)
    return httpx.Response(200, headers=headers, stream=stream)


class Kept:
    """The peak memory of Python, in bytes."""

    def __enter__(self) -> Self:
        tracemalloc.start()
        return self

    def __exit__(self, *_: object) -> None:
        _, self.peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()


@pytest.mark.parametrize("encoding", ["", "identity", "gzip", "x-gzip", "deflate", " GZIP "])
async def test_read_whole_compressed_or_plain_gives_page(encoding):
    page = b"vllm:a 1\n" * 50_000
    packed = {"": page, "identity": page, "deflate": zlib.compress(page)}
    data = packed.get(encoding, gzip.compress(page))
    assert await read_whole(response(data, encoding), MB) == page


async def test_read_pieces_yields_small_pieces_only():
    sizes: list[int] = []
    await read_pieces(
        response(gzip.compress(bytes(MB)), "gzip"), MB, lambda p: sizes.append(len(p))
    )
    assert sum(sizes) == MB
    assert max(sizes) <= PIECE


async def test_read_pieces_endless_page_is_refused_unbuffered():
    with Kept() as kept, pytest.raises(UnusablePage, match="longer than 1000000 bytes"):
        await read_pieces(response(itertools.repeat(bytes(65536))), MB, lambda _: None)
    assert kept.peak < MB


@pytest.mark.parametrize("size", [3 * MB, 100 * MB])
async def test_read_whole_decompression_bomb_is_refused_at_limit(size):
    packer = zlib.compressobj(1, wbits=31)
    bomb = b"".join([packer.compress(bytes(MB)) for _ in range(size // MB)]) + packer.flush()
    with Kept() as kept, pytest.raises(UnusablePage, match="longer than 2000000 bytes"):
        await read_whole(response(bomb, "gzip"), 2 * MB)
    assert kept.peak < 6 * MB


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress", "\u00e9"])
async def test_read_whole_unknown_encoding_is_refused(encoding):
    with pytest.raises(UnusablePage, match="not with gzip or deflate"):
        await read_whole(response(b"x", encoding), MB)


@pytest.mark.parametrize("data", [b"plain", gzip.compress(b"page", mtime=0)[:-9], b""])
async def test_read_whole_invalid_compression_is_refused(data):
    with pytest.raises(UnusablePage):
        await read_whole(response(data, "gzip"), MB)
