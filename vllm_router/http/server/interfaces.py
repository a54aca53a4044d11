"""Interfaces between the listener and its surroundings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import trio

from vllm_router.http.server.limits import Limits
from vllm_router.http.server.tls_stream import TlsStream

Address = tuple[str, int]

Stream = trio.SocketStream | TlsStream


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counters of a listener."""

    connections: int
    """Open connections, with the lane and with Hypercorn."""
    lane: int
    hypercorn: int
    accepted: int
    """Connections since the start."""
    handed_over: int
    """Number of them that moved from the lane to Hypercorn."""
    lane_requests: int
    """Requests served by the lane."""
    refused: int
    """Requests the lane refused for their form, size or slowness."""


class ConnectionHandler(Protocol):
    """Serves connections that the lane does not.

    With `closing`, every HTTP/1.1 response is the last one of its connection.
    """

    closing: bool

    @property
    def connections(self) -> int:
        """Number of open connections."""
        ...

    async def serve(self, stream: Stream, data: bytes = b"") -> None:
        """Serve one connection to its end; `data` has been read from it already."""
        ...

    def use_limits(self, limits: Limits) -> None:
        """Serve new connections within these limits."""
        ...

    def close_idle(self, seconds: float) -> None:
        """Close connections that have waited this long for a request."""
        ...

    def drain(self) -> None:
        """Close idle connections, and the others after their response."""
        ...

    def abort(self) -> None:
        """End every connection now."""
        ...


class AcceptPolicy(Protocol):
    """Decides which of several processes accepts the next connections."""

    async def turn(self) -> int:
        """Wait until this process may accept; the number of connections it may accept then."""
        ...

    def count(self, connections: int) -> None:
        """Report the number of open connections."""
        ...
