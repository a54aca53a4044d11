"""Carries what httpx asks over our own HTTP/1.1 client.

A hundred servers are scraped two hundred times a second: with httpcore that takes a sixth of a
core, so a quarter of what carrying each request costs a busy router.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import trio

from vllm_router.errors import ConnectFailed, ConnectionLost, OwnFault, ProtocolViolation
from vllm_router.http.client.client import Answer, Connection, Pool


class Carrier(httpx.AsyncBaseTransport):
    """For one server, whose connections are `pool`'s; closed with the client.

    Bounds no time: the caller does. Raises what httpx's own transports raise, caused by what our
    client raised.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @property
    def doing(self) -> str:
        """What a request waits for before it is sent, see `Pool.doing`; empty once it is."""
        return self._pool.doing

    @property
    def has_address(self) -> bool:
        """Whether there is an address to connect to."""
        return self._pool.has_address

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        try:
            connection, answer = await self._ask(_head_of(request), body)
        except (ConnectFailed, OwnFault) as error:
            raise httpx.ConnectError(str(error), request=request) from error
        except ConnectionLost as error:
            raise _of_httpx(error, request) from error
        stream = _Body(connection, self._pool, request)
        return httpx.Response(answer.status, headers=answer.headers, stream=stream)

    async def _ask(self, head: bytes, body: bytes) -> tuple[Connection, Answer]:
        pool, now = self._pool, trio.current_time()
        pool.sweep(now)
        connection = pool.take_idle(now)
        while True:
            if connection is None:
                connection = await pool.open(now)
            else:
                pool.doing = ""  # another attempt may have been given up
            try:
                await connection.send(head, body)
                return connection, await connection.read_head()
            except ConnectionLost as error:
                connection.close()
                if not connection.reused or isinstance(error, ProtocolViolation):
                    raise
                connection = None  # closed while it was idle: once more on a new one
            except BaseException:
                connection.close()
                raise

    async def aclose(self) -> None:
        self._pool.close()


class _Body(httpx.AsyncByteStream):
    """The rest of an answer. Its connection is kept if all of it has been read."""

    def __init__(self, connection: Connection, pool: Pool, request: httpx.Request) -> None:
        self._connection: Connection | None = connection
        self._pool = pool
        self._request = request

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        connection = self._connection
        if connection is None:
            raise StopAsyncIteration
        try:
            piece = await connection.read_body()
        except ConnectionLost as error:
            raise _of_httpx(error, self._request) from error
        if not piece:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool.give_back(connection, trio.current_time())


def _of_httpx(error: ConnectionLost, request: httpx.Request) -> httpx.TransportError:
    kind = httpx.RemoteProtocolError if isinstance(error, ProtocolViolation) else httpx.ReadError
    return kind(str(error), request=request)


def _head_of(request: httpx.Request) -> bytes:
    lines = [b"%b %b HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [name.lower() + b": " + value for name, value in request.headers.raw]
    return b"\r\n".join(lines) + b"\r\n\r\n"
