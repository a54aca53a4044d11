"""The server's side of TLS: fair scheduling of handshakes, and orderly ends."""

from __future__ import annotations

import contextlib
import select
import ssl
from typing import Any

import trio

from vllm_router.http.io.closing import has_event
from vllm_router.http.io.trio_internals import release_ssl_stream, take_outgoing

MAX_HANDSHAKES = 1024
"""Handshakes in progress, each with some 30 KB of OpenSSL state; one more ends the oldest."""

NEW_PER_TURN, BEGUN_PER_TURN = 1, 2
"""Handshake steps computed in one turn of the loop: for new clients, and for handshakes that have
begun. A step takes up to a few milliseconds (RSA) and blocks the process."""

SKIPPED_PER_TURN = 64
"""Waiting clients looked at in one turn: a client that has left costs no computing."""

MAX_RECEIVED = 16384
"""Bytes received at once during a handshake."""

TlsStream = trio.SSLStream[trio.SocketStream]


class _Waiter:
    """A handshake step that waits to be computed."""

    __slots__ = ("fileno", "present", "turn")

    def __init__(self, fileno: int) -> None:
        self.fileno = fileno
        self.present = True
        self.turn = trio.Event()


class Handshakes:
    """Schedules the TLS handshakes of one process; the task `run` must be running."""

    def __init__(self, most: int = MAX_HANDSHAKES) -> None:
        self._most = most
        self._scopes: dict[trio.CancelScope, None] = {}
        self._new: dict[_Waiter, None] = {}
        self._begun: dict[_Waiter, None] = {}
        self._arrived = trio.Event()

    @property
    def running(self) -> int:
        """Number of handshakes in progress."""
        return len(self._scopes)

    async def run(self) -> None:
        """Schedule the steps, until cancelled."""
        while True:
            while self._new or self._begun:
                self._let_compute(self._begun, BEGUN_PER_TURN)
                self._let_compute(self._new, NEW_PER_TURN)
                await trio.lowlevel.checkpoint()
            self._arrived = trio.Event()
            await self._arrived.wait()

    @staticmethod
    def _let_compute(waiters: dict[_Waiter, None], most: int) -> None:
        for _ in range(SKIPPED_PER_TURN):
            if not waiters or not most:
                return
            waiter = next(iter(waiters))
            del waiters[waiter]
            waiter.present = not has_event(waiter.fileno, select.POLLRDHUP)
            most -= waiter.present
            waiter.turn.set()

    async def step(self, fileno: int, *, begun: bool) -> bool:
        """Wait until the step may be computed. False if the client has left by then."""
        waiter = _Waiter(fileno)
        waiters = self._begun if begun else self._new
        waiters[waiter] = None
        self._arrived.set()
        try:
            await waiter.turn.wait()
        finally:
            waiters.pop(waiter, None)
        return waiter.present

    async def accept(
        self, transport: trio.SocketStream, context: ssl.SSLContext, timeout: float
    ) -> TlsStream | None:
        """A new stream after its handshake; the caller calls `release_ssl_stream` on it in the end.

        None if `handshake` fails.
        """
        stream: TlsStream = trio.SSLStream(transport, context, server_side=True)
        done = False
        try:
            done = await self.handshake(stream, timeout)
        finally:
            if not done:
                release_ssl_stream(stream)
        return stream if done else None

    async def handshake(self, stream: TlsStream, timeout: float) -> bool:
        """Handshake as the server.

        False if the client failed, left, took longer than `timeout` seconds, or was the oldest of
        too many.
        """
        transport = stream.transport_stream
        paced: Any = _Paced(transport, self)
        stream.transport_stream = paced
        if len(self._scopes) >= self._most:
            next(iter(self._scopes)).cancel(reason="too many handshakes")
        done = False
        with trio.move_on_after(timeout) as scope:
            self._scopes[scope] = None
            try:
                await stream.do_handshake()
                done = True
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            finally:
                del self._scopes[scope]
                stream.transport_stream = transport
        return done


async def end_tls(stream: TlsStream) -> trio.SocketStream:
    """Send close_notify (RFC 9112 9.8) and half-close the connection; its socket's stream.

    Further input can be read there, encrypted. A task that reads from `stream` gets
    ClosedResourceError.
    """
    transport = stream.transport_stream
    closing: Any = _HalfClosing(transport, stream)
    stream.transport_stream = closing
    # The client, or another task, may already have ended the connection.
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.aclose()
    return transport


class _Transport(trio.abc.Stream):
    """Layer between an `SSLStream` and its socket stream."""

    def __init__(self, inner: trio.SocketStream) -> None:
        self._inner = inner

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._inner.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Paced(_Transport):
    """For the handshake: received data reaches the SSLStream when its step may be computed.

    If the client has left by then, the stream ends instead.
    """

    def __init__(self, inner: trio.SocketStream, handshakes: Handshakes) -> None:
        super().__init__(inner)
        self._handshakes = handshakes
        self._begun = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        # `SocketStream.receive_some` raises through a context manager. On Python 3.12 and 3.13,
        # that leaves the SSLStream in a reference cycle until the next garbage collection.
        try:
            data = await self._inner.socket.recv(max_bytes or MAX_RECEIVED)
        except OSError as error:
            raise trio.BrokenResourceError(f"connection failed: {error}") from None
        if data:
            fileno = self._inner.socket.fileno()
            if not await self._handshakes.step(fileno, begun=self._begun):
                return b""
            self._begun = True
        return data


class _HalfClosing(_Transport):
    """For the end: closing only shuts down the sending direction."""

    def __init__(self, inner: trio.SocketStream, stream: TlsStream) -> None:
        super().__init__(inner)
        self._stream = stream

    async def aclose(self) -> None:
        # If client data is unread, unwrapping fails after it has produced the alert.
        alert = take_outgoing(self._stream)
        with contextlib.suppress(
            trio.BrokenResourceError, trio.BusyResourceError, trio.ClosedResourceError
        ):
            if alert:
                await self._inner.send_all(alert)
            await self._inner.send_eof()
