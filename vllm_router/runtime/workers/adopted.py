"""Connections that workers have handed over, served in the leader."""

from __future__ import annotations

import logging
import math
import os
import socket

import trio

from vllm_router.http.hypercorn.handler import HypercornHandler
from vllm_router.http.hypercorn.streams import Relay
from vllm_router.http.server.listener import FULL_LOG_INTERVAL, IDLE_WHEN_FULL
from vllm_router.runtime.workers.messages import Connection

logger = logging.getLogger(__name__)


class AdoptedConnections:
    """Serves connections in `nursery`, at most `limit` at a time.

    Without the limit, many connections would leave no descriptors for probes.
    """

    def __init__(self, handler: HypercornHandler, nursery: trio.Nursery, limit: int | None) -> None:
        self._handler = handler
        self._nursery = nursery
        self._limit = math.inf if limit is None else limit
        self._open = 0
        self._logged_at = -math.inf

    def adopt(self, message: Connection, fileno: int | None) -> None:
        """Serve a connection. Owns the descriptor; None if it was lost on the way."""
        if fileno is not None and self._open < self._limit:
            self._open += 1
            self._nursery.start_soon(self._serve, message, fileno)
            return
        if fileno is not None:
            os.close(fileno)
        self._handler.close_idle(IDLE_WHEN_FULL)
        now = trio.current_time()
        if now - self._logged_at >= FULL_LOG_INTERVAL:
            self._logged_at = now
            logger.error(
                "connection limit of the leader reached (%d open): closing new connections; raise "
                "the limit of open files (ulimit -n)",
                self._open,
            )

    async def _serve(self, message: Connection, fileno: int) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=fileno)))
        relay = None
        if message.client is not None and message.local is not None:
            relay = Relay(message.client, message.local, message.alpn)
        try:
            await self._handler.serve(stream, message.data, relay)
        finally:
            self._open -= 1
