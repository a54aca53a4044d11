"""Connections that are not for the lane: from the worker that accepted them to the leader.

A plain one goes over whole: its descriptor, and what has been read. With TLS the worker goes on
encrypting and decrypting, and the leader gets one end of a pipe to it.
"""

from __future__ import annotations

import logging
import socket

import trio

from vllm_router.http.addresses import plain_peer
from vllm_router.http.server.listener import Stream
from vllm_router.http.server.server import Limits
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.messages import Connection, encode
from vllm_router.runtime.workers.reporter import Reporter
from vllm_router.runtime.workers.shared_counters import CONNECTIONS, CounterView

logger = logging.getLogger(__name__)

READ_SIZE = 65536

HESITATION = 0.001
"""Seconds that a worker with too many more connections than another leaves the next to that."""

LEAD = 2
"""Connections more than another that a worker may have at least, and beyond that an eighth: where
they live for one request each, the counts are never quite the same."""


class LeaderHandover:
    """The other `Side` of a worker's front. The leader drains what it has been given itself."""

    def __init__(self, channel: Channel, reporter: Reporter) -> None:
        self._channel = channel
        self._reporter = reporter
        self._relays: set[trio.CancelScope] = set()
        self.closing = True

    @property
    def connections(self) -> int:
        return len(self._relays)

    async def serve(self, stream: Stream, data: bytes = b"") -> None:
        try:
            # What the client has seen end shall be counted in what it is told next.
            await self._reporter.flush()
            if isinstance(stream, trio.SSLStream):
                await self._relay(stream, data)
            else:
                await self._channel.send(encode(Connection(data)), [stream.socket.fileno()])
        except trio.BrokenResourceError:
            logger.debug("connection closed: the leader has ended")
        finally:
            stream_socket(stream).close()

    async def _relay(self, stream: trio.SSLStream[trio.SocketStream], data: bytes) -> None:
        outer = stream_socket(stream)
        try:
            client, local = plain_peer(outer.getpeername()), outer.getsockname()[:2]
        except OSError:
            return  # it has left already
        ours, theirs = socket.socketpair()
        inner = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        scope = trio.CancelScope()
        self._relays.add(scope)
        try:
            with scope:
                with theirs:
                    alpn = stream.selected_alpn_protocol() or ""
                    message = Connection(data, client, local, alpn)
                    await self._channel.send(encode(message), [theirs.fileno()])
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_pump, stream, inner)
                    await _pump(inner, stream)
                    with trio.move_on_after(1):
                        await stream.aclose()
                    nursery.cancel_scope.cancel(reason="answered")
        finally:
            self._relays.discard(scope)
            inner.socket.close()

    def use_limits(self, limits: Limits) -> None:
        """The leader has its own."""

    def close_idle(self, seconds: float) -> None:
        """The leader does not keep any."""

    def drain(self) -> None:
        """The leader ends them, and closes its end of a relay."""

    def abort(self) -> None:
        for scope in self._relays:
            scope.cancel(reason="aborted")


async def _pump(source: Stream, sink: Stream) -> None:
    """Pass on what comes, and then that nothing more does; ends when either is gone."""
    try:
        while data := await source.receive_some(READ_SIZE):
            await sink.send_all(data)
        if isinstance(sink, trio.SocketStream):
            await sink.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        if isinstance(sink, trio.SocketStream):
            sink.socket.close()


def stream_socket(stream: Stream) -> trio.socket.SocketType:
    """The socket under it all."""
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    return transport.socket


class FairAccept:
    """The `Gate` of a worker: who has many more connections than another lets that go first.

    All wait for the same socket. Who is woken first would get most of them, and keep them.
    """

    def __init__(self, counters: CounterView) -> None:
        self._counters = counters
        self._mine = 0

    async def turn(self) -> int:
        room = self._room()
        if room <= 0:
            await trio.sleep(HESITATION)
            room = self._room()
        return max(1, room)

    def _room(self) -> int:
        """How many more than now leave the others what is theirs."""
        fewest = self._counters.fewest(CONNECTIONS)
        return fewest + LEAD + fewest // 8 - self._mine

    def count(self, connections: int) -> None:
        self._mine = connections
        self._counters.put(CONNECTIONS, connections)
