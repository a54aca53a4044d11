"""Streams and addresses of connections that were accepted elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trio

Address = tuple[str, int]


class ReplayStream(trio.abc.Stream):
    """Returns bytes that were read before from the inner stream, then the inner stream's."""

    def __init__(self, inner: trio.SocketStream | trio.SSLStream[Any], data: bytes) -> None:
        self.inner = inner
        self._data = data

    @property
    def replaying(self) -> bool:
        return bool(self._data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._data:
            await trio.lowlevel.checkpoint()
            size = len(self._data) if max_bytes is None else max_bytes
            first, self._data = self._data[:size], self._data[size:]
            return first
        return await self.inner.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self.inner.aclose()


@dataclass(frozen=True, slots=True)
class Relay:
    """Facts about a client whose TLS connection ends in another process, which relays the bytes.

    `client` and `local` are the addresses in that process; `alpn` is the negotiated protocol.
    """

    client: Address
    local: Address
    alpn: str
