"""A connection to the Redis whose answers are bounded. Imports the client library.

The library holds an answer of any size in memory: one entry of the log may have 512 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from anyio.abc import ByteStream
from coredis.connection import TCPConnection

MAX_ANSWER = 48 * 1024 * 1024
"""Bytes of the answers to one pipeline: a hundred full batches and all drains have 35 MB."""


class TooLong(Exception):
    """The Redis has answered with more than MAX_ANSWER."""

    def __init__(self) -> None:
        super().__init__(f"the answer has more than {MAX_ANSWER >> 20} MB")


class BoundedStream(ByteStream):
    """Counts what comes after each write, and raises TooLong; the connection ends by it."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._room = MAX_ANSWER

    async def receive(self, max_bytes: int = 65536) -> bytes:
        data = await self._stream.receive(max_bytes)
        self._room -= len(data)
        if self._room < 0:
            raise TooLong
        return data

    async def send(self, item: bytes) -> None:
        self._room = MAX_ANSWER
        await self._stream.send(item)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return self._stream.extra_attributes


class BoundedConnection(TCPConnection):
    """A connection of the library over a `BoundedStream`."""

    async def _connect(self) -> ByteStream:
        return BoundedStream(await super()._connect())
