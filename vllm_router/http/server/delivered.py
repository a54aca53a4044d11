"""Waiting until the peer has all that was written to a socket."""

from __future__ import annotations

import array
import fcntl
import socket
import termios

import trio

_LOOK_EVERY_S = 0.01

Socket = socket.socket | trio.socket.SocketType


async def delivered(sock: Socket, seconds: float) -> None:
    """Wait until the peer's kernel has acknowledged everything, or is gone, or time is up.

    To be called before a reset, which throws away what has not left yet. What has arrived can
    still be read by the peer: Linux keeps it.
    """
    with trio.move_on_after(seconds):
        while _unacknowledged(sock):  # noqa: ASYNC110 (the kernel does not tell)
            await trio.sleep(_LOOK_EVERY_S)


def _unacknowledged(sock: Socket) -> int:
    """Bytes in the send queue (SIOCOUTQ, tcp(7)); 0 for a socket that is closed."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    except (OSError, ValueError):
        return 0
    return count[0]
