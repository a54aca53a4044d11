"""The choice of the `AsyncSocket` implementation."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import trio

from vllm_router.http.io.async_socket import AsyncSocket
from vllm_router.http.io.hub_socket import HubSocket
from vllm_router.http.io.trio_socket import TrioSocket

VARIABLE = "VLLM_ROUTER_SOCKETS"
"""Environment variable, for tests: `trio` selects the plain implementation, for a whole run."""

_kind = trio.lowlevel.RunVar[type[HubSocket] | type[TrioSocket] | None]("kind", None)


def async_socket(sock: socket.socket, on_hangup: Callable[[], None] | None = None) -> AsyncSocket:
    """Wrap a connected non-blocking socket; the caller detaches and closes it."""
    kind = _kind.get()
    if kind is None:
        kind = TrioSocket if os.environ.get(VARIABLE) == "trio" else HubSocket
        _kind.set(kind)
    return kind(sock, on_hangup)
