"""Atomic messages between two processes, with file descriptors where needed.

A pair of sequenced-packet sockets: a message arrives whole or not at all, so that a process that
dies leaves no partial message. Its successor reads the unread messages, because the parent keeps
both ends open. A message too long for the socket is sent as a descriptor of shared memory.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Sequence

import trio

logger = logging.getLogger(__name__)

LARGEST = 100_000
"""Largest message in bytes in the socket buffer, which needs twice as much (net.core.wmem_default).
"""

_ELSEWHERE = b"\xc1"
"""Marker: the message is in the memory of the first descriptor.

No MessagePack message and no order of the control channel equals this byte.
"""

_DESCRIPTORS = socket.CMSG_SPACE(2 * array.array("i").itemsize)


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a channel. Raises OSError."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Channel:
    """One end. `close` closes it; other processes may hold the same end."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._sending = trio.Lock()

    async def send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """Raises trio.BrokenResourceError if no process holds the other end."""
        with contextlib.ExitStack() as ending:
            if len(message) > LARGEST:
                memory = os.memfd_create("vllm-router message")
                ending.callback(os.close, memory)
                _fill(memory, message)
                message, descriptors = _ELSEWHERE, (memory, *descriptors)
            await self._send(message, descriptors)

    async def _send(self, message: bytes, descriptors: Sequence[int]) -> None:
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
        """Send without waiting.

        Returns False if the buffer is full or no process holds the other end.
        """
        try:
            self._socket.sendmsg([message])
        except OSError:
            return False
        return True

    async def receive(self) -> tuple[bytes, int | None]:
        """A message and the descriptor that was sent with it, which the caller closes.

        The message is empty if no process holds the other end any more.
        """
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                data, ancillary, _, _ = self._socket.recvmsg(LARGEST + 1, _DESCRIPTORS)
            except BlockingIOError:
                continue
            except OSError:
                return b"", None
            descriptors = _descriptors(ancillary)
            if data == _ELSEWHERE:
                if not descriptors:
                    logger.error(
                        "dropped a message between processes: no file descriptor left; raise the "
                        "limit of "
                        "open files (ulimit -n)"
                    )
                    continue
                data = _emptied(descriptors.pop(0))
            for spare in descriptors[1:]:
                os.close(spare)
            return data, descriptors[0] if descriptors else None

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()


def _fill(memory: int, data: bytes) -> None:
    with open(memory, "wb", closefd=False) as file:
        file.write(data)


def _emptied(memory: int) -> bytes:
    """Read the memory and close the descriptor."""
    with open(memory, "rb") as file:
        file.seek(0)
        return file.read()
