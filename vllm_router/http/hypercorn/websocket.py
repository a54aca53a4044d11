"""Hypercorn's websocket with limits on memory and CPU time.

Hypercorn answered an oversized message with 1009 and continued to buffer it, handled any number of
frames without a checkpoint, and sent no close frame after most protocol errors.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
from hypercorn.protocol.events import Body, Data, EndData, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.ws_stream import FrameTooLargeError, WSStream
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection, Message, Ping
from wsproto.events import Event as FrameEvent
from wsproto.frame_protocol import CloseReason

from vllm_router.http.hypercorn.allowance import Allowance

BURST = 300
"""Frames that a client may send at once. Their content is ignored: the feed only sends."""

FRAMES_PER_SECOND = 30.0
"""Frames that a client may send in the long run."""

SLICE = 1024
"""Bytes handled between checkpoints: at most some 170 frames, or 1 MB if they are compressed."""


class GuardedWebsocket:
    """Layer between a connection and Hypercorn's `WSStream`.

    `refuse` is awaited for a client that sends frames before the handshake is answered. Hypercorn
    refused it without a message to the application, whose answer to the handshake then broke the
    connection, or which never ended.
    """

    def __init__(self, stream: WSStream, refuse: Callable[[], Awaitable[None]]) -> None:
        self._stream = stream
        self._refuse = refuse
        self._allowance = Allowance(trio.current_time(), BURST, FRAMES_PER_SECOND)

    @property
    def idle(self) -> bool:
        return self._stream.idle

    async def handle(self, event: StreamEvent) -> None:
        """Handle an event of the connection."""
        stream = self._stream
        if not isinstance(event, Body | Data):
            await stream.handle(event)
        elif stream.closed:
            pass  # drop further input
        elif stream.handshake.accepted:
            await self._take(event.data)
        else:
            stream.closed = True
            if stream.app_put is not None:
                await stream.app_put({"type": "websocket.disconnect", "code": 1006})
            await self._refuse()

    async def _take(self, data: bytes) -> None:
        connection = self._stream.connection
        for start in range(0, len(data), SLICE):
            if start:
                await trio.lowlevel.checkpoint()
                if self._stream.closed:
                    return
            connection.receive_data(data[start : start + SLICE])
            for event in connection.events():
                if not await self._react(event):
                    return

    async def _react(self, event: FrameEvent) -> bool:
        """Handle a frame or a part of one; whether the websocket stays open."""
        stream = self._stream
        if isinstance(event, CloseConnection):
            await self._close(event)
            return False
        if not self._allowance.take(trio.current_time()):
            await self._fail(CloseReason.POLICY_VIOLATION, "too many frames")
            return False
        if isinstance(event, Ping):
            await stream._send_wsproto_event(event.response())
        elif isinstance(event, Message):
            try:
                stream.buffer.extend(event)
            except FrameTooLargeError:
                most = stream.buffer.max_length
                stream.buffer.clear()
                await self._fail(CloseReason.MESSAGE_TOO_BIG, f"more than {most} bytes")
                return False
            if event.message_finished:
                message: Any = stream.buffer.to_message()
                stream.buffer.clear()
                if stream.app_put is not None:
                    await stream.app_put(message)
        return not stream.closed

    async def _close(self, event: CloseConnection) -> None:
        """Handle a close frame, or a protocol error with a close code."""
        if self._stream.connection.state is ConnectionState.REMOTE_CLOSING:
            await self._stream._send_wsproto_event(event.response())
            await self._end()
        elif self._stream.connection.state is ConnectionState.OPEN:
            await self._fail(event.code, event.reason)
        else:
            await self._end()

    async def _fail(self, code: int, reason: str | None) -> None:
        """Close with a code, and ignore further input."""
        await self._stream._send_wsproto_event(CloseConnection(code=code, reason=reason))
        await self._end()

    async def _end(self) -> None:
        stream = self._stream
        await stream.send(EndData(stream_id=stream.stream_id))
        await stream.send(StreamClosed(stream_id=stream.stream_id))
