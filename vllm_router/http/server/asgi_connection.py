"""One client connection as ASGI: scope, receive and send."""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Awaitable
from typing import Any
from urllib.parse import unquote_to_bytes

import trio

from vllm_router.http.asgi_types import CANCEL_ON_DISCONNECT, HEAD_MEMO, OUTLET, Message, Scope
from vllm_router.http.http_error import HttpError
from vllm_router.http.io.async_socket import READ_SIZE
from vllm_router.http.request_head import Head
from vllm_router.http.server.host import Host
from vllm_router.http.server.request_reader import ARRIVING, COMPLETE, DELIVERED, RequestReader

log = logging.getLogger(__name__)

BODY_READ_SIZE = 1 << 20
"""Bytes of one read while more than READ_SIZE of a body is known to follow, and for the requests
that follow on its connection: each read costs a turn of the loop."""

SENDS_PER_CHECKPOINT = 16
"""Sends that did not wait, after which other tasks get their turn."""


class ClientDisconnected(OSError):
    """The connection has ended: nothing can be sent (the ASGI specification asks for OSError)."""


class Presence(enum.Enum):
    """Whether the client is still there."""

    HERE = enum.auto()
    HUNG_UP = enum.auto()  # it has closed its side, but unread bytes may precede the end
    GONE = enum.auto()  # it has left: nothing can be read or sent


HERE, HUNG_UP, GONE = Presence.HERE, Presence.HUNG_UP, Presence.GONE
"""Module-level names, see `ARRIVING` in `request_reader.py`."""


