"""The connections to one server."""

from __future__ import annotations

import enum
import ssl
from urllib.parse import urlsplit

from vllm_router.errors import ConnectFailed
from vllm_router.http.client.connect import connect
from vllm_router.http.client.connection import Connection
from vllm_router.http.client.plain_transport import PlainTransport
from vllm_router.http.client.race import Race
from vllm_router.http.client.resolver import Resolver, literal_address
from vllm_router.http.client.tls_transport import start_tls
from vllm_router.http.client.transport import Transport
from vllm_router.http.head_cache import KnownResponses, ResponseCache

IDLE_LIMIT = 4.0
"""Seconds an idle connection is kept. vLLM's uvicorn closes its side after 5.0. In a large fleet a
server has a request every few seconds, and should not need a new connection for each."""


class Doing(enum.StrEnum):
    """The wait of a new connection."""

    CONNECTION = "connection"
    HANDSHAKE = "TLS handshake"
    RESOLVER = "answer of the resolver"


class Pool:
    """Opens connections and keeps idle ones on a stack, the last used on top. O(1).

    `doing` is None while no connection is being opened.
    """

    def __init__(
        self,
        url: str,
        ssl_context: ssl.SSLContext | None = None,
        resolver: Resolver | None = None,
        *,
        spread: bool = True,
        responses: KnownResponses | None = None,
    ) -> None:
        """`resolver` and `responses` are shared by all servers of a router.

        With `spread`, the addresses of a name are used in turn; without, the first that works.
        """
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl_context if parts.scheme == "https" else None
        if parts.scheme == "https" and ssl_context is None:
            self._tls = ssl.create_default_context()
        self._cache = ResponseCache(responses)
        self._idle: list[Connection] = []
        self._literal = literal_address(self.host, self.port)
        self._name = None if self._literal else (resolver or Resolver()).name(self.host)
        self._spread = spread
        self.doing: Doing | None = None
        self.opened = 0
        self.closed = False

    def take_idle(self, now: float) -> Connection | None:
        """The most recently used idle connection that is still open; None if there is none."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            if now - connection.idle_since < IDLE_LIMIT and connection.is_alive():
                connection.reused = True
                return connection
            connection.close()
        return None

    async def open(self) -> Connection:
        """A new connection; the caller bounds the time. Raises ConnectFailed or OwnFault."""
        if self._literal is not None:
            self.doing = Doing.CONNECTION
            sock = await connect(self._literal)
            if self._tls is None:
                transport: Transport = PlainTransport(sock)
            else:
                self.doing = Doing.HANDSHAKE
                transport = await start_tls(sock, self.host, self._tls)
        else:
            transport = await self._open_by_name()
        self.doing = None
        self.opened += 1
        return Connection(transport, self._cache)

    @property
    def has_address(self) -> bool:
        """Whether an address is known. Without one, a failure is not the server's."""
        return self._name is None or bool(self._name.hosts)

    async def _open_by_name(self) -> Transport:
        assert self._name is not None
        self.doing = Doing.CONNECTION if self._name.hosts else Doing.RESOLVER
        race = Race(self._name, self.port, self.opened if self._spread else 0)
        while True:
            sock, address = await race.next()
            if self._tls is None:
                return PlainTransport(sock)
            self.doing = Doing.HANDSHAKE
            try:
                return await start_tls(sock, self.host, self._tls)
            except ConnectFailed as failure:
                race.on_unusable(address, failure)

    def give_back(self, connection: Connection, now: float) -> None:
        """Keep a connection for the next request if it can serve one, else close it."""
        if connection.reusable and not self.closed:
            connection.idle_since = now
            self._idle.append(connection)
        else:
            connection.close()

    def close_expired(self, now: float) -> None:
        """Close connections that have been idle for IDLE_LIMIT; called periodically."""
        idle = self._idle
        expired = 0
        while expired < len(idle) and now - idle[expired].idle_since >= IDLE_LIMIT:
            idle[expired].close()
            expired += 1
        del idle[:expired]

    @property
    def idle(self) -> int:
        """Number of idle connections."""
        return len(self._idle)

    def close(self) -> None:
        """Close idle connections now, and connections in use when they are given back."""
        self.closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()
