"""HTTP/2 of Hypercorn, with limits and orderly ends of streams."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import trio
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, Response, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.ws_stream import WSStream
from hyperframe.frame import GoAwayFrame

from vllm_router.http.hypercorn.allowance import Allowance
from vllm_router.http.hypercorn.h2_buffers import StreamBuffers, Streams
from vllm_router.http.hypercorn.h2_frames import FrameCutter
from vllm_router.http.hypercorn.h11 import without_date
from vllm_router.http.hypercorn.websocket import GuardedWebsocket
from vllm_router.http.request_line import TARGET
from vllm_router.http.server.limits import Limits
from vllm_router.http.syntax import TOKEN, valid_host

MAX_RESETS = 100
"""Streams that one HTTP/2 connection may reset, plus one for every second of its age."""

HTTP2_BURST, HTTP2_FRAMES_PER_SECOND = 5000, 100.0
"""Frames without a request that an HTTP/2 client may send at once, and in the long run."""

UPDATES_PER_FRAME = 4
"""Additional window updates that the client may send per frame of a response."""

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

DELAY_OF_GOAWAY = 0.2
"""Seconds between the last response on an HTTP/2 connection and its end, in a drain."""

DELAY_OF_RESET = 0.2
"""Seconds between the last byte of a response that breaks off and the reset of its stream: curl and
others drop what they have not read yet, and the error event is there."""


def _is_http1(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether a request head can be written as one of HTTP/1.1, which servers get.

    h2 lets spaces, and all control characters but line ends and NUL, pass.
    """
    fields = dict(headers)
    hosts = [fields[name] for name in (b":authority", b"host") if name in fields]
    return (
        TOKEN.fullmatch(fields.get(b":method", b"")) is not None
        and TARGET.fullmatch(fields.get(b":path", b"")) is not None
        and all(map(valid_host, hosts))
        and all(TOKEN.fullmatch(name.removeprefix(b":")) for name in fields)
        and _CONTROL.search(b"".join([value for _, value in headers])) is None
    )


class GuardedH2Protocol(H2Protocol):
    """HTTP/2 that survives hostile and broken clients."""

    limits: Limits

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.streams = Streams()
        self.stream_buffers = StreamBuffers()
        # h2 would end every stream at once, and refuse to send on them.
        self.connection._frame_dispatch_table[GoAwayFrame] = self._on_goaway
        self._got_goaway = False
        self._cutter = FrameCutter()
        now = trio.current_time()
        self._overhead = Allowance(now, HTTP2_BURST, HTTP2_FRAMES_PER_SECOND)
        self._updates = Allowance(now, HTTP2_BURST, HTTP2_FRAMES_PER_SECOND)
        self._resets = 0
        self._since = now
        self._stalled: dict[int, float] = {}
        """Streams with unsent bytes, and since when the client has accepted none of them."""
        self._watching = False

    def _on_goaway(self, frame: GoAwayFrame) -> tuple[list[Any], list[Any]]:
        """The client begins no more requests; running ones continue (RFC 9113 6.8)."""
        self._got_goaway = True
        return [], []

    async def handle(self, event: Event) -> None:
        if not isinstance(event, RawData) or not event.data:
            await super().handle(event)
            return
        had_goaway = self._got_goaway
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
        if self._got_goaway and not had_goaway and not self.closed:
            await self._check_idle()

    async def _end_with(self, code: h2.errors.ErrorCodes) -> None:
        """Close the connection of a client that floods or breaks the protocol."""
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self.connection.close_connection(code)
        await self._flush()
        await self.send(Closed())

    async def _close_stream(self, stream_id: int) -> None:
        await super()._close_stream(stream_id)
        buffer = self.stream_buffers.get(stream_id)
        if buffer is not None:
            # Otherwise the application would wait for the client's window for ever. The sender
            # wakes up, finds that the stream has ended, and forgets it.
            await buffer.close()
            await self._window_updated(stream_id)

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Response):
            event = replace(event, headers=without_date(event.headers))
        elif isinstance(event, Body) and event.stream_id not in self.streams:
            # The stream has ended: an application that goes on sending must not block the loop.
            await trio.lowlevel.checkpoint()
        elif isinstance(event, StreamClosed):
            if event.stream_id in self.streams:
                await self._reset_unfinished(event.stream_id)
            await self._close_stream(event.stream_id)
            await self._check_idle()
            return
        await super().stream_send(event)

    async def _check_idle(self) -> None:
        """Report the connection idle once all streams have ended and all bytes are sent.

        Hypercorn did so before the ends of streams were sent: a drain cut them off.
        """
        if self.stream_buffers or not self.idle:
            return
        if self._got_goaway or self.context.terminated.is_set():
            self.task_group.spawn(self._end_soon)
        else:
            await self.send(Updated(idle=True))

    async def _end_soon(self) -> None:
        """End the connection after the client has had time to read its responses.

        httpcore, for one, fails all streams at GOAWAY, even complete ones that it has yet to read.
        """
        await trio.sleep(DELAY_OF_GOAWAY)
        if self.idle and not self.stream_buffers:
            self.connection.close_connection()
            await self._flush()
            await self.send(Closed() if self._got_goaway else Updated(idle=True))

    async def _reset_unfinished(self, stream_id: int) -> None:
        """The application has ended: if its response has not, reset the stream after its last byte.

        Hypercorn left the client waiting.
        """
        buffer = self.stream_buffers.get(stream_id)
        if buffer is None or buffer._complete:
            return
        if buffer.buffer:
            await buffer.drain()
        await trio.sleep(DELAY_OF_RESET)
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
        cancelled = reset & started
        wanted = []
        for event in events:
            if cancelled and getattr(event, "stream_id", None) in cancelled:
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
            await self._check_idle()
        if not left:
            self._stalled.pop(stream_id, None)
        elif left < before or stream_id not in self._stalled:
            self._stalled[stream_id] = trio.current_time()
            if not self._watching:
                self._watching = True
                self.task_group.spawn(self._end_stalled)

    async def _end_stalled(self) -> None:
        """Reset streams whose client accepts no bytes; runs while any stream has unsent bytes."""
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
        if not _is_http1(request.headers):
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
