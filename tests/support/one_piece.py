"""A response body in one piece, for transports in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import trio


class OnePiece(httpx.AsyncByteStream):
    """The body as the router's own client reads it: no async generator."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        data, self._data = self._data, b""
        if not data:
            raise StopAsyncIteration
        return data
