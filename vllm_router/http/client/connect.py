"""TCP connections to servers."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

import trio

from vllm_router.errors import ConnectFailed, OwnFault
from vllm_router.http.client.resolver import Address
from vllm_router.http.io.keepalive import enable_keepalive

_LOCAL_ERRORS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}
)
"""Errors of this machine rather than of the server."""

SLOW_AFTER = 0.25
"""Seconds after which a connection attempt is slow (RFC 8305 section 5: Connection Attempt Delay).
"""


async def connect(address: Address, on_slow: Callable[[], None] | None = None) -> socket.socket:
    """A connected non-blocking socket with TCP_NODELAY and keepalive.

    `on_slow` is called if the attempt takes longer than SLOW_AFTER; the attempt continues. The
    caller bounds the time and closes the socket. Raises ConnectFailed or OwnFault.
    """
    family, target = address
    sock = None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        enable_keepalive(sock)
        code = sock.connect_ex(target)
        if code == errno.EINPROGRESS:
            await _wait_until_connected(sock, on_slow)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except OSError as error:
        if sock is not None:
            sock.close()
        if error.errno in _LOCAL_ERRORS:
            raise OwnFault(str(error)) from error
        raise ConnectFailed(error.strerror or str(error)) from error
    except BaseException:
        if sock is not None:
            sock.close()
        raise
    return sock


async def _wait_until_connected(sock: socket.socket, on_slow: Callable[[], None] | None) -> None:
    """Wait until the connection attempt has succeeded or failed."""
    if on_slow is not None:
        with trio.move_on_after(SLOW_AFTER):
            await trio.lowlevel.wait_writable(sock)
            return
        on_slow()
    await trio.lowlevel.wait_writable(sock)
