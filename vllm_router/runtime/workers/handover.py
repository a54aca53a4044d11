"""The worker's side of handing connections over to the leader, and fair accepting.

Connections that are not for inference go to the leader. A plain connection is passed as its
descriptor, with the bytes read so far. With TLS, the worker keeps encrypting and decrypting, and
passes one end of a socket pair.
"""

from __future__ import annotations

import logging
import socket

import trio

from vllm_router.http.addresses import plain_peer
from vllm_router.http.server.interfaces import Stream
from vllm_router.http.server.limits import Limits
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.messages import Connection, encode
from vllm_router.runtime.workers.reporter import Reporter
from vllm_router.runtime.workers.shared_counters import CONNECTIONS, CounterView

logger = logging.getLogger(__name__)

READ_SIZE = 65536

HESITATION = 0.001
"""Seconds for which a worker with too many connections leaves the next one to others."""

LEAD = 2
"""A worker yields when it has more than `fewest + LEAD + fewest // 8` connections, where `fewest`
is the smallest number of the other workers. Short-lived connections make the counts fluctuate."""


class LeaderHandover:
    """The connection handler of a worker's listener that passes connections to the leader."""

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
            # Exchanges that the client has seen end must be counted in the next response it gets.
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
            return  # the client has disconnected
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
        """The leader has its own limits."""

    def close_idle(self, seconds: float) -> None:
        """The leader closes its idle connections."""

    def drain(self) -> None:
        """The leader drains them, and closes its end of each relay."""

    def abort(self) -> None:
        for scope in self._relays:
            scope.cancel(reason="aborted")


async def _pump(source: Stream, sink: Stream) -> None:
    """Copy bytes and then the end of the stream; returns when either side is closed."""
    try:
        while data := await source.receive_some(READ_SIZE):
            await sink.send_all(data)
        if isinstance(sink, trio.SocketStream):
            await sink.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        if isinstance(sink, trio.SocketStream):
            sink.socket.close()


def stream_socket(stream: Stream) -> trio.socket.SocketType:
    """The socket below the TLS layer, if any."""
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    return transport.socket


class FairAccept:
    """The accept policy of a worker: yield to workers with fewer connections.

    All workers wait for the same socket. Otherwise the one that wakes first would get most
    connections, and keep them.
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
        """Connections that this worker may accept before another worker has its turn."""
        fewest = self._counters.fewest(CONNECTIONS)
        return fewest + LEAD + fewest // 8 - self._mine

    def count(self, connections: int) -> None:
        self._mine = connections
        self._counters.put(CONNECTIONS, connections)
