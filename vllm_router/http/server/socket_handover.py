"""From one process to the next on the same port, without a connection lost.

Two ways. A *passed* socket (systemd's protocol) is the same in both processes: what waits in its
backlog waits for whoever accepts next, so nothing can be lost. With SO_REUSEPORT each process has
a socket and a backlog of its own, and closing one resets what its backlog has got and what is in
the middle of its handshake there: so new handshakes are first sent to the newest socket.
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
"""The descriptor that passed sockets begin with (sd_listen_fds(3))."""

# <asm-generic/socket.h>; Python has no names for them.
_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_DETACH_REUSEPORT_BPF = 68

_BPF_RETURN_CONSTANT = 0x06

_LISTENING = "0A"


def passed_sockets(environ: MutableMapping[str, str]) -> list[int]:
    """The descriptors of the listening sockets that whoever started this process has passed.

    As systemd passes them: LISTEN_FDS of them, if LISTEN_PID is this process. The variables are
    taken out of `environ`: they are not for its children. Raises ValueError if they are no numbers.
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
    """Tell systemd (sd_notify(3)), where it has asked for it: `READY=1`, `STOPPING=1`."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # Whoever does not listen any more does not want to know.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.send(state.encode())


def take_turns(listener: socket.socket) -> None:
    """Handshakes are spread over all sockets of the port; undoes `step_aside` of an earlier one."""
    # There was none, or the kernel is older than 5.3 and keeps it until the port is free.
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)


def step_aside(listener: socket.socket) -> bool:
    """Let new handshakes go to the newest socket of this port, which is another process's.

    False if this is the only one, or if the kernel cannot.
    """
    newest = _listeners_of(listener) - 1
    if newest < 1:
        return False
    program = ctypes.create_string_buffer(struct.pack("=HBBI", _BPF_RETURN_CONSTANT, 0, 0, newest))
    told = struct.pack("@HP", 1, ctypes.addressof(program))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, told)
    except OSError:
        return False
    return True


def _listeners_of(listener: socket.socket) -> int:
    """How many sockets, of any process, listen at the address of this one."""
    address = _in_proc(listener)
    table = "tcp6" if listener.family == socket.AF_INET6 else "tcp"
    try:
        lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    except OSError:
        return 0
    rows = (line.split(maxsplit=4) for line in lines)
    return sum(row[1] == address and row[3] == _LISTENING for row in rows)


def _in_proc(sock: socket.socket) -> str:
    """Its address as /proc/net/tcp writes it: 32-bit words in the machine's order."""
    host, port = sock.getsockname()[:2]
    packed = socket.inet_pton(sock.family, host.partition("%")[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
