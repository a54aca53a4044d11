"""The listening sockets of a `Listener`."""

from __future__ import annotations

import errno
import socket

from vllm_router.http.io.keepalive import enable_keepalive, end_when_stalled_for
from vllm_router.http.server.interfaces import Address
from vllm_router.http.server.limits import Limits
from vllm_router.http.server.socket_handover import spread_handshakes

BACKLOG = 2048
"""Connections that wait to be accepted; the kernel allows net.core.somaxconn at most."""

# The kernel buffers at most this many unsent bytes for a slow client; more would only wait there.
_UNSENT_BYTES = 65536


class ListeningSockets:
    """Opens, configures and closes listening sockets."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.all: list[socket.socket] = []
        self.shared: list[socket.socket] = []
        """Sockets with SO_REUSEPORT: other processes may listen at the same address."""
        self._deferred: list[socket.socket] = []
        self._plain_ports: set[int] = set()

    def use_limits(self, limits: Limits) -> None:
        """Give new connections these limits."""
        self._limits = limits
        for sock in self.all:
            self._configure(sock)

    def open(
        self, host: str, port: int, *, reuse_port: bool = False, plain: bool = False
    ) -> list[Address]:
        """See `Listener.open`."""
        try:
            found = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except UnicodeError:  # a name with an empty part, or one of more than 63 characters
            raise socket.gaierror(socket.EAI_NONAME, "no valid host name") from None
        opened: list[socket.socket] = []
        try:
            for family, kind, protocol, _, address in found:
                sock = socket.socket(family, kind, protocol)
                opened.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if reuse_port:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    only = len(found) > 1 or address[0] != "::"
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
                if port == 0 and len(opened) > 1:
                    address = (address[0], opened[0].getsockname()[1], *address[2:])
                sock.bind(address)
                self._configure(sock)
                if not reuse_port:
                    sock.listen(BACKLOG)
        except BaseException:
            for sock in opened:
                sock.close()
            raise
        self.all += opened
        if reuse_port:
            self.shared += opened
        if plain:
            self.allow_plain(opened[0].getsockname()[1])
        return [sock.getsockname()[:2] for sock in opened]

    def adopt(self, fileno: int, *, later: bool = False) -> Address:
        """See `Listener.adopt`."""
        sock = socket.socket(fileno=fileno)
        try:
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                raise OSError(errno.EAFNOSUPPORT, "the passed socket is not a TCP socket")
            address: Address = sock.getsockname()[:2]
            sock.set_inheritable(False)
            self._configure(sock)
            if not later:
                sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
        self.all.append(sock)
        if later:
            self._deferred.append(sock)
        return address

    def _configure(self, sock: socket.socket) -> None:
        # Accepted sockets inherit all of these (Linux), which saves system calls per connection.
        sock.setblocking(False)
        enable_keepalive(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end_when_stalled_for(sock, self._limits.write_stall_timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)

    def start(self) -> None:
        """Listen on shared and deferred sockets, too."""
        for sock in self.shared:
            sock.listen(BACKLOG)
            spread_handshakes(sock)
        for sock in self._deferred:
            sock.listen(BACKLOG)

    def allow_plain(self, port: int) -> None:
        """Accept plain HTTP on this port even if the others speak TLS only."""
        self._plain_ports.add(port)

    def is_plain(self, sock: socket.socket) -> bool:
        """Whether an accepted socket belongs to a port that accepts plain HTTP."""
        try:
            return sock.getsockname()[1] in self._plain_ports
        except OSError:
            return False

    def addresses(self) -> list[Address]:
        return [sock.getsockname()[:2] for sock in self.all]

    def close(self) -> None:
        for sock in self.all:
            sock.close()
        self.all.clear()
