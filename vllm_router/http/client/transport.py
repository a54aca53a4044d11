"""Byte streams to servers: a bare non-blocking socket, or TLS over one.

What fits into one write goes out by the socket's wire, together with what others write.
"""

from __future__ import annotations

import errno
import math
import os
import re
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import trio

from vllm_router.errors import ConnectFailed, ConnectionLost, OwnFault
from vllm_router.http.client.resolver import Address
from vllm_router.http.io.wires import READ_SIZE, SOON, Wire

_OUR_ERRORS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}
)

_INTERIM = re.compile(rb"(?:HTTP/1\.[01] 1[^\n]*\n(?:[^\r\n][^\n]*\n)*\r?\n)+\Z")


class Transport(Protocol):
    """One connection to a server. On failure `write` raises ConnectionLost, `read` and `pour` that
    or an OSError."""

    async def read(self, until: float = math.inf) -> bytes:
        """At least one byte, or none at the end of the stream.

        Where there is `pour`, `until` bounds the time, and `interrupt` ends the wait. Then raises
        Interrupted.
        """
        ...

    def interrupt(self) -> bool:
        """False if nobody waits."""
        ...

    @property
    def pours(self) -> bool:
        """Whether there is `pour`."""
        ...

    async def pour(self, take: Callable[[bytes], bool]) -> None:
        """Have `take` called with what `read` would return, between tasks, until it is False."""
        ...

    def write_soon(self, head: bytes, body: bytes) -> bool:
        """All of both without a wait; False, and nothing of it, if they need `write`."""
        ...

    async def write(self, head: bytes, body: bytes) -> bool:
        """All of both, in order. False if the peer answered, or closed, before it had read all."""
        ...

    def alive(self) -> bool:
        """Whether an idle connection is still open and silent."""
        ...

    def close(self) -> None: ...


_TLS_ERRORS = (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError)

TLS_PIECE = 262144
"""Bytes of a body that are encrypted at a time."""


