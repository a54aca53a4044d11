"""Unix sockets for the commands on this machine, accessible to the router's user only.

Requests received here are marked in the ASGI scope; requests from TCP ports never have the mark.
`own_machine` has the paths and the commands' side.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import socket
from collections.abc import Iterable, Mapping

import trio

from vllm_router.http.asgi_types import OWN_MACHINE, App, Receive, Scope, Send
from vllm_router.http.http_error import OnRejected
from vllm_router.http.hypercorn.handler import HypercornHandler
from vllm_router.http.hypercorn.streams import Relay
from vllm_router.http.server.interfaces import Address
from vllm_router.http.server.limits import Limits
from vllm_router.runtime.own_machine import (
    ROOT,
    SUFFIX,
    NoDirectory,
    open_directory,
    path_in,
    socket_name,
    user_of,
)

logger = logging.getLogger(__name__)

_BACKLOG = 64

_PAUSE_S = 0.1
"""Seconds without accepting when descriptors or memory have run out."""

_SWEEP_S = 0.1
"""Seconds for the socket file of a dead router to refuse a connection."""

_HERE = ("local", 0)
"""Stands for the client's address, which a Unix socket does not have."""


class LocalSockets:
    """The listening sockets and their files.

    `close` removes the files that this router still owns.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.sockets: list[socket.socket] = []
        self._environ = environ
        self._directory: int | None = None
        self._files: list[tuple[str, int]] = []

    def open(self, addresses: Iterable[Address]) -> None:
        """Listen on one Unix socket per TCP address.

        Without a private directory the router serves without Unix sockets and logs that
        administration needs a key.
        """
        try:
            self._directory, place = open_directory(os.geteuid(), self._environ)
            _sweep(self._directory)
            for address in dict.fromkeys(addresses):
                self._listen(self._directory, socket_name(address))
        except (OSError, NoDirectory) as error:
            logger.warning(
                "cannot create a Unix socket for local commands: %s. Administration needs "
                "auth.admin_key, or XDG_RUNTIME_DIR set to a directory of the router's user.",
                error,
            )
            self.close()
            return
        logger.debug("Unix sockets for local commands in %s", place)

    def _listen(self, directory: int, name: str) -> None:
        """Bind under a temporary name, then rename: a successor replaces the file atomically."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sockets.append(sock)
        fresh = f".{name}.{secrets.token_hex(8)}"
        sock.bind(path_in(directory, fresh))
        os.chmod(fresh, 0o600, dir_fd=directory)
        sock.listen(_BACKLOG)
        inode = os.stat(fresh, dir_fd=directory).st_ino
        os.rename(fresh, name, src_dir_fd=directory, dst_dir_fd=directory)
        self._files.append((name, inode))

    def close(self) -> None:
        """Close the sockets and remove their files. Idempotent."""
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()
        if self._directory is None:
            return
        for name, inode in self._files:
            with contextlib.suppress(OSError):
                if os.stat(name, dir_fd=self._directory).st_ino == inode:
                    os.unlink(name, dir_fd=self._directory)
        self._files.clear()
        os.close(self._directory)
        self._directory = None


def _sweep(directory: int) -> None:
    """Remove the socket files of routers that were killed."""
    for name in os.listdir(directory):
        if not name.endswith(SUFFIX):
            continue
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_SWEEP_S)
            try:
                sock.connect(path_in(directory, name))
            except ConnectionRefusedError:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=directory)
            except OSError:
                continue  # a router listens there, or the file is gone already


class LocalListener:
    """Serves connections of the Unix sockets, and marks their requests as local."""

    def __init__(
        self,
        app: App,
        sockets: Iterable[socket.socket],
        *,
        limits: Limits | None = None,
        on_rejected: OnRejected | None = None,
    ) -> None:
        """The caller closes the sockets."""

        async def from_here(scope: Scope, receive: Receive, send: Send) -> None:
            scope[OWN_MACHINE] = True
            await app(scope, receive, send)

        self._sockets = list(sockets)
        self._handler = HypercornHandler(from_here, limits=limits, on_rejected=on_rejected)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            for sock in self._sockets:
                sock.setblocking(False)
                nursery.start_soon(self._accept, sock, nursery)
            task_status.started()

    async def _accept(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno == errno.ECONNABORTED:
                    continue
                logger.error(
                    "cannot accept local connections, trying again in %g s: %s", _PAUSE_S, error
                )
                await trio.sleep(_PAUSE_S)
                continue
            if user_of(sock) not in (os.geteuid(), ROOT):
                sock.close()
                continue
            sock.setblocking(False)
            nursery.start_soon(self._serve, sock)

    async def _serve(self, sock: socket.socket) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        await self._handler.serve(stream, relay=Relay(_HERE, _HERE, ""))
