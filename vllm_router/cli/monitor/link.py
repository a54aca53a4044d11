"""The connection to a router's feed, with reconnection."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

import msgspec
import trio
import trio_websocket

from vllm_router.cli.router_client import NoRouter, client_context
from vllm_router.errors import RouterError
from vllm_router.http.client.tls_transport import describe_tls_error
from vllm_router.runtime.own_machine import find_socket, short_path
from vllm_router.web.schema import Event, Hello, Snapshot

CONNECT_TIMEOUT = 5.0
SILENCE = 10.0
"""Seconds without a message, beyond a few feed intervals, after which a connection is dead."""

FIRST_PAUSE = 0.25
LONGEST_PAUSE = 4.0
GOING_AWAY = 1001
MAX_MESSAGE = 64 * 1024 * 1024
"""Bytes; the history of a thousand servers takes some megabytes."""

_Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]
_NO_CONNECTION = (
    trio_websocket.HandshakeError,
    trio_websocket.ConnectionClosed,
    trio.BrokenResourceError,
    trio.TooSlowError,
    OSError,
)
Message = Hello | Snapshot | Event
_decode = msgspec.json.Decoder(Message).decode


class NoFeed(RouterError):
    """The feed cannot be read; the message is for the user."""


class GoingAway(NoFeed):
    """The router is shutting down."""


class Feed:
    """The messages of the router at `url` (http or https, perhaps without scheme)."""

    def __init__(self, url: str, key: str | None = None, ca: str | None = None) -> None:
        """`key` and `ca` as in `RouterClient`."""
        self.key, self.ca = key, ca
        self._headers = [(b"authorization", b"Bearer " + key.encode())] if key else None
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        scheme, _, rest = self.url.partition("://")
        self._address = f"{'wss' if scheme in ('https', 'wss') else 'ws'}://{rest}/ws/load"
        self._silence = SILENCE

    async def once(self, take: Callable[[Message], None]) -> None:
        """Read one connection until it ends, which always raises NoFeed.

        A router on this machine is reached through its Unix socket.
        """
        failure: NoFeed | None = None
        try:
            parts = urlsplit(self._address)
            with trio.fail_after(CONNECT_TIMEOUT) as patience:
                stream = await self._connect(parts)
                async with trio.open_nursery() as nursery, stream:
                    connection = await trio_websocket.wrap_client_stream(
                        nursery,
                        stream,
                        parts.netloc,
                        parts.path,
                        extra_headers=self._headers,
                        max_message_size=MAX_MESSAGE,
                    )
                    patience.deadline = float("inf")
                    try:
                        await self._read(connection, take)
                    except NoFeed as error:
                        failure = error  # raised outside of the nursery, which would wrap it
                    nursery.cancel_scope.cancel(reason="the connection was lost")
        except* _NO_CONNECTION as group:
            failure = failure or NoFeed(_words(group))
        except* ValueError as group:  # not a URL
            failure = NoFeed(f"{self.url}: {_innermost(group)}")
        if failure is not None:
            raise failure

    async def _connect(self, parts: SplitResult) -> _Stream:
        """Raises NoFeed for a CA file that cannot be read, OSError, ValueError."""
        path = find_socket(self.url)
        if path is not None:
            with short_path(path) as short:
                # SocketStream works for Unix sockets, too.
                like_tcp: trio.SocketStream = await trio.open_unix_socket(short)
            return like_tcp
        host, port = parts.hostname or "", parts.port
        if parts.scheme != "wss":
            return await trio.open_tcp_stream(host, port or 80)
        try:
            context = client_context(self._address, self.ca)
        except NoRouter as error:
            raise NoFeed(str(error)) from None
        stream = await trio.open_ssl_over_tcp_stream(
            host, port or 443, ssl_context=context, https_compatible=True
        )
        try:
            await stream.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    async def _read(
        self, connection: trio_websocket.WebSocketConnection, take: Callable[[Message], None]
    ) -> None:
        while True:
            text = None
            with trio.move_on_after(self._silence):
                try:
                    text = await connection.get_message()
                except trio_websocket.ConnectionClosed as closed:
                    if closed.reason is not None and closed.reason.code == GOING_AWAY:
                        raise GoingAway("the router is stopping") from None
                    raise NoFeed("the router closed the connection") from None
            if text is None:
                seconds = f"{self._silence:g}"
                raise NoFeed(f"the router was silent for {seconds} s")
            try:
                message = _decode(text)
            except msgspec.DecodeError as error:
                raise NoFeed(f"not the feed of a vLLM Router: {error}") from None
            if isinstance(message, Hello):
                self._silence = SILENCE + 4 * message.config.feed_interval
            take(message)

    async def follow(
        self, take: Callable[[Message], None], lost: Callable[[NoFeed], None], *, patient: bool
    ) -> None:
        """Reconnect until cancelled.

        Without `patient`, raises NoFeed if the first connection fails.
        """
        pause = FIRST_PAUSE
        came = False

        def seen(message: Message) -> None:
            nonlocal came, pause
            came, pause = True, FIRST_PAUSE
            take(message)

        while True:
            try:
                await self.once(seen)
            except NoFeed as error:
                if not came and not patient:
                    raise
                lost(error)
            await trio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)


def _words(error: BaseException) -> str:
    """A short description of an error, from the operating system or the router."""
    error = _innermost(error)
    if isinstance(error, trio.TooSlowError | trio_websocket.ConnectionTimeout):
        return "no answer in time"
    if isinstance(error, trio_websocket.ConnectionRejected):
        if error.status_code == 401:
            return "it needs its status or admin key (--key or VLLM_ROUTER_KEY)"
        status = error.status_code
        return f"it answers {status}: it is no vLLM Router, or does not accept this client"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BaseExceptionGroup):
            # One error per address of the host; the last address was tried last.
            cause = _innermost(cause)
        elif isinstance(cause, socket.gaierror):
            return str(cause.strerror)
        elif isinstance(cause, ssl.SSLError):
            return describe_tls_error(cause)
        elif isinstance(cause, OSError) and cause.errno is not None:
            return os.strerror(cause.errno)
        else:
            cause = cause.__cause__ or cause.__context__
    return str(error) or "the router does not speak the feed's protocol"


def _innermost(error: BaseException) -> BaseException:
    """The last error of a group, and of the groups in it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[-1]
    return error
