"""Handover of a port from one process to its successor without losing connections.

Two ways. A *passed* socket (systemd's protocol) is the same in both processes: connections in its
backlog wait for either process to accept them. With SO_REUSEPORT each process has a socket and a
backlog of its own, and closing the socket resets the connections in its backlog and handshakes in
progress: so new handshakes are first directed to the newest socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import MutableMapping
from pathlib import Path

FIRST_PASSED = 3
"""The first descriptor of passed sockets (sd_listen_fds(3))."""

# From <asm-generic/socket.h>; Python does not define them.
_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_DETACH_REUSEPORT_BPF = 68

_BPF_RETURN_CONSTANT = 0x06

_LISTENING = "0A"


def passed_sockets(environ: MutableMapping[str, str]) -> list[int]:
    """Descriptors of listening sockets that the parent process has passed, as systemd does.

    LISTEN_FDS of them if LISTEN_PID is this process. Removes the variables from `environ`, so that
    child processes do not inherit them. Raises ValueError for values that are not numbers.
    """
    given = {name: environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
    if not given["LISTEN_FDS"]:
        return []
    for name in ("LISTEN_PID", "LISTEN_FDS"):
        if not given[name].isascii() or not given[name].isdigit():
            raise ValueError(f"{name}: expected a number, got {given[name]!r}")
    if int(given["LISTEN_PID"]) != os.getpid():
        return []
    return list(range(FIRST_PASSED, FIRST_PASSED + int(given["LISTEN_FDS"])))


def notify(state: str, environ: MutableMapping[str, str]) -> None:
    """Notify systemd (sd_notify(3)) if it asked for it: `READY=1`, `STOPPING=1`."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # If systemd no longer listens, the notification has no reader.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.send(state.encode())


def spread_handshakes(listener: socket.socket) -> None:
    """Spread handshakes over all sockets of the port: undo an earlier `redirect_handshakes`."""
    # Fails without one, and on kernels before 5.3, which keep it until the port is free.
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)


def redirect_handshakes(listener: socket.socket) -> bool:
    """Direct new handshakes to the newest socket of this port, which another process owns.

    False if this is the only socket, or if the kernel does not support it.
    """
    newest = _listeners_of(listener) - 1
    if newest < 1:
        return False
    program = ctypes.create_string_buffer(struct.pack("=HBBI", _BPF_RETURN_CONSTANT, 0, 0, newest))
    filter_program = struct.pack("@HP", 1, ctypes.addressof(program))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, filter_program)
    except OSError:
        return False
    return True


def _listeners_of(listener: socket.socket) -> int:
    """Number of sockets, of all processes, that listen at the same address."""
    address = _in_proc(listener)
    table = "tcp6" if listener.family == socket.AF_INET6 else "tcp"
    try:
        lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    except OSError:
        return 0
    rows = (line.split(maxsplit=4) for line in lines)
    return sum(row[1] == address and row[3] == _LISTENING for row in rows)


def _in_proc(sock: socket.socket) -> str:
    """The address as in /proc/net/tcp: 32-bit words in the machine's byte order."""
    host, port = sock.getsockname()[:2]
    packed = socket.inet_pton(sock.family, host.partition("%")[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
