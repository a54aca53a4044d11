"""The server's end of TLS: fair handshakes, orderly ends, nothing left in memory.

What trio's documentation does not promise about `SSLStream` is used in this file and nowhere else.
"""

from __future__ import annotations

import contextlib
import select
import ssl
from typing import Any

import trio

MAX_HANDSHAKES = 1024
"""Handshakes in progress, each with some 30 KB of OpenSSL's; one more ends the oldest."""

NEW_PER_TURN, BEGUN_PER_TURN = 1, 2
"""Handshake steps computed in one turn of the loop: of clients that have just said hello, and of
those that go on. A step takes up to a few milliseconds (RSA), and everything else in the process
waits for it."""

LEAVERS_PER_TURN = 64
"""Clients that have left, which cost no computing, forgotten in one turn."""

TlsStream = trio.SSLStream[trio.SocketStream]


class _Waiter:
    """A handshake that waits for its turn to compute."""

    __slots__ = ("fileno", "present", "turn")

    def __init__(self, fileno: int) -> None:
        self.fileno = fileno
        self.present = True
        self.turn = trio.Event()


class Handshakes:
    """The TLS handshakes of one process. `run` must be running."""

    def __init__(self, most: int = MAX_HANDSHAKES) -> None:
        self._most = most
        self._scopes: dict[trio.CancelScope, None] = {}
        self._new: dict[_Waiter, None] = {}
        self._begun: dict[_Waiter, None] = {}
        self._arrived = trio.Event()

    @property
    def running(self) -> int:
        """How many are in progress."""
        return len(self._scopes)

    async def run(self) -> None:
        """Hand out the turns, until cancelled."""
        while True:
            while self._new or self._begun:
                self._let_compute(self._begun, BEGUN_PER_TURN)
                self._let_compute(self._new, NEW_PER_TURN)
                await trio.lowlevel.checkpoint()
            self._arrived = trio.Event()
            await self._arrived.wait()

    @staticmethod
    def _let_compute(waiters: dict[_Waiter, None], most: int) -> None:
        for _ in range(LEAVERS_PER_TURN):
            if not waiters or not most:
                return
            waiter = next(iter(waiters))
            del waiters[waiter]
            waiter.present = not _has_left(waiter.fileno)
            most -= waiter.present
            waiter.turn.set()

    async def step(self, fileno: int, *, begun: bool) -> bool:
        """Wait for the turn to compute. False if the client at the descriptor has left by then."""
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
        """Shake hands as the server. The caller calls `take_apart` when it is done with the stream.

        The result is None if the client failed, left, took longer than `timeout` seconds, or was
        the oldest of too many: then there is nothing to take apart.
        """
        paced: Any = _Paced(transport, self)
        stream: TlsStream = trio.SSLStream(paced, context, server_side=True)
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
                if not done:
                    take_apart(stream)
        if not done:
            return None
        stream.transport_stream = transport
        return stream


def take_apart(stream: TlsStream) -> None:
    """Free what an `SSLStream` holds; the stream cannot be used any more.

    It refers to itself, and some 30 KB with it would stay until a full garbage collection, which
    hardly ever comes.
    """
    vars(stream).clear()


async def end_tls(stream: TlsStream) -> trio.SocketStream:
    """Send close_notify (RFC 9112 9.8) and half-close the connection. The rest of it is returned.

    What the client still sends can be read there, encrypted. A task that reads from `stream` gets
    ClosedResourceError.
    """
    transport = stream.transport_stream
    closing: Any = _HalfClosing(transport, stream)
    stream.transport_stream = closing
    # The client, or another task, may have ended the connection by now.
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.aclose()
    return transport


class _Transport(trio.abc.Stream):
    """Stands between an `SSLStream` and its socket."""

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
    """During the handshake: what arrives is handed over when it is its turn to be computed with.

    A client that has left by then is not computed for.
    """

    def __init__(self, inner: trio.SocketStream, handshakes: Handshakes) -> None:
        super().__init__(inner)
        self._handshakes = handshakes
        self._begun = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._inner.receive_some(max_bytes)
        if data:
            fileno = self._inner.socket.fileno()
            if not await self._handshakes.step(fileno, begun=self._begun):
                return b""
            self._begun = True
        return data


class _HalfClosing(_Transport):
    """At the end: closing only shuts down the sending direction."""

    def __init__(self, inner: trio.SocketStream, stream: TlsStream) -> None:
        super().__init__(inner)
        self._stream = stream

    async def aclose(self) -> None:
        # With unread data of the client, unwrapping fails after the alert has been written.
        alert = vars(self._stream)["_outgoing"].read()
        with contextlib.suppress(
            trio.BrokenResourceError, trio.BusyResourceError, trio.ClosedResourceError
        ):
            if alert:
                await self._inner.send_all(alert)
            await self._inner.send_eof()


def _has_left(fileno: int) -> bool:
    poll = select.poll()
    poll.register(fileno, select.POLLRDHUP)
    return bool(poll.poll(0))
