"""Hypercorn in our nursery, cured of what stock Hypercorn 0.18 suffers from.

Every name of Hypercorn (and quart-trio) that its documentation does not promise is used in this
file or in hypercorn_websocket.py; a test (tests/integration/test_hypercorn_bridge.py) fails
when one of them changes.

The cures, each with a test of the same subject:

* An exception in one connection ended the whole server (pgjones/hypercorn #225): guarded.
* HTTP/2 requests with a non-ASCII method or path, CONNECT without a path, DATA for an answered
  stream, and floods of PRIORITY frames raised such exceptions: answered or ignored.
* Rapid reset (CVE-2023-44487) started a handler per stream: streams reset in the same read are
  never started, and a connection that resets too many is closed.
* A client that had stopped reading could not be timed out or cancelled: TCP_USER_TIMEOUT, and the
  socket is reset when the connection is cancelled. Over HTTP/2 a client that opens no window had
  the whole answer kept for it, for ever, even when it had left: now it holds the application
  back, and the stream is reset in time.
* Floods of small HTTP/2 frames kept the loop busy: few are worked through at a time, and too many
  end the connection.
* A client's GOAWAY aborted its running requests: they go on, and the connection ends behind them.
* Over HTTP/2 an answer that was broken off never ended: the stream is reset. In a drain the last
  ones lost their ends: the connection is closed behind those.
* Pipelining and leaving leaked a task: a failed send ends the connection's own scope.
* `Upgrade: h2c` is ignored. HTTP/2 with prior knowledge stays possible.
* Both Content-Length and Transfer-Encoding, Transfer-Encoding from HTTP/1.0, a malformed Host, an
  unknown HTTP version or expectation, CONNECT and TRACE are refused, absolute targets understood.
* 100 Continue was said before the application had seen the request: it is when it wants the body.
* Folded lines, bare CR and LF, and chunks are as strictly judged as by the lane (strict_h11.py).
* Websockets buffered without end and worked without a break (hypercorn_websocket.py).
* Request heads have a time limit of their own, and so have silent request bodies.
* Answers have a reason phrase; an early answer is read by a client that still sends.
"""

from __future__ import annotations

import contextlib
import logging
import math
import select
import socket
import ssl
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h11
import hypercorn.trio
import hypercorn.trio.run
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.events import Body, Response, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import (
    BUFFER_HIGH_WATER,
    BufferCompleteError,
    H2Protocol,
    StreamBuffer,
)
from hypercorn.protocol.h11 import H2ProtocolAssumedError, H11Protocol
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.trio.task_group import TaskGroup, _handle
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import EventWrapper, WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr, wrap_app
from hyperframe.frame import GoAwayFrame
from priority.priority import PriorityError

from vllm_router.http.addresses import plain_peer
from vllm_router.http.error_format import path_of
from vllm_router.http.headers import (
    REASONS,
    Refusal,
    RefusalTold,
    check_method,
    malformed,
    split_target,
    too_large,
    valid_host,
)
from vllm_router.http.hypercorn.allowance import Allowance
from vllm_router.http.hypercorn.h2_frames import FrameCutter
from vllm_router.http.hypercorn.strict_h11 import StrictConnection
from vllm_router.http.hypercorn.websocket import GuardedWebsocket
from vllm_router.http.io.keepalive import enable_keepalive
from vllm_router.http.request_ids import request_id
from vllm_router.http.server.delivered import delivered
from vllm_router.http.server.server import App, Limits, Message, Scope
from vllm_router.http.server.tls_stream import end_tls, take_apart

log = logging.getLogger(__name__)

SERVER_LOG = logging.getLogger("vllm_router.hypercorn")

ALPN_PROTOCOLS = ["h2", "http/1.1"]

# Where Hypercorn's default breaks streams or bursts (left side: the attribute of its Config).
TUNED: dict[str, Any] = {
    "alpn_protocols": ALPN_PROTOCOLS,
    "backlog": 2048,  # 100 made bursts wait for SYN retries
    "errorlog": SERVER_LOG,
    "graceful_timeout": 1.0,  # after our own drain
    "h11_max_incomplete_size": 61440,
    "h2_max_concurrent_streams": 100,
    "include_server_header": False,
    "keep_alive_max_requests": 1_000_000,
    "keep_alive_timeout": 75.0,  # above the idle timeout of the usual load balancers
    "websocket_max_message_size": 65536,  # a feed is read, not written
    "websocket_ping_interval": 20.0,  # notices vanished dashboards
}

HEAD_OVERHEAD = len("  HTTP/1.1\r\n\r\n")

MAX_RESETS = 100
"""Streams that one HTTP/2 connection may reset, and one more for every second of its age."""

HTTP2_READ_SIZE = 16384

HTTP2_BURST, HTTP2_FRAMES_PER_SECOND = 5000, 100.0
"""Frames without a request that an HTTP/2 client may send at once, and in the long run."""

