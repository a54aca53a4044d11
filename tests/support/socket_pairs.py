"""Connected pairs: an `AsyncSocket` of the router and the plain socket of its peer."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vllm_router.http.io.async_socket import READ_SIZE, AsyncSocket
from vllm_router.http.io.sockets import async_socket


@contextmanager
def pair(hung_up: Callable[[], None] | None = None) -> Iterator[tuple[AsyncSocket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    wire = async_socket(ours, hung_up)
    try:
        yield wire, theirs
    finally:
        wire.detach()
        ours.close()
        theirs.close()


def received(peer: socket.socket) -> bytes:
    try:
        return peer.recv(READ_SIZE)
    except BlockingIOError:
        return b""
