"""Reading a control response: bounded in size, decompressed, and in small pieces."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import httpx
import trio

from vllm_router.errors import UnusablePage

PIECE = 32_768
"""Bytes passed on between two checkpoints, of a compressed page: a read may become a thousand times
as long. An uncompressed page is passed on as it is read, and each read is a wait."""

_GZIP, _ZLIB = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS
_WINDOW = {"gzip": _GZIP, "x-gzip": _GZIP, "deflate": _ZLIB}


async def read_pieces(response: httpx.Response, most: int, take: Callable[[bytes], None]) -> None:
    """Call `take` with the decompressed page, one piece at a time.

    Raises UnusablePage if the page is longer than `most` bytes, compressed or not, or has an
    unknown content coding; passes on exceptions of `take`. The caller closes the response, which
    closes the connection unless the page has been read to its end.
    """
    body = _body_of(_encoding_of(response))
    compressed = decompressed = 0
    # httpx's decoders have no limit, and a response that has read itself is part of a cycle.
    assert isinstance(response.stream, httpx.AsyncByteStream)
    async for data in response.stream:
        compressed += len(data)
        if compressed > most:
            raise UnusablePage(f"it is longer than {most} bytes")
        for piece in body.pieces(data):
            decompressed += len(piece)
            if decompressed > most:
                raise UnusablePage(f"it is longer than {most} bytes")
            take(piece)
            if body.expands:
                await trio.lowlevel.checkpoint()
    take(body.rest())


async def read_whole(response: httpx.Response, most: int) -> bytes:
    """Read the whole page. Raises UnusablePage, see `read_pieces`."""
    page = bytearray()
    await read_pieces(response, most, page.extend)
    return bytes(page)


def _encoding_of(response: httpx.Response) -> str:
    """The content coding. From the raw fields: httpx guesses a charset first, for 50 µs."""
    values = [value for name, value in response.headers.raw if name.lower() == b"content-encoding"]
    return b",".join(values).decode("latin-1")


class _IdentityBody:
    """Body without a content coding."""

    expands = False

    def pieces(self, data: bytes) -> Iterator[bytes]:
        yield data

    def rest(self) -> bytes:
        return b""


class _CompressedBody:
    """Body decompressed by zlib, piece by piece: one byte may become a thousand."""

    expands = True

    def __init__(self, window: int) -> None:
        self._inflater = zlib.decompressobj(window)

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while data:
            try:
                piece = self._inflater.decompress(data, PIECE)
            except zlib.error:
                raise UnusablePage("it cannot be decompressed") from None
            data = self._inflater.unconsumed_tail
            yield piece

    def rest(self) -> bytes:
        """The output that zlib still holds, at most 258 bytes. Raises UnusablePage."""
        piece = self._inflater.flush()
        if not self._inflater.eof:
            raise UnusablePage("its compressed data is cut off")
        return piece


def _body_of(encoding: str) -> _IdentityBody | _CompressedBody:
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return _IdentityBody()
    if encoding not in _WINDOW:
        raise UnusablePage("it is compressed, but not with gzip or deflate")
    return _CompressedBody(_WINDOW[encoding])