class PlainTransport:
    """A connected non-blocking socket."""

    __slots__ = ("_socket", "_used", "_wire")

    ANSWER_POLL = 0.1
    """Seconds between looks for an early answer while the peer does not read."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._wire = Wire(connected)
        self._used = False

    # The wire's own coroutines: one more around each would be resumed with every wait.

    def read(self, until: float = math.inf) -> Coroutine[Any, Any, bytes]:
        return self._wire.read(READ_SIZE, until)

    def interrupt(self) -> bool:
        return self._wire.interrupt()

    pours = True

    def pour(self, take: Callable[[bytes], bool]) -> Coroutine[Any, Any, None]:
        return self._wire.pour(take)

    def write_soon(self, head: bytes, body: bytes) -> bool:
        if len(head) + len(body) > SOON:
            return False
        if self._used:
            self._wire.ask(head + body)
        else:
            self._used = True
            self._wire.write(head + body)
        return True

    async def write(self, head: bytes, body: bytes) -> bool:
        if self.write_soon(head, body):
            return True
        wary, self._used = self._used, True
        if wary and self._wire.has_input():
            raise ConnectionLost("it has closed, or spoken unasked")
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
            with trio.move_on_after(self.ANSWER_POLL) as patience:
                await trio.lowlevel.wait_writable(sock)
            if patience.cancelled_caught:
                if self._answered():
                    return False
                continue
            try:
                sent = sock.send(pending)
            except BlockingIOError:
                continue
            except OSError as error:
                if self._has_input():
                    return False
                raise ConnectionLost(str(error)) from error
            pending = pending[sent:]
        return True

    def _answered(self) -> bool:
        """Whether the peer has closed, or sent more than interim (1xx) answers."""
        try:
            seen = self._socket.recv(4096, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return _INTERIM.match(seen) is None

    def _has_input(self) -> bool:
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def alive(self) -> bool:
        # As far as the loop has looked; `write` looks again.
        wire = self._wire
        return wire.silent and not wire.ended and not wire.broken

    def close(self) -> None:
        self._wire.leave()
        self._socket.close()


class TlsTransport:
    """A trio SSL stream over a connected socket.

    A stream that ends without the peer's close_notify is cut: `read` raises ConnectionLost, as
    nothing else tells the end of a body without a length from a broken line (RFC 9112 section 9.8).
    """

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self._stream = stream
        self._socket = stream.transport_stream.socket
        self._closed = False

    async def read(self, until: float = math.inf) -> bytes:
        try:
            return bytes(await self._stream.receive_some(READ_SIZE))
        except _TLS_ERRORS as error:
            raise ConnectionLost(_why_lost(error)) from error

    def interrupt(self) -> bool:
        return False

    pours = False

    async def pour(self, take: Callable[[bytes], bool]) -> None:
        while take(await self.read()):
            pass

    def write_soon(self, head: bytes, body: bytes) -> bool:
        return False

    async def write(self, head: bytes, body: bytes) -> bool:
        try:
            if len(body) <= READ_SIZE:
                await self._stream.send_all(head + body)
                return True
            # The encrypted copy is of a piece, not of the whole.
            await self._stream.send_all(head)
            whole = memoryview(body)
            for start in range(0, len(body), TLS_PIECE):
                await self._stream.send_all(whole[start : start + TLS_PIECE])
            return True
        except _TLS_ERRORS as error:
            raise ConnectionLost(_why_lost(error)) from error

    def alive(self) -> bool:
        # What waits there is most likely the server's goodbye (close_notify); session tickets
        # came with the first answer.
        return not self._closed and not self._socket.is_readable()

    def close(self) -> None:
        self._closed = True
        self._socket.close()
        _take_apart(self._stream)


SLOW_AFTER = 0.25
"""Seconds after which an address is slow to answer (RFC 8305 section 5: Connection Attempt Delay).
"""

KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
)
"""The kernel asks a silent peer each 60 s whether it is there, and gives it up 60 s after. It keeps
connections known to firewalls and address translators, which forget silent ones in 5 minutes."""


async def connect(address: Address, slow: Callable[[], None] | None = None) -> socket.socket:
    """A connected non-blocking socket with TCP_NODELAY and keepalive.

    `slow` is called if it has not connected in SLOW_AFTER seconds; it is waited for all the same.
    The caller bounds the time and closes the socket. Raises ConnectFailed or OwnFault.
    """
    family, target = address
    sock = None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for level, option, value in KEEPALIVE:
            sock.setsockopt(level, option, value)
        code = sock.connect_ex(target)
        if code == errno.EINPROGRESS:
            await _connected(sock, slow)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except OSError as error:
        if sock is not None:
            sock.close()
        if error.errno in _OUR_ERRORS:
            raise OwnFault(str(error)) from error
        raise ConnectFailed(error.strerror or str(error)) from error
    except BaseException:
        if sock is not None:
            sock.close()
        raise
    return sock


async def _connected(sock: socket.socket, slow: Callable[[], None] | None) -> None:
    """Wait until the attempt to connect has ended, well or not."""
    if slow is not None:
        with trio.move_on_after(SLOW_AFTER):
            await trio.lowlevel.wait_writable(sock)
            return
        slow()
    await trio.lowlevel.wait_writable(sock)


async def start_tls(sock: socket.socket, host: str, context: ssl.SSLContext) -> TlsTransport:
    """TLS over a connected socket. Raises ConnectFailed; the socket is closed then."""
    # Python sets this option, by which OpenSSL takes any end of the stream for a proper one.
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    stream = trio.SSLStream(
        trio.SocketStream(trio.socket.from_stdlib_socket(sock)), context, server_hostname=host
    )
    try:
        await stream.do_handshake()
    except (trio.BrokenResourceError, ssl.SSLError) as error:
        sock.close()
        _take_apart(stream)
        cause = error if isinstance(error, ssl.SSLError) else error.__cause__
        raise ConnectFailed(tls_words(cause)) from error
    except BaseException:
        sock.close()
        _take_apart(stream)
        raise
    return TlsTransport(stream)


def _take_apart(stream: trio.SSLStream[trio.SocketStream]) -> None:
    """Free a stream that is not used any more: 30 KB, which it would keep as part of a cycle.

    The collector of cycles comes by once in hours here, and a server whose certificate has expired
    is connected to every second.
    """
    vars(stream).clear()


def _why_lost(error: Exception) -> str:
    """Why a TLS stream that stood does no more."""
    cause = error if isinstance(error, ssl.SSLError) else error.__cause__
    if isinstance(cause, ssl.SSLEOFError):
        return "cut: TLS was not closed (close_notify)"
    if isinstance(cause, ssl.SSLError):
        return tls_words(cause)
    return str(cause or error) or "closed"


_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"})


def tls_words(error: BaseException | None) -> str:
    """Why a TLS handshake failed, for an operator."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason in _NO_TLS:
        return "TLS failed: it does not speak TLS there, should its url begin with http://?"
    if isinstance(error, ssl.SSLEOFError) or not isinstance(error, ssl.SSLError):
        return "TLS failed: it closed the connection during the handshake"
    return f"TLS failed: {(error.reason or str(error)).replace('_', ' ').lower()}"