class AsgiConnection(RequestReader):
    """Runs the application for one request after the other. Subclasses do the I/O.

    `_presence` is the client's. `_error`: the connection ends with this error. `_scope` surrounds
    the application: cancelling it ends the connection.
    """

    __slots__ = (
        "_client",
        "_error",
        "_finished",
        "_host",
        "_local",
        "_presence",
        "_read_size",
        "_reading",
        "_scope",
        "_sends",
        "deadline",
    )

    scheme = "http"
    is_outlet = False
    """Whether the connection is an `Outlet`, too."""

    def __init__(
        self,
        host: Host,
        client: tuple[str, int] | None = None,
        local: tuple[str, int] | None = None,
    ) -> None:
        # Nothing else of a connection but its head decides how a request is treated.
        super().__init__(host, (client and client[0], local, self.scheme))
        self._host = host
        self._client = client
        self._local = local
        self._scope = trio.CancelScope()
        self.deadline = math.inf
        self._sends = 0
        self._presence = HERE
        self._error: HttpError | None = None
        self._finished: trio.Event | None = None
        self._reading = False
        self._read_size = READ_SIZE

    # -- I/O of subclasses ---------------------------------------------------------------------

    def _read(self, size: int = READ_SIZE) -> Awaitable[bytes]:
        """1 to `size` bytes, or more if they were read ahead; b"" when the client has left.

        Raises OSError. Loses no data when cancelled.
        """
        raise NotImplementedError

    def _write_now(self, data: bytes) -> bool:
        """Begin to send. False if the caller must await `_write_rest`. Raises OSError."""
        raise NotImplementedError

    async def _write_rest(self, data: bytes) -> None:
        """Wait until the bytes given to `_write_now` have been sent. Raises OSError."""
        raise NotImplementedError

    # -- ends ----------------------------------------------------------------------------------

    def client_left(self) -> None:
        """End the connection at once and cancel the application: the client has left."""
        self._presence = GONE
        self.deadline = math.inf
        self._scope.cancel(reason="client disconnected")

    def refuse(self, error: HttpError) -> None:
        """End the connection with an error response, unless a response has begun."""
        self._host.refused += 1
        head = self._head
        if head is not None:
            error.path = head.path
            error.request_id = dict(head.headers).get(b"x-request-id")
        self._error = error
        self.deadline = math.inf
        self._scope.cancel(reason=error.code)

    # -- the application -----------------------------------------------------------------------

    async def _respond(self, head: Head) -> None:
        """Run the application for one request."""
        host = self._host
        host.requests += 1
        if self._presence is HUNG_UP and self._body is not ARRIVING:
            self.client_left()
        path = head.path
        extensions: dict[str, Any] = {CANCEL_ON_DISCONNECT: {}, HEAD_MEMO: head.memo}
        if self.is_outlet:
            extensions[OUTLET] = self
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": head.http_version,
            "method": head.method,
            "scheme": self.scheme,
            "path": (unquote_to_bytes(path) if b"%" in path else path).decode("utf-8", "replace"),
            "raw_path": path,
            "query_string": head.query,
            "root_path": "",
            "headers": head.headers,
            "client": self._client,
            "server": self._local,
            "extensions": extensions,
        }
        try:
            await host.app(scope, self._receive, self._send)
        except ClientDisconnected:
            return
        except Exception:
            # A bug of the application: this connection ends, all others continue.
            level = logging.DEBUG if self._presence is GONE else logging.ERROR
            target = path.decode("ascii")
            log.log(level, "the application failed: %s %s", head.method, target, exc_info=True)
        response = self._response
        if response is not None and not response.started and self._presence is not GONE:
            self.refuse(HttpError(500, "internal_error", "internal error"))

    async def _receive(self) -> Message:
        pieces = self._pieces
        while not pieces:
            head, response = self._head, self._response
            if self._presence is GONE or head is None or response is None or response.finished:
                await trio.lowlevel.checkpoint()  # where the application is cancelled
                return {"type": "http.disconnect"}
            if self._error is not None:
                await trio.sleep_forever()  # until the application is cancelled
            if self._reading:
                raise RuntimeError("two tasks receive from one connection")
            if self._body is ARRIVING:
                if head.expects_continue and not response.started:
                    head.expects_continue = False
                    await self._write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                await self._read_body()
            elif self._body is COMPLETE:
                break
            else:
                # The application waits for http.disconnect.
                if self._finished is None:
                    self._finished = trio.Event()
                await self._finished.wait()
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        more = self._body is ARRIVING
        if not more:
            self._body = DELIVERED
        return {"type": "http.request", "body": body, "more_body": more}

    async def _read_body(self) -> None:
        """Wait for more of the current request's body, within the limits on slow clients."""
        limits, now = self._limits, self._host.now()
        credit = self._body_received / limits.min_body_rate - self._body_waited
        self.deadline = now + limits.body_read_timeout + min(0.0, credit)
        self._reading = True
        try:
            if self._unfed:
                data, self._unfed = self._unfed, b""
                await trio.lowlevel.checkpoint()
            else:
                if self._left > READ_SIZE:
                    self._read_size = BODY_READ_SIZE
                data = await self._read(self._read_size)
        except OSError:
            data = b""
        finally:
            self._reading = False
            self.deadline = math.inf
            self._body_waited += self._host.now() - now
        if data:
            try:
                self._feed_body(data)
            except HttpError as error:
                self.refuse(error)
            if self._presence is HUNG_UP and self._body is not ARRIVING:
                self.client_left()
        else:
            self.client_left()

    async def _send(self, message: Message) -> None:
        response = self._response
        if response is None:
            raise RuntimeError("sent after the end of the request")
        kind = message["type"]
        if kind == "http.response.body":
            # No other response can follow if the request has not been read to its end.
            data = response.encode(message, close=self._body is ARRIVING or self._host.closing)
            wait = self._write(data) if data else None
            if wait is not None:
                await wait
            if self._finished is not None and response.finished:
                self._finished.set()
        elif kind == "http.response.start":
            response.hold(message)
        else:
            raise RuntimeError(f"unexpected message {kind!r}")

    async def _write_all(self, data: bytes) -> None:
        """Send, with a checkpoint every SENDS_PER_CHECKPOINT sends. Raises ClientDisconnected."""
        wait = self._write(data)
        if wait is not None:
            await wait

    def _write(self, data: bytes) -> Awaitable[None] | None:
        """Like `_write_all`, but returns the rest of the wait for the caller to await, if any."""
        if self._presence is GONE:
            raise ClientDisconnected("the client has left")
        try:
            written = self._write_now(data)
        except OSError as error:
            return self._fail(error)
        if not written:
            return self._write_on(data)
        self._sends += 1
        if self._sends % SENDS_PER_CHECKPOINT:
            return None
        return trio.lowlevel.checkpoint()  # noqa: ASYNC105 (the caller awaits it)

    async def _write_on(self, data: bytes) -> None:
        try:
            await self._write_rest(data)
        except OSError as error:
            await self._fail(error)

    async def _fail(self, error: OSError) -> None:
        self.client_left()
        await trio.lowlevel.checkpoint()  # where the application is cancelled
        raise ClientDisconnected("the client has left") from error
