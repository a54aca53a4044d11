"""A client connection on a Trio stream: TLS, or memory in tests."""

from __future__ import annotations

import select
import ssl

import trio

from vllm_router.http.io.async_socket import READ_SIZE
from vllm_router.http.io.closing import has_event, reset_on_close, wait_until_delivered
from vllm_router.http.server.connection import Connection
from vllm_router.http.server.host import Host
from vllm_router.http.server.tls_stream import end_tls


class StreamConnection(Connection):
    """Owns a stream, which `run` closes.

    Only a read shows the end of a stream, so a second task reads ahead.
    """

    __slots__ = (
        "_arrived",
        "_ended",
        "_fileno",
        "_new_data",
        "_reads_ahead",
        "_room",
        "_stream",
        "scheme",
    )

    def __init__(
        self,
        host: Host,
        stream: trio.abc.Stream,
        client: tuple[str, int] | None = None,
        local: tuple[str, int] | None = None,
        *,
        scheme: str = "http",
        fileno: int | None = None,
    ) -> None:
        self.scheme = scheme
        super().__init__(host, client, local)
        self._stream = stream
        self._fileno = fileno
        self._arrived = bytearray()
        self._ended = False
        self._reads_ahead = False
        self._new_data = trio.Event()
        self._room = trio.Event()

    async def _serve(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._reads_ahead = True
                nursery.start_soon(self._read_ahead)
                await self._answer_all()
                nursery.cancel_scope.cancel()
        finally:
            self._reads_ahead = False
        if self._handed_over is not None:
            self._handed_over += self._arrived

    async def _read_ahead(self) -> None:
        while not self._ended:
            data = await self._receive_some()
            self._arrived += data
            self._ended = not data
            self._new_data.set()
            while len(self._arrived) >= self._limits.max_read_ahead:
                self._room = trio.Event()
                await self._room.wait()
        self.hang_up()

    async def _receive_some(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(READ_SIZE))
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
            return b""

    async def _read(self, size: int = READ_SIZE) -> bytes:
        while self._reads_ahead and not self._arrived and not self._ended:
            self._new_data = trio.Event()
            await self._new_data.wait()
        if not self._arrived and not self._ended:
            return await self._receive_some()
        data = bytes(self._arrived)
        self._arrived.clear()
        self._room.set()
        return data

    def left_unseen(self) -> bool:
        full = len(self._arrived) >= self._limits.max_read_ahead
        return full and self._fileno is not None and has_event(self._fileno, select.POLLRDHUP)

    def _write_now(self, data: bytes) -> bool:
        return False

    async def _write_rest(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as error:
            raise OSError(str(error)) from error

    def has_input(self) -> bool:
        if self._arrived:
            return True
        return self._fileno is not None and has_event(self._fileno, select.POLLIN)

    async def _end_output(self) -> None:
        try:
            if isinstance(self._stream, trio.SSLStream):
                # Further input is read from the socket and dropped, still encrypted.
                with trio.move_on_after(self._limits.linger):
                    self._stream = await end_tls(self._stream)
            elif isinstance(self._stream, trio.abc.HalfCloseableStream):
                await self._stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise OSError(str(error)) from error

    async def _close(self) -> None:
        with trio.move_on_after(1):
            await self._stream.aclose()

    async def _reset(self) -> None:
        stream = self._stream
        if isinstance(stream, trio.SSLStream):
            stream = stream.transport_stream
        if isinstance(stream, trio.SocketStream):
            await wait_until_delivered(stream.socket, self._limits.linger)
            reset_on_close(stream.socket)
        await trio.aclose_forcefully(self._stream)
