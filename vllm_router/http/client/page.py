"""How probes read a page: bounded in bytes, packed or not, and in pieces that cost little each."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import httpx
import trio

from vllm_router.errors import UnusablePage

PIECE = 32_768
"""Bytes that are handed on at a time; other tasks run in between."""

_GZIP, _ZLIB = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS
_WINDOW = {"gzip": _GZIP, "x-gzip": _GZIP, "deflate": _ZLIB}


async def read_pieces(response: httpx.Response, most: int, take: Callable[[bytes], None]) -> None:
    """Have `take` called with the page, unpacked, a piece at a time.

    Raises UnusablePage if it is longer than `most` bytes, packed or unpacked, or packed in an
    unknown way, and what `take` raises. The caller closes the response, and with it the connection
    if the page has not been read to its end.
    """
    body = _body_of(response.headers.get("content-encoding", ""))
    packed = unpacked = 0
    # httpx's own decoders have no bound, and a response that has read itself is part of a cycle.
    assert isinstance(response.stream, httpx.AsyncByteStream)
    async for data in response.stream:
        packed += len(data)
        if packed > most:
            raise UnusablePage(f"it is longer than {most} bytes")
        for piece in body.pieces(data):
            unpacked += len(piece)
            if unpacked > most:
                raise UnusablePage(f"it is longer than {most} bytes")
            take(piece)
            await trio.lowlevel.checkpoint()
    take(body.rest())


async def read_whole(response: httpx.Response, most: int) -> bytes:
    """All of the page. Raises UnusablePage, see `read_pieces`."""
    page = bytearray()
    await read_pieces(response, most, page.extend)
    return bytes(page)


class _Plain:
    """A body as it is."""

    def pieces(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]

    def rest(self) -> bytes:
        return b""


class _Packed:
    """A body that zlib unpacks: a thousand bytes may come of one, so never all at once."""

    def __init__(self, window: int) -> None:
        self._inflater = zlib.decompressobj(window)

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while data:
            try:
                piece = self._inflater.decompress(data, PIECE)
            except zlib.error:
                raise UnusablePage("it cannot be unpacked") from None
            data = self._inflater.unconsumed_tail
            yield piece

    def rest(self) -> bytes:
        """What zlib has kept: less than a match, 258 bytes. Raises UnusablePage."""
        piece = self._inflater.flush()
        if not self._inflater.eof:
            raise UnusablePage("it ends in the middle of its packed data")
        return piece


def _body_of(encoding: str) -> _Plain | _Packed:
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return _Plain()
    if encoding not in _WINDOW:
        raise UnusablePage("it is packed, which was not asked for, and not with gzip or deflate")
    return _Packed(_WINDOW[encoding])
