"""httpx transport on the router's own HTTP/1.1 client.

A hundred servers are scraped two hundred times a second, which takes a sixth of a core with
httpcore.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

import httpx
import trio

from vllm_router.errors import ConnectFailed, ConnectionLost, OwnFault, ProtocolViolation
from vllm_router.http.client.connection import Connection
from vllm_router.http.client.pool import Doing, Pool
from vllm_router.http.response_head import ResponseHead


def get_request(url: str, headers: Mapping[str, str]) -> httpx.Request:
    """A GET request with a Host header, unless `headers` has one.

    httpx would decode an international name (xn--…) for it, and raises for names that it takes for
    invalid, some of which are in use.
    """
    return httpx.Request("GET", url, headers={"host": host_of(url), **headers})


def host_of(url: str) -> str:
    """The `host` field of requests to `url`, to be given to httpx: see `get_request`."""
    return urlsplit(url).netloc


class HttpxTransport(httpx.AsyncBaseTransport):
    """Sends requests to one server over the connections of `pool`; closing it closes the pool.

    The caller bounds the time. Raises httpx's transport errors, chained to the client's own.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @property
    def doing(self) -> Doing | None:
        """The wait of a request before it is sent; None afterwards."""
        return self._pool.doing

    @property
    def has_address(self) -> bool:
        """Whether an address is known to connect to."""
        return self._pool.has_address

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        try:
            connection, head = await self._send(_request_head(request), body)
        except (ConnectFailed, OwnFault) as error:
            raise httpx.ConnectError(str(error), request=request) from error
        except ConnectionLost as error:
            raise _httpx_error(error, request) from error
        if request.method == "HEAD":
            connection.close()  # its parser waits for the body that the head announces
            return httpx.Response(head.status, headers=head.headers)
        stream = _Body(connection, self._pool, request)
        return httpx.Response(head.status, headers=head.headers, stream=stream)

    async def _send(self, head: bytes, body: bytes) -> tuple[Connection, ResponseHead]:
        pool, now = self._pool, trio.current_time()
        pool.close_expired(now)
        connection = pool.take_idle(now)
        while True:
            if connection is None:
                connection = await pool.open()
            else:
                pool.doing = None  # a cancelled attempt may have left it set
            try:
                await connection.send(head, body)
                return connection, await connection.read_head()
            except ConnectionLost as error:
                connection.close()
                if not connection.reused or isinstance(error, ProtocolViolation):
                    raise
                connection = None  # the server closed it while it was idle: retry on a new one
            except BaseException:
                connection.close()
                raise

    async def aclose(self) -> None:
        self._pool.close()


class _Body(httpx.AsyncByteStream):
    """The body of a response. Its connection is kept if the body has been read to its end."""

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
            raise _httpx_error(error, self._request) from error
        if not piece:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool.give_back(connection, trio.current_time())


def _httpx_error(error: ConnectionLost, request: httpx.Request) -> httpx.TransportError:
    kind = httpx.RemoteProtocolError if isinstance(error, ProtocolViolation) else httpx.ReadError
    return kind(str(error), request=request)


def _request_head(request: httpx.Request) -> bytes:
    lines = [b"%b %b HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [name.lower() + b": " + value for name, value in request.headers.raw]
    return b"\r\n".join(lines) + b"\r\n\r\n"
