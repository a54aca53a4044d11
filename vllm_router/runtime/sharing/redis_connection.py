"""A connection to the Redis whose answers are bounded. Imports the client library.

The library holds an answer of any size in memory: one entry of the log may have 512 MB. It also
keeps all answers and messages that nothing has asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from anyio import WouldBlock, create_memory_object_stream
from anyio.abc import ByteStream
from coredis.connection import TCPConnection

from vllm_router.runtime.sharing.redis_errors import TooLong, Unasked

MAX_ANSWER = 48 * 1024 * 1024
"""Bytes of the answers to one pipeline: a hundred full batches and all drains have 35 MB."""

MAX_UNASKED = 4
"""Answers and messages that nothing has asked for; a Redis sends none to this client."""


class BoundedStream(ByteStream):
    """Counts what comes after each write, and raises TooLong; the connection ends by it."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._room = MAX_ANSWER

    async def receive(self, max_bytes: int = 65536) -> bytes:
        data = await self._stream.receive(max_bytes)
        self._room -= len(data)
        if self._room < 0:
            raise TooLong(MAX_ANSWER)
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
    """A connection of the library over a `BoundedStream`, with short buffers (6.9.0)."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for buffer in ("_push_message_buffer", "_streamed_message_buffer"):
            sender, receiver = getattr(self, f"{buffer}_in"), getattr(self, f"{buffer}_out")
            sender.close()
            receiver.close()
            sender, receiver = create_memory_object_stream[Any](MAX_UNASKED)
            setattr(self, f"{buffer}_in", sender)
            setattr(self, f"{buffer}_out", receiver)

    async def _connect(self) -> ByteStream:
        return BoundedStream(await super()._connect())

    def _data_received(self, data: bytes) -> None:
        try:
            super()._data_received(data)
        except WouldBlock:
            raise Unasked from None
