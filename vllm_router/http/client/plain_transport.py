"""Transport on a bare socket."""

from __future__ import annotations

import re
import socket

import trio

from vllm_router.errors import ConnectionLost, NotSent
from vllm_router.http.io.async_socket import BUFFERED_WRITE_SIZE, READ_SIZE, unexpected_input
from vllm_router.http.io.sockets import async_socket

_INTERIM = re.compile(rb"(?:HTTP/1\.[01] 1[^\n]*\n(?:[^\r\n][^\n]*\n)*\r?\n)+\Z")


class PlainTransport:
    """See `Transport`. Closes the socket."""

    __slots__ = ("_async", "_socket", "_used", "interrupt", "is_alive", "read", "stream_into")

    EARLY_RESPONSE_POLL = 0.1
    """Seconds between checks for an early response while the server does not read."""

    can_stream = True

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._async = sock = async_socket(connected)
        self._used = False
        # The socket's own methods: a wrapper would be resumed with every wait.
        self.read = sock.read
        self.stream_into = sock.stream_into
        self.interrupt = sock.interrupt
        # As far as the loop knows; a write checks again.
        self.is_alive = sock.is_silent

    def write_nowait(self, head: bytes, body: bytes) -> bool:
        if len(head) + len(body) > BUFFERED_WRITE_SIZE:
            return False
        if self._used:
            self._async.write_request(head + body)
        else:
            self._used = True
            self._async.write(head + body)
        return True

    async def write(self, head: bytes, body: bytes) -> bool:
        if self.write_nowait(head, body):
            return True
        reused, self._used = self._used, True
        if reused and self._async.has_input():
            raise NotSent(str(unexpected_input()))
        sock = self._socket
        if len(body) <= READ_SIZE:
            head, body = head + body, b""
        try:
            sent = sock.sendmsg((head, body)) if body else sock.send(head)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise ConnectionLost(str(error)) from error
        if sent == len(head) + len(body):
            return True
        if sent < len(head) and not await self._write_rest(memoryview(head)[sent:]):
            return False
        return await self._write_rest(memoryview(body)[max(0, sent - len(head)) :])

    async def _write_rest(self, pending: memoryview) -> bool:
        sock = self._socket
        while pending:
            with trio.move_on_after(self.EARLY_RESPONSE_POLL) as pause:
                await trio.lowlevel.wait_writable(sock)
            if pause.cancelled_caught:
                if self._has_response():
                    return False
                continue
            try:
                sent = sock.send(pending)
            except BlockingIOError:
                continue
            except OSError as error:
                if self._async.has_unread():
                    return False
                raise ConnectionLost(str(error)) from error
            pending = pending[sent:]
        return True

    def _has_response(self) -> bool:
        """Whether the server has closed, or sent more than interim (1xx) responses."""
        try:
            seen = self._socket.recv(4096, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return _INTERIM.match(seen) is None

    def close(self) -> None:
        self._async.detach()
        self._socket.close()
