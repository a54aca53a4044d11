"""`AsyncSocket` with Trio's public API alone: the plain implementation."""

from __future__ import annotations

import logging
import math
import select
import socket
from collections.abc import Awaitable, Callable

import trio

from vllm_router.http.io.async_socket import (
    READ_SIZE,
    Interrupted,
    has_unread,
    unexpected_input,
)

log = logging.getLogger(__name__)


class TrioSocket:
    """Waits with `trio.lowlevel`, sends at once. See `AsyncSocket`.

    A system task watches for the peer's close, and another sends what the kernel did not accept;
    `detach` ends both.
    """

    def __init__(self, sock: socket.socket, on_hangup: Callable[[], None] | None = None) -> None:
        self.sock = sock
        self.on_hangup = on_hangup
        self.ended = self.broken = False
        self._reading: trio.CancelScope | None = None
        self._interrupted = False
        self._error: Exception | None = None
        self.unsent = b""
        self._sent = trio.Event()
        self._background: set[trio.CancelScope] = set()
        self._detached = False
        self._token = trio.lowlevel.current_trio_token()
        # A nested epoll reports the peer's close alone, whether or not bytes precede it unread.
        self._closes = select.epoll()
        self._closes.register(sock.fileno(), select.EPOLLRDHUP)
        trio.lowlevel.spawn_system_task(self._run, self._watch)

    def detach(self) -> None:
        if not self._detached:
            self._detached = True
            self.on_hangup = None
            for scope in self._background:
                scope.cancel(reason="socket detached")
            self._closes.close()

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Body of a system task: `work` until it ends or the socket is detached."""
        if not self._detached:
            with trio.CancelScope() as scope:
                self._background.add(scope)
                try:
                    await work()
                finally:
                    self._background.discard(scope)

    async def _watch(self) -> None:
        """Report the peer's close."""
        await trio.lowlevel.wait_readable(self._closes.fileno())
        self.ended = True
        self._hang_up()

    def _hang_up(self) -> None:
        if self.on_hangup is not None:
            try:
                self.on_hangup()
            except Exception:
                # In a system task it would end the whole run.
                log.exception("a connection failed on a socket event")

    # -- reading ------------------------------------------------------------------------------

    def is_silent(self) -> bool:
        return not (self.ended or self.broken or self.has_input())

    def has_input(self) -> bool:
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def has_unread(self) -> bool:
        return has_unread(self.sock)

    async def read(self, until: float = math.inf, size: int = READ_SIZE) -> bytes:
        while True:
            await self._wait_for_input(until)
            try:
                return self.sock.recv(size)
            except BlockingIOError:
                continue

    async def _wait_for_input(self, until: float) -> None:
        if self._error is None and not self.broken:
            with trio.CancelScope(deadline=until) as scope:
                self._reading = scope
                try:
                    await trio.lowlevel.wait_readable(self.sock)
                finally:
                    self._reading = None
            interrupted, self._interrupted = self._interrupted, False
            if interrupted or scope.cancelled_caught:
                raise Interrupted
        else:
            await trio.lowlevel.checkpoint()
        if self._error is not None:
            raise self._take_error()

    def _take_error(self) -> Exception:
        """The error to raise. A local name of it in the frame that raises it would be a cycle."""
        error, self._error = self._error, None
        assert error is not None
        return error

    async def stream_into(self, take: Callable[[bytes], bool]) -> None:
        while take(await self.read()):
            pass

    def interrupt(self) -> bool:
        if self._reading is None or self.has_input():
            return False
        self._interrupted = True
        reading, self._reading = self._reading, None
        reading.cancel(reason="interrupted")
        return True

    # -- writing ------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self.unsent:
            self.unsent += data
        elif not self.broken and self._send(data):
            self._sent = trio.Event()
            trio.lowlevel.spawn_system_task(self._run, self._send_rest)

    def write_request(self, data: bytes) -> None:
        if self.has_input():
            self._error = unexpected_input()
            self._break()
        else:
            self.write(data)

    def flush(self) -> None:
        """Nothing to do: `write` does not buffer."""

    def _send(self, data: bytes) -> bool:
        """Send as much as the kernel accepts; whether bytes are left."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.unsent = b""
            self._break()
            return False
        self.unsent = data[sent:]
        return bool(self.unsent)

    def _break(self) -> None:
        self.broken = True
        self._sent.set()
        self._token.run_sync_soon(self._hang_up)

    async def _send_rest(self) -> None:
        while self.unsent and not self.broken:
            await trio.lowlevel.wait_writable(self.sock)
            self._send(self.unsent)
        self._sent.set()

    async def drain(self) -> None:
        while self.unsent and not self.broken:
            await self._sent.wait()
