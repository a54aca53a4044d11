"""Transport over TLS, and TLS errors in words for operators."""

from __future__ import annotations

import math
import socket
import ssl
from collections.abc import Callable

import trio

from vllm_router.errors import ConnectFailed, ConnectionLost
from vllm_router.http.io.async_socket import READ_SIZE
from vllm_router.http.io.trio_internals import release_ssl_stream

_TLS_ERRORS = (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError)

_NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"})

TLS_PIECE = 262144
"""Bytes of a request body that are encrypted at a time."""


class TlsTransport:
    """See `Transport`. Owns the stream and its socket.

    If the stream ends without the peer's close_notify, `read` raises ConnectionLost: nothing else
    distinguishes the end of a body without a length from a lost connection (RFC 9112 section 9.8).
    """

    can_stream = False

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self._stream = stream
        self._socket = stream.transport_stream.socket
        self._closed = False

    async def read(self, until: float = math.inf, size: int = READ_SIZE) -> bytes:
        try:
            return bytes(await self._stream.receive_some(size))
        except _TLS_ERRORS as error:
            raise ConnectionLost(_reason(error)) from error

    def interrupt(self) -> bool:
        return False

    async def stream_into(self, take: Callable[[bytes], bool]) -> None:
        while take(await self.read()):
            pass

    def write_nowait(self, head: bytes, body: bytes) -> bool:
        return False

    async def write(self, head: bytes, body: bytes) -> bool:
        try:
            if len(body) <= READ_SIZE:
                await self._stream.send_all(head + body)
                return True
            # In pieces, so that only one piece exists as an encrypted copy.
            await self._stream.send_all(head)
            whole = memoryview(body)
            for start in range(0, len(body), TLS_PIECE):
                await self._stream.send_all(whole[start : start + TLS_PIECE])
            return True
        except _TLS_ERRORS as error:
            raise ConnectionLost(_reason(error)) from error

    def is_alive(self) -> bool:
        # Input on an idle connection is most likely close_notify: session tickets arrived with
        # the first response.
        return not self._closed and not self._socket.is_readable()

    def close(self) -> None:
        self._closed = True
        self._socket.close()
        # A server with an expired certificate is connected to every second.
        release_ssl_stream(self._stream)


async def start_tls(sock: socket.socket, host: str, context: ssl.SSLContext) -> TlsTransport:
    """TLS handshake on a connected socket. Raises ConnectFailed; any failure closes the socket."""
    # Python sets this option, with which OpenSSL takes any end of the stream for an orderly one.
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    stream = trio.SSLStream(
        trio.SocketStream(trio.socket.from_stdlib_socket(sock)), context, server_hostname=host
    )
    try:
        await stream.do_handshake()
    except (trio.BrokenResourceError, ssl.SSLError) as error:
        sock.close()
        release_ssl_stream(stream)
        # A local name for the cause would be a cycle: cause, its traceback, this frame.
        raise ConnectFailed(describe_tls_error(_tls_error(error))) from error
    except BaseException:
        sock.close()
        release_ssl_stream(stream)
        raise
    return TlsTransport(stream)


def _reason(error: Exception) -> str:
    """Why an established TLS stream failed."""
    cause = _tls_error(error)
    if _is_eof(cause):
        return "connection cut: the server did not end TLS (close_notify)"
    if isinstance(cause, ssl.SSLError):
        return describe_tls_error(cause)
    return str(cause or error) or "closed"


def _tls_error(error: Exception) -> BaseException | None:
    """The error of OpenSSL, which Trio's own may wrap."""
    return error if isinstance(error, ssl.SSLError) else error.__cause__


def _is_eof(error: BaseException | None) -> bool:
    """Whether the other side ended the connection without ending TLS.

    With OpenSSL 3, Python 3.11.2 raises a plain SSLError.
    """
    if isinstance(error, ssl.SSLEOFError):
        return True
    return isinstance(error, ssl.SSLError) and error.reason == "UNEXPECTED_EOF_WHILE_READING"


def describe_tls_error(error: BaseException | None) -> str:
    """Why a TLS handshake failed, in words for operators."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason in _NOT_TLS:
        return "TLS failed: the port does not speak TLS; should the url begin with http://?"
    if _is_eof(error) or not isinstance(error, ssl.SSLError):
        return "TLS failed: the server closed the connection during the handshake"
    return f"TLS failed: {(error.reason or str(error)).replace('_', ' ').lower()}"
