"""Whole messages between two processes, with descriptors where needed.

A pair of sequenced-packet sockets: a message is there or not, never in part, so that a process
that dies in the middle of something leaves no half of it behind. What it had not read yet is read
by its successor, for the parent keeps both ends open.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Sequence

import trio

LARGEST = 160_000
"""Bytes of a message; the kernel takes some 200 000 (net.core.wmem_default)."""

_DESCRIPTORS = socket.CMSG_SPACE(array.array("i").itemsize)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a channel. Raises OSError."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Channel:
    """One end. `close` closes it; closing does not end what others hold of the same end."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._sending = trio.Lock()

    async def send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """Raises trio.BrokenResourceError if nobody holds the other end."""
        ancillary = []
        if descriptors:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        async with self._sending:
            while True:
                try:
                    self._socket.sendmsg([message], ancillary)
                    return
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._socket)
                except OSError as error:
                    if error.errno == errno.ENOBUFS:
                        await trio.sleep(0.001)
                        continue
                    raise trio.BrokenResourceError(str(error)) from error

    def send_now(self, message: bytes) -> bool:
        """Send without waiting; False if there is no room or nobody at the other end."""
        try:
            self._socket.sendmsg([message])
        except OSError:
            return False
        return True

    async def receive(self) -> tuple[bytes, int | None]:
        """A message and the descriptor that came along, which the caller closes.

        The message is empty once nobody holds the other end.
        """
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                data, ancillary, _, _ = self._socket.recvmsg(LARGEST + 1, _DESCRIPTORS)
            except BlockingIOError:
                continue
            except OSError:
                return b"", None
            return data, _descriptor(ancillary)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


def _descriptor(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    for spare in found[1:]:
        os.close(spare)
    return found[0] if found else None