UPDATES_PER_FRAME = 4
"""Window updates that each frame of an answer allows on top."""

GOODBYE = 0.2
"""Seconds between the last answer on an HTTP/2 connection and its end, in a drain."""

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def tune(config: Config) -> None:
    """Replace what still stands at Hypercorn's defaults; what the user chose stays."""
    for name, value in TUNED.items():
        if name not in vars(config) and getattr(config, name) == getattr(Config, name):
            setattr(config, name, value)


def hold_last(inner: App) -> App:
    """Send the final body message after `inner` has returned.

    On that message Hypercorn recycles the connection, and quart-trio reacts to the recycling by
    cancelling the task that does it: connections were never closed nor their idle timer armed,
    and after an early answer the next request hung.
    """

    async def asgi(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await inner(scope, receive, send)
            return
        last: Message | None = None

        async def send_all_but_last(message: Message) -> None:
            nonlocal last
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                last = message
            else:
                await send(message)

        await inner(scope, receive, send_all_but_last)
        if last is not None:
            await send(last)

    return asgi


HANGUP_POLL = 0.25
"""Seconds between looks whether the client of a paused reader is still there."""

Address = tuple[str, int]

_P = TypeVar("_P", bound="GuardedH11Protocol | GuardedH2Protocol")


class ReplayStream(trio.abc.Stream):
    """A stream whose first bytes have been read already: they come once more, then the rest."""

    def __init__(self, inner: trio.SocketStream | trio.SSLStream[Any], data: bytes) -> None:
        self.inner = inner
        self._data = data

    @property
    def replaying(self) -> bool:
        return bool(self._data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._data:
            await trio.lowlevel.checkpoint()
            size = len(self._data) if max_bytes is None else max_bytes
            first, self._data = self._data[:size], self._data[size:]
            return first
        return await self.inner.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self.inner.aclose()


@dataclass(frozen=True, slots=True)
class Relay:
    """Another process talks to the client, over TLS, and passes the bytes on.

    `client` and `local` are the addresses there; `alpn` is what the handshake agreed on.
    """

    client: Address
    local: Address
    alpn: str


class _Refused(Exception):
    """The request has been answered with a refusal, and the connection closed."""


class GuardedH11Protocol(H11Protocol):
    """HTTP/1.1 that is as strict about framing as the lane is.

    `upgrading` is called when a request begins a websocket, `told` when one is refused of which
    the application does not hear.
    """

    _refused = False
    upgrading: Callable[[], None]
    told: RefusalTold | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connection = StrictConnection(self.config.h11_max_incomplete_size)

    async def ask_for_body(self) -> None:
        """Say 100 Continue, if the client waits for it."""
        connection = self.connection
        if isinstance(connection, StrictConnection) and connection.expects_continue:
            await self._send_h11_event(
                h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            )

    async def handle(self, event: Event) -> None:
        with contextlib.suppress(_Refused):
            await super().handle(event)

    async def _check_protocol(self, event: h11.Request) -> None:
        if event.method == b"PRI" and event.target == b"*" and event.http_version == b"2.0":
            raise H2ProtocolAssumedError(
                b"PRI * HTTP/2.0\r\n\r\n" + self.connection.trailing_data[0]
            )
        try:
            _check_request(event, self.config.h11_max_incomplete_size)
        except Refusal as refusal:
            await self.refuse(refusal)
            raise _Refused from None

    async def _create_stream(self, request: h11.Request) -> None:
        if not request.target.startswith(b"/"):
            path, query = split_target(request.method.decode("ascii"), request.target)
            request = h11.Request(
                method=request.method,
                target=path + b"?" + query if query else path,
                headers=request.headers,
                http_version=request.http_version,
            )
        await super()._create_stream(request)
        if isinstance(self.stream, WSStream):
            self.upgrading()
            stream: Any = GuardedWebsocket(self.stream, self._refuse_early_data)
            self.stream = stream

    async def _refuse_early_data(self) -> None:
        await self.refuse(malformed("data before the answer to the websocket handshake"))
        raise _Refused

    async def refuse(self, refusal: Refusal) -> None:
        """Answer in the application's place, and close."""
        self._refused = True
        line = getattr(self.connection, "line", b"")
        refusal.path = path_of(line)
        refusal.request_id = request_id(None)
        if self.told is not None and self.stream is None:
            self.told(refusal, self.client, line)
        headers, body = refusal.headers_and_body()
        headers += [(b"connection", b"close"), *self.config.response_headers("h11")]
        await self._send_h11_event(
            h11.Response(
                status_code=refusal.status, headers=headers, reason=REASONS[refusal.status]
            )
        )
        if body:
            await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())
        await self.send(Closed())

    async def _send_error_response(self, status_code: int) -> None:
        codes = {431: "request_header_fields_too_large", 501: "not_implemented"}
        reason = REASONS.get(status_code, b"").decode().lower()
        await self.refuse(Refusal(status_code, codes.get(status_code, "bad_request"), reason))

    async def stream_send(self, event: StreamEvent) -> None:
        if self._refused:
            return
        if isinstance(event, Response) and event.status_code >= 200:
            headers = [*_without_date(event.headers), *self.config.response_headers("h11")]
            spent = self.keep_alive_requests >= self.config.keep_alive_max_requests
            if spent or self.context.terminated.is_set() or getattr(self.context, "closing", False):
                headers.append((b"connection", b"close"))
            await self._send_h11_event(
                h11.Response(
                    headers=headers,
                    status_code=event.status_code,
                    reason=REASONS.get(event.status_code, b""),
                )
            )
        else:
            await super().stream_send(event)


def _without_date(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """A server's answer has a date, and Hypercorn adds another."""
    return [field for field in headers if field[0] != b"date"]


def _check_request(request: h11.Request, max_head: int) -> None:
    """Raises Refusal for what h11 lets pass and RFC 9112 does not."""
    method = request.method.decode("ascii")
    # h11 compares only heads that come in several reads with its limit.
    if (
        len(method)
        + len(request.target)
        + HEAD_OVERHEAD
        + sum(len(name) + len(value) + 4 for name, value in request.headers)
        > max_head
    ):
        raise too_large()
    if request.http_version not in (b"1.0", b"1.1"):
        raise Refusal(505, "http_version_not_supported", "only HTTP/1.1 is spoken here")
    check_method(method)
    split_target(method, request.target)
    fields = dict(request.headers)
    if b"transfer-encoding" in fields:
        if b"content-length" in fields:
            raise malformed("both Content-Length and Transfer-Encoding")
        if request.http_version == b"1.0":
            raise malformed("Transfer-Encoding in HTTP/1.0")
    if b"host" in fields and not valid_host(fields[b"host"]):
        raise malformed("malformed Host field")
    if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise Refusal(417, "expectation_failed", "only 100-continue can be expected")


class _NoStream:
    """Takes what a client still sends for a stream that has been answered."""

    idle = True

    async def handle(self, event: StreamEvent) -> None:
        pass


class _Streams(dict[int, Any]):
    """Hypercorn's table of streams; a stream that is over swallows what comes late."""

    def __missing__(self, key: int) -> _NoStream:
        return _NoStream()


class _StreamBuffer(StreamBuffer):
    """What of an answer waits for the client's window: Hypercorn's let the application go on
    whenever it had looked, though nothing had been taken."""

    async def push(self, data: bytes) -> None:
        if self._complete:
            raise BufferCompleteError
        self.buffer.extend(data)
        await self._is_empty.clear()
        while len(self.buffer) >= BUFFER_HIGH_WATER and not self._complete:
            await self._paused.clear()
            await self._paused.wait()

    async def pop(self, max_length: int) -> bytes:
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        if len(self.buffer) < BUFFER_HIGH_WATER:
            await self._paused.set()
        if not self.buffer:
            await self._is_empty.set()
        return data


class _StreamBuffers(dict[int, StreamBuffer]):
    """Hypercorn's table of buffers; whatever it makes for a stream, ours is put there."""

    def __setitem__(self, key: int, value: StreamBuffer) -> None:
        super().__setitem__(key, _StreamBuffer(EventWrapper))


class GuardedH2Protocol(H2Protocol):
    """HTTP/2 that survives its clients."""

    limits: Limits

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.streams = _Streams()
        self.stream_buffers = _StreamBuffers()
        # h2 would give up every stream at once, and refuse to send on them.
        self.connection._frame_dispatch_table[GoAwayFrame] = self._client_goes
        self._going = False
        self._cutter = FrameCutter()
        now = trio.current_time()
        self._overhead = Allowance(now, HTTP2_BURST, HTTP2_FRAMES_PER_SECOND)
        self._updates = Allowance(now, HTTP2_BURST, HTTP2_FRAMES_PER_SECOND)
        self._resets = 0
        self._since = now
        self._stalled: dict[int, float] = {}
        """Streams of which something waits for the client, and since when it has taken nothing."""
        self._watching = False

    def _client_goes(self, frame: GoAwayFrame) -> tuple[list[Any], list[Any]]:
        """GOAWAY: the client begins no more requests; those that run go on (RFC 9113 6.8)."""
        self._going = True
        return [], []

    async def handle(self, event: Event) -> None:
        if not isinstance(event, RawData) or not event.data:
            await super().handle(event)
            return
        going = self._going
        for number, piece in enumerate(self._cutter.cut(event.data)):
            if number:
                await trio.lowlevel.checkpoint()
            if self.closed:
                return
            if piece.overlong:
                await self._end_with(h2.errors.ErrorCodes.FRAME_SIZE_ERROR)
                return
            now = trio.current_time()
            if not (
                self._overhead.take(now, piece.overhead) and self._updates.take(now, piece.updates)
            ):
                await self._end_with(h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
                return
            await super().handle(RawData(piece.data))
        if self._going and not going and not self.closed:
            await self._rest()

    async def _end_with(self, code: h2.errors.ErrorCodes) -> None:
        """Close a connection that is a flood or broken."""
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self.connection.close_connection(code)
        await self._flush()
        await self.send(Closed())

    async def _close_stream(self, stream_id: int) -> None:
        await super()._close_stream(stream_id)
        buffer = self.stream_buffers.get(stream_id)
        if buffer is not None:
            # Or an application whose answer the client has not taken would wait for ever; and the
            # sender, woken, finds that the stream is over, and forgets it.
            await buffer.close()
            await self._window_updated(stream_id)

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Response):
            event = replace(event, headers=_without_date(event.headers))
        elif isinstance(event, Body) and event.stream_id not in self.streams:
            # Nobody takes it: whoever goes on sending must at least let others have their turn.
            await trio.lowlevel.checkpoint()
        elif isinstance(event, StreamClosed):
            if event.stream_id in self.streams:
                await self._break_off(event.stream_id)
            await self._close_stream(event.stream_id)
            await self._rest()
            return
        await super().stream_send(event)

    async def _rest(self) -> None:
        """Say so once nothing is left to do. Hypercorn did while the ends of streams were still to
        be sent: in a drain it closed the connection before them."""
        if self.stream_buffers or not self.idle:
            return
        if self._going or self.context.terminated.is_set():
            self.task_group.spawn(self._say_goodbye)
        else:
            await self.send(Updated(idle=True))

    async def _say_goodbye(self) -> None:
        """End the connection, when the client has had the time to read what there was: httpcore,
        for one, gives up all streams when it hears of the end, even whole ones it has yet to read.
        """
        await trio.sleep(GOODBYE)
        if self.idle and not self.stream_buffers:
            self.connection.close_connection()
            await self._flush()
            await self.send(Closed() if self._going else Updated(idle=True))

    async def _break_off(self, stream_id: int) -> None:
        """The application has ended: if its answer has not, the client must hear of it, behind the
        last of what there is. Hypercorn left it waiting."""
        buffer = self.stream_buffers.get(stream_id)
        if buffer is None or buffer._complete:
            return
        if buffer.buffer:
            await buffer.drain()
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self.connection.reset_stream(stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)
        await self._flush()

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        reset = {e.stream_id for e in events if isinstance(e, h2.events.StreamReset)}
        self._resets += len(reset)
        if self._resets > MAX_RESETS + trio.current_time() - self._since:
            await self._end_with(h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
            return
        started = {e.stream_id for e in events if isinstance(e, h2.events.RequestReceived)}
        never_seen = reset & started
        wanted = []
        for event in events:
            if never_seen and getattr(event, "stream_id", None) in never_seen:
                if isinstance(event, h2.events.DataReceived):
                    with contextlib.suppress(h2.exceptions.ProtocolError):
                        self.connection.acknowledge_received_data(
                            event.flow_controlled_length, event.stream_id
                        )
                continue
            wanted.append(event)
        await super()._handle_events(wanted)

    async def _send_data(self, stream_id: int) -> None:
        buffer = self.stream_buffers.get(stream_id)
        before = len(buffer.buffer) if buffer is not None else 0
        await super()._send_data(stream_id)
        self._updates.earn(UPDATES_PER_FRAME)
        left = len(buffer.buffer) if buffer is not None else 0
        if stream_id not in self.stream_buffers:
            await self._rest()
        if not left:
            self._stalled.pop(stream_id, None)
        elif left < before or stream_id not in self._stalled:
            self._stalled[stream_id] = trio.current_time()
            if not self._watching:
                self._watching = True
                self.task_group.spawn(self._end_stalled)

    async def _end_stalled(self) -> None:
        """Reset the streams of which the client takes nothing, as long as there may be any."""
        timeout = self.limits.write_stall_timeout
        while self._stalled:
            await trio.sleep_until(min(self._stalled.values()) + timeout)
            since = trio.current_time() - timeout
            for stream_id in [one for one, moment in self._stalled.items() if moment <= since]:
                del self._stalled[stream_id]
                await self._reset(stream_id)
        self._watching = False

    async def _reset(self, stream_id: int) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self.connection.reset_stream(stream_id, h2.errors.ErrorCodes.CANCEL)
        await self._flush()
        await self._close_stream(stream_id)

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        fields = dict(request.headers)
        method, path = fields.get(b":method", b""), fields.get(b":path", b"")
        known = method and path and method.isascii() and path.isascii()
        hosts = [fields[name] for name in (b":authority", b"host") if name in fields]
        if not known or not all(map(valid_host, hosts)):
            with contextlib.suppress(h2.exceptions.ProtocolError):
                self.connection.reset_stream(request.stream_id, h2.errors.ErrorCodes.PROTOCOL_ERROR)
            return
        await super()._create_stream(request)
        stream = self.streams.get(request.stream_id)
        if isinstance(stream, WSStream):

            async def refuse() -> None:
                with contextlib.suppress(h2.exceptions.ProtocolError):
                    self.connection.reset_stream(
                        request.stream_id, h2.errors.ErrorCodes.PROTOCOL_ERROR
                    )

            guarded: Any = GuardedWebsocket(stream, refuse)
            self.streams[request.stream_id] = guarded

    async def _priority_updated(self, event: h2.events.PriorityUpdated) -> None:
        """Ignored: RFC 9113 5.3 deprecates the scheme, and the tree grows with every frame."""


class GuardedProtocolWrapper(ProtocolWrapper):
    """Chooses between the guarded protocols, and says what the client owes."""

    def __init__(
        self,
        *args: Any,
        limits: Limits,
        ended: Callable[[], bool],
        upgrading: Callable[[], None],
        told: RefusalTold | None,
    ) -> None:
        self._limits = limits
        super().__init__(*args)
        if isinstance(self.protocol, H2Protocol):
            self.protocol = self._make_h2()
        else:
            self.protocol = self._make(GuardedH11Protocol)
            self.protocol.upgrading = upgrading
            self.protocol.told = told
            self.protocol.can_read = _Watchful(ended)

    def _make_h2(self) -> GuardedH2Protocol:
        protocol = self._make(GuardedH2Protocol)
        protocol.limits = self._limits
        return protocol

    def _make(self, kind: type[_P]) -> _P:
        return kind(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.state,
            self.ssl,
            self.client,
            self.server,
            self.send,
        )

    async def handle(self, event: Event) -> None:
        try:
            await self.protocol.handle(event)
        except H2ProtocolAssumedError as error:
            self.protocol = self._make_h2()
            await self.protocol.initiate()
            await self.send(Updated(idle=True))
            await self.protocol.handle(RawData(data=error.data))

    async def ask_for_body(self) -> None:
        """An application wants the body whose head it has seen."""
        if isinstance(self.protocol, GuardedH11Protocol):
            await self.protocol.ask_for_body()

    @property
    def _http1(self) -> h11.Connection | None:
        connection = getattr(self.protocol, "connection", None)
        return connection if isinstance(connection, h11.Connection) else None

    @property
    def read_size(self) -> int:
        """How much is read at a time. Of HTTP/2 less: it may be thousands of frames of nine bytes,
        and nobody else has a turn until all of them have been looked at."""
        return HTTP2_READ_SIZE if isinstance(self.protocol, H2Protocol) else MAX_RECV

    @property
    def busy(self) -> bool:
        """Whether a request is being served."""
        protocol = self.protocol
        return not protocol.idle if isinstance(protocol, H2Protocol) else bool(protocol.stream)

    @property
    def waits_for_body(self) -> bool:
        """Whether the rest of a request's body has yet to come."""
        return self._http1 is not None and self._http1.their_state is h11.SEND_BODY

    @property
    def waits_for_head(self) -> bool:
        """Whether half a request head has come."""
        http1 = self._http1
        return http1 is not None and http1.their_state is h11.IDLE and bool(http1.trailing_data[0])

    @property
    def cut_invisibly(self) -> bool:
        """Whether an orderly close now would pass for the end of an unfinished answer."""
        http1 = self._http1
        return (
            http1 is not None
            and http1.our_state is h11.SEND_BODY
            and http1.their_http_version == b"1.0"
        )

    async def time_out(self) -> None:
        """Tell a client that is too slow so, if nothing has been said to it yet."""
        http1 = self._http1
        if (
            isinstance(self.protocol, GuardedH11Protocol)
            and http1 is not None
            and http1.our_state in {h11.IDLE, h11.SEND_RESPONSE}
        ):
            await self.protocol.refuse(Refusal(408, "request_timeout", "the request took too long"))


class _Left(Exception):
    """The client has left while its next request waits for the answer to the one before."""


class _Watchful(EventWrapper):
    """Hypercorn's event for the reader that has paused, which must not outwait its client."""

    def __init__(self, ended: Callable[[], bool]) -> None:
        super().__init__()
        self._ended = ended

    async def wait(self) -> None:
        while not self.is_set():
            if self._ended():
                raise _Left
            with trio.move_on_after(HANGUP_POLL):
                await super().wait()


class _Inbox:
    """Messages for one application. Unlike Hypercorn's channel it lets a disconnect overtake:
    nobody waits for an application that has stopped receiving."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._messages: deque[Any] = deque()
        self._farewell: Any = None
        self._changed = trio.Event()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def put(self, message: Any) -> None:
        if message["type"] in ("http.disconnect", "websocket.disconnect"):
            self._farewell = message
            if message["type"] == "http.disconnect":
                self._messages.clear()
        else:
            while len(self._messages) >= self._size and self._farewell is None:
                await self._changed.wait()
            if self._farewell is not None:
                return
            self._messages.append(message)
            self._notify()
            await trio.lowlevel.checkpoint()  # a client may have much to say in small pieces
            return
        self._notify()

    async def get(self) -> Any:
        while not self._messages and self._farewell is None:
            await self._changed.wait()
        await trio.lowlevel.checkpoint()
        if not self._messages:
            return self._farewell
        message = self._messages.popleft()
        self._notify()
        return message


class GuardedTaskGroup(TaskGroup):
    """Tasks of one connection; the helpers among them end when its reader does.

    `ask_for_body` is awaited when an application begins to receive.
    """

    ask_for_body: Callable[[], Awaitable[None]]

    def __init__(self) -> None:
        super().__init__()
        self._scopes: set[trio.CancelScope] = set()
        self._stopped = False

    def stop_helpers(self) -> None:
        """End those that run, and those that an application's last words would still begin."""
        self._stopped = True
        for scope in self._scopes:
            scope.cancel()

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Any) -> Any:
        inbox = _Inbox(config.max_app_queue_size)
        receive = inbox.get
        if any(name == b"expect" for name, _ in scope["headers"]):

            async def receive() -> Any:
                await self.ask_for_body()
                return await inbox.get()

        assert self._nursery is not None
        self._nursery.start_soon(
            _handle,
            app,
            config,
            scope,
            receive,
            send,
            trio.to_thread.run_sync,
            trio.from_thread.run,
        )
        return inbox.put

    def spawn(self, func: Any, *args: Any) -> None:
        async def helper() -> None:
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                if self._stopped:
                    scope.cancel()
                try:
                    await func(*args)
                finally:
                    self._scopes.discard(scope)

        assert self._nursery is not None
        self._nursery.start_soon(helper)


class GuardedTCPServer(TCPServer):
    """One connection; whatever happens to it stays its own affair."""

    protocol: GuardedProtocolWrapper
    stream: Any

    def __init__(
        self,
        app: Any,
        config: Config,
        context: Any,
        state: Any,
        stream: Any,
        *,
        limits: Limits | None = None,
        told: RefusalTold | None = None,
        relay: Relay | None = None,
    ) -> None:
        super().__init__(app, config, context, state, stream)
        self._relay = relay
        self._plain: Any = stream.inner if isinstance(stream, ReplayStream) else stream
        self._limits = limits or Limits()
        self._told = told
        self._scope = trio.CancelScope()
        self._reading = trio.CancelScope()
        self._handling = False
        self._lingering = False
        self._last_moment = math.inf
        self._body_bytes = 0
        self._slow_since: float | None = None
        self._idle_from = math.inf
        self._over = False

    async def run(self) -> None:
        try:
            with self._scope:
                await self._serve()
        except* (h11.ProtocolError, h2.exceptions.H2Error, PriorityError) as group:
            log.debug("a client broke the protocol: %r", group.exceptions)
        except* Exception:
            # A bug of Hypercorn, of ours, or of the application that only this client meets.
            log.exception("a connection failed")
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await trio.aclose_forcefully(self.stream)
            self._forget()

    def _forget(self) -> None:
        """Take apart what refers to itself: of HTTP/2 20 KB a connection, which would stay until
        the garbage collector comes by, and here it seldom does."""
        if isinstance(self._plain, trio.SSLStream):
            take_apart(self._plain)
        wrapper = vars(self).pop("protocol", None)
        if wrapper is not None:
            protocol = wrapper.protocol
            parts = [getattr(protocol, name, None) for name in ("connection", "priority", "stream")]
            for part in (*parts, protocol, wrapper):
                if part is not None:
                    vars(part).clear()

    @property
    def idle_since(self) -> float:
        """When it began to wait for a request; inf if it does not."""
        return math.inf if math.isinf(self._idle_from) or self._has_request() else self._idle_from

    def abort(self) -> None:
        """End the connection now, whatever it is doing."""
        self._scope.cancel(reason="aborted")

    async def _serve(self) -> None:
        stream = self.stream
        transport = self._plain
        alpn = "http/1.1"
        is_tls = isinstance(transport, trio.SSLStream)
        if is_tls:
            try:
                with trio.fail_after(self._limits.header_timeout):
                    await transport.do_handshake()
            except (trio.BrokenResourceError, trio.TooSlowError):
                return
            alpn = transport.selected_alpn_protocol() or alpn
            transport = transport.transport_stream
        self._socket = transport.socket
        relay = self._relay
        client: Address | None
        server: Address | None
        if relay is not None:
            client, server = relay.client, relay.local
            alpn, is_tls = relay.alpn or alpn, True
        else:
            try:
                self._end_when_stalled_for(self._limits.write_stall_timeout)
                peer = parse_socket_addr(self._socket.family, self._socket.getpeername())
                client = plain_peer(peer) if peer is not None else None
                server = parse_socket_addr(self._socket.family, self._socket.getsockname())
            except OSError:
                return  # it has left already
        self._task_group = task_group = GuardedTaskGroup()
        async with task_group:
            self.protocol = GuardedProtocolWrapper(
                self.app,
                self.config,
                self.context,
                task_group,
                ConnectionState(self.state),
                is_tls,
                client,
                server,
                self.protocol_send,
                alpn,
                limits=self._limits,
                ended=self._ended,
                upgrading=self._be_a_websocket,
                told=self._told,
            )
            task_group.ask_for_body = self.protocol.ask_for_body
            try:
                await self.protocol.initiate()
                if not (isinstance(stream, ReplayStream) and stream.replaying):
                    self._idle_from = trio.current_time()
                    await self.idle_task.restart(self._task_group, self._idle_timeout)
                await self._read_data()
            finally:
                self._over = True
                # Wakes a send, which Hypercorn shields from cancellation.
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                task_group.stop_helpers()
            await self.idle_task.stop()

    def _end_when_stalled_for(self, seconds: float) -> None:
        milliseconds = int(seconds * 1000)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def _be_a_websocket(self) -> None:
        limits = self._limits
        # Of a socket that has gone already the reader will hear.
        with contextlib.suppress(OSError):
            self._end_when_stalled_for(
                min(limits.websocket_stall_timeout, limits.write_stall_timeout)
            )

    async def _read_data(self) -> None:
        with self._reading:
            while True:
                stream = self.stream
                try:
                    data = await stream.receive_some(self.protocol.read_size)
                except (trio.ClosedResourceError, trio.BrokenResourceError, ssl.SSLError):
                    if self.stream is not stream:
                        continue  # TLS has been ended, what still comes is read without it
                    break
                if self._lingering:
                    if not data:
                        break
                    self._wait_for_silence()
                    continue
                self._reading.deadline = math.inf
                self._handling = True
                try:
                    await self.protocol.handle(RawData(bytes(data)))
                except _Left:
                    break
                finally:
                    self._handling = False
                if not data:
                    break
                self._set_deadline(len(data))
        if self._reading.cancelled_caught and not self._lingering:
            self._reading = trio.CancelScope()
            await self.protocol.time_out()
            await self._read_data()  # until the client has read that
            return
        await self.protocol.handle(Closed())

    def _set_deadline(self, received: int) -> None:
        """How long the client may stay silent now, if it owes us something."""
        now = trio.current_time()
        limits = self._limits
        if self._lingering:
            self._wait_for_silence()
        elif self.protocol.waits_for_head:
            if self._slow_since is None:
                self._slow_since = now
            self._reading.deadline = self._slow_since + limits.header_timeout
        elif self.protocol.waits_for_body:
            if self._slow_since is None:
                self._slow_since, self._body_bytes = now, 0
            self._body_bytes += received
            earned = self._slow_since + self._body_bytes / limits.min_body_rate
            self._reading.deadline = min(now, earned) + limits.body_read_timeout
        else:
            self._slow_since = None

    def _wait_for_silence(self) -> None:
        deadline = trio.current_time() + self._limits.linger
        self._reading.deadline = min(deadline, self._last_moment)

    def _ended(self) -> bool:
        return self._lingering or _polls(self._socket.fileno(), select.POLLRDHUP)

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            if not event.data:
                return  # the end of a body whose length has been told
            async with self.send_lock:
                try:
                    with trio.CancelScope(shield=True):
                        await self.stream.send_all(event.data)
                    return
                except (
                    trio.BrokenResourceError,
                    trio.BusyResourceError,  # just being closed by the reader
                    trio.ClosedResourceError,
                    ssl.SSLError,
                ):
                    self._scope.cancel(reason="client disconnected")
            await self.protocol.handle(Closed())
        elif isinstance(event, Closed):
            await self._close()
            await self.protocol.handle(Closed())
        elif isinstance(event, Updated):
            self._idle_from = trio.current_time() if event.idle else math.inf
            if self._over:
                return  # an answer that nobody waits for any more has ended
            if event.idle:
                await self.idle_task.restart(self._task_group, self._idle_timeout)
            else:
                await self.idle_task.stop()

    async def _idle_timeout(self) -> None:
        with trio.move_on_after(self.config.keep_alive_timeout):
            await self.context.terminated.wait()
            for _ in range(3):
                if self._has_request():
                    return
                # Received bytes reach the reader one turn later, and tasks take turns at random.
                await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            await self._initiate_server_close()

    def _has_request(self) -> bool:
        """Whether a request has come, or at least its first bytes."""
        if self._handling or self.protocol.busy:
            return True
        return _polls(self._socket.fileno(), select.POLLIN) and not self._ended()

    async def _close(self) -> None:
        """Nothing more is sent. The reader goes on until the client has taken notice: closing
        while it still sends would reset the connection, and the reset overtake the answer."""
        if self._lingering:
            return
        self._lingering = True
        self._last_moment = trio.current_time() + self._limits.max_linger
        self._wait_for_silence()
        if self.protocol.cut_invisibly:
            # A reset is all that shows an HTTP/1.0 client that the answer is not whole.
            await delivered(self._socket, self._limits.linger)
            # Nor may TLS announce an end.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            await trio.aclose_forcefully(self.stream)
        elif isinstance(self._plain, trio.abc.HalfCloseableStream):
            with contextlib.suppress(
                trio.BrokenResourceError, trio.BusyResourceError, trio.ClosedResourceError
            ):
                await self._plain.send_eof()
        elif isinstance(self._plain, trio.SSLStream):
            with trio.move_on_after(1):
                self.stream = await end_tls(self._plain)
        else:
            with trio.move_on_after(1):
                await self.stream.aclose()


class _Context(WorkerContext):
    """With `closing`, every answer ends its connection."""

    closing = False


class HypercornSide:
    """Serves connections with Hypercorn, in the caller's tasks.

    The application's lifespan is the caller's affair.
    """

    def __init__(
        self, app: App, *, limits: Limits | None = None, told: RefusalTold | None = None
    ) -> None:
        self._told = told
        self.config = Config()
        tune(self.config)
        self.use_limits(limits or Limits())
        framework: Any = app
        self._app = wrap_app(framework, self.config.wsgi_max_body_size, "asgi")
        self._context = _Context(None)
        self._connections: set[GuardedTCPServer] = set()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    async def serve(
        self,
        stream: trio.SocketStream | trio.SSLStream[Any],
        data: bytes = b"",
        relay: Relay | None = None,
    ) -> None:
        """Serve one connection to its end, and close it. `data` has been read from it already."""
        server = GuardedTCPServer(
            self._app,
            self.config,
            self._context,
            ConnectionState({}),
            ReplayStream(stream, data),
            limits=self._limits,
            told=self._told,
            relay=relay,
        )
        self._connections.add(server)
        try:
            await server.run()
        finally:
            self._connections.discard(server)

    def use_limits(self, limits: Limits) -> None:
        """Serve new connections within these limits."""
        self._limits = limits
        self.config.keep_alive_timeout = limits.keep_alive_timeout
        self.config.h11_max_incomplete_size = limits.max_head_bytes

    @property
    def closing(self) -> bool:
        """Whether every HTTP/1.1 answer is the last one of its connection."""
        return self._context.closing

    @closing.setter
    def closing(self, value: bool) -> None:
        self._context.closing = value

    def close_idle(self, seconds: float) -> None:
        """Close the connections that have waited so long for a request."""
        moment = trio.current_time() - seconds
        for server in self._connections:
            if server.idle_since <= moment:
                server.abort()

    def drain(self) -> None:
        """Close idle connections now, and the others after their answer."""
        terminated: Any = self._context.terminated
        terminated._event.set()

    def abort(self) -> None:
        """End every connection now, whatever it is doing."""
        for server in self._connections:
            server.abort()


def install(
    before_shutdown: Callable[[], Awaitable[None]] | None = None,
    before_start: Callable[[Config, list[Address]], None] | None = None,
) -> None:
    """Give `hypercorn -k trio` and `hypercorn.trio.serve` the same connections and settings.

    `before_start` is called with Hypercorn's configuration and the TCP addresses that it listens
    at, before the lifespan begins; what it raises ends Hypercorn.
    When Hypercorn is told to stop, `before_shutdown` is awaited first: while it runs, the
    listeners are open and requests are served. Hypercorn itself closes them at once.
    """
    run: Any = hypercorn.trio.run
    package: Any = hypercorn.trio
    stock = getattr(run.worker_serve, "stock", run.worker_serve)

    async def worker_serve(
        app: Any,
        config: Config,
        *,
        sockets: Any = None,
        shutdown_trigger: Callable[..., Awaitable[None]] | None = None,
        task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        tune(config)
        made = sockets is None
        if sockets is None:
            sockets = config.create_sockets()
        listeners = (*sockets.secure_sockets, *sockets.insecure_sockets)
        if before_start is not None:
            addresses = [
                sock.getsockname()[:2]
                for sock in listeners
                if sock.family in (socket.AF_INET, socket.AF_INET6)
            ]
            before_start(config, addresses)
        for sock in listeners:
            sock.listen(config.backlog)  # again: the first time was before this was tuned
            enable_keepalive(sock)

        async def trigger() -> None:
            if shutdown_trigger is None:
                await trio.sleep_forever()
            else:
                await shutdown_trigger()
            if before_shutdown is not None:
                await before_shutdown()

        try:
            await stock(
                app, config, sockets=sockets, shutdown_trigger=trigger, task_status=task_status
            )
        finally:
            if made:
                for sock in listeners:
                    sock.close()

    worker_serve.stock = stock  # type: ignore[attr-defined]  # so that installing twice is once
    run.TCPServer = GuardedTCPServer
    run.worker_serve = package.worker_serve = worker_serve


def _polls(fileno: int, mask: int) -> bool:
    poll = select.poll()
    poll.register(fileno, mask)
    return bool(poll.poll(0))
