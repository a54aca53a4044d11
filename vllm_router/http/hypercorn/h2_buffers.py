"""Hypercorn's tables of HTTP/2 streams and of unsent response bytes, corrected."""

from __future__ import annotations

from typing import Any

from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BufferCompleteError, StreamBuffer
from hypercorn.trio.worker_context import EventWrapper


class _EndedStream:
    """Drops frames for a stream that has been answered."""

    idle = True

    async def handle(self, event: StreamEvent) -> None:
        pass


class Streams(dict[int, Any]):
    """Hypercorn's table of streams; late frames of an ended stream are dropped."""

    def __missing__(self, key: int) -> _EndedStream:
        return _EndedStream()


class _BoundedBuffer(StreamBuffer):
    """Response bytes that wait for the client's window.

    Hypercorn's buffer let the application continue after each check, even if nothing was sent.
    """

    async def push(self, data: bytes) -> None:
        if self._complete:
            raise BufferCompleteError
        self.buffer.extend(data)
        await self._is_empty.clear()
        while len(self.buffer) >= BUFFER_HIGH_WATER and not self._complete:
            await self._paused.clear()
            await self._paused.wait()

    async def pop(self, max_length: int) -> bytes:
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        if len(self.buffer) < BUFFER_HIGH_WATER:
            await self._paused.set()
        if not self.buffer:
            await self._is_empty.set()
        return data


class StreamBuffers(dict[int, StreamBuffer]):
    """Hypercorn's table of buffers; replaces each buffer put into it by a bounded one."""

    def __setitem__(self, key: int, value: StreamBuffer) -> None:
        super().__setitem__(key, _BoundedBuffer(EventWrapper))
