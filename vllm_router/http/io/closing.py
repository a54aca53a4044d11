"""Socket state that decides how a connection is closed: peer events, unsent data, resets."""

from __future__ import annotations

import array
import fcntl
import select
import socket
import struct
import termios

import trio

_POLL_INTERVAL_S = 0.01

_LINGER_ZERO = struct.pack("ii", 1, 0)

Socket = socket.socket | trio.socket.SocketType


def has_event(fileno: int, mask: int) -> bool:
    """Whether a `select.POLL*` event of `mask` is pending on the descriptor. Does not block."""
    poll = select.poll()
    poll.register(fileno, mask)
    return bool(poll.poll(0))


def reset_on_close(sock: Socket) -> None:
    """Let `close` send RST instead of FIN, so that no client takes the end for an orderly one."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)


async def wait_until_delivered(sock: Socket, seconds: float) -> None:
    """Wait until the peer's kernel has acknowledged all sent data, at most `seconds`.

    Call it before a reset, which discards unsent data. The peer can still read what has arrived
    (Linux).
    """
    with trio.move_on_after(seconds):
        while _unacknowledged(sock):  # noqa: ASYNC110 (the kernel does not notify)
            await trio.sleep(_POLL_INTERVAL_S)


def _unacknowledged(sock: Socket) -> int:
    """Bytes in the send queue (SIOCOUTQ, tcp(7)); 0 for a closed socket."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    except (OSError, ValueError):
        return 0
    return count[0]
