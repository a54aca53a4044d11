"""One connection of Hypercorn: deadlines, orderly ends, and failures that stay its own."""

from __future__ import annotations

import contextlib
import logging
import math
import select
import socket
import ssl
from typing import Any

import h2.exceptions
import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr
from priority.priority import PriorityError

from vllm_router.http.addresses import plain_peer
from vllm_router.http.http_error import OnRejected
from vllm_router.http.hypercorn.protocol import ClientLeft, GuardedProtocolWrapper
from vllm_router.http.hypercorn.streams import Address, Relay, ReplayStream
from vllm_router.http.hypercorn.tasks import GuardedTaskGroup
from vllm_router.http.io.closing import has_event, reset_on_close, wait_until_delivered
from vllm_router.http.io.keepalive import end_when_stalled_for
from vllm_router.http.io.trio_internals import release_ssl_stream
from vllm_router.http.server.limits import Limits
from vllm_router.http.server.tls_stream import Handshakes, end_tls

log = logging.getLogger(__name__)


HANDSHAKES = "vllm_router_handshakes"
"""The attribute of Hypercorn's configuration with the `Handshakes` of a server that runs alone."""


class GuardedTCPServer(TCPServer):
    """Serves one connection; its failure does not affect others."""

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
        on_rejected: OnRejected | None = None,
        relay: Relay | None = None,
    ) -> None:
        super().__init__(app, config, context, state, stream)
        self._relay = relay
        self._plain: Any = stream.inner if isinstance(stream, ReplayStream) else stream
        self._socket: Any = None
        self._limits = limits or Limits()
        self._on_rejected = on_rejected
        self._scope = trio.CancelScope()
        self._reading = trio.CancelScope()
        self._handling = False
        self._lingering = False
        self._linger_until = math.inf
        self._body_bytes = 0
        self._slow_since: float | None = None
        self._idle_from = math.inf
        self._reader_ended = False

    async def run(self) -> None:
        try:
            with self._scope:
                await self._serve()
        except* (h11.ProtocolError, h2.exceptions.H2Error, PriorityError) as group:
            log.debug("a client broke the protocol: %r", group.exceptions)
        except* Exception:
            # A bug that one client meets must not end the others' connections.
            log.exception("a connection failed")
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await trio.aclose_forcefully(self.stream)
            if self._socket is not None:
                # A TLS stream that was cancelled while it ended is closed, and its socket open.
                self._socket.close()
            self._forget()

    def _forget(self) -> None:
        """Break reference cycles: 20 KB per HTTP/2 connection, and cycles are rarely collected."""
        if isinstance(self._plain, trio.SSLStream):
            release_ssl_stream(self._plain)
        wrapper = vars(self).pop("protocol", None)
        if wrapper is not None:
            protocol = wrapper.protocol
            parts = [getattr(protocol, name, None) for name in ("connection", "priority", "stream")]
            for part in (*parts, protocol, wrapper):
                if part is not None:
                    vars(part).clear()

    @property
    def idle_since(self) -> float:
        """When the connection began to wait for a request; inf if it does not wait."""
        return math.inf if math.isinf(self._idle_from) or self._has_request() else self._idle_from

    def abort(self) -> None:
        """End the connection now, in any state."""
        self._scope.cancel(reason="aborted")

    async def _handshake(self, stream: Any) -> bool:
        """The handshake of a stream that needs one, in its turn. False if it failed."""
        handshakes: Handshakes | None = vars(self.config).get(HANDSHAKES)
        if handshakes is not None:
            return await handshakes.handshake(stream, self._limits.header_timeout)
        try:
            with trio.fail_after(self._limits.header_timeout):
                await stream.do_handshake()
        except (trio.BrokenResourceError, trio.TooSlowError):
            return False
        return True

    async def _serve(self) -> None:
        stream = self.stream
        transport = self._plain
        alpn = "http/1.1"
        is_tls = isinstance(transport, trio.SSLStream)
        if is_tls:
            if not await self._handshake(transport):
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
                end_when_stalled_for(self._socket, self._limits.write_stall_timeout)
                peer = parse_socket_addr(self._socket.family, self._socket.getpeername())
                client = plain_peer(peer) if peer is not None else None
                server = parse_socket_addr(self._socket.family, self._socket.getsockname())
            except OSError:
                return  # the client has left already
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
                has_ended=self._has_ended,
                on_upgrade=self._on_upgrade,
                on_rejected=self._on_rejected,
            )
            task_group.ask_for_body = self.protocol.ask_for_body
            try:
                await self.protocol.initiate()
                if not (isinstance(stream, ReplayStream) and stream.replaying):
                    self._idle_from = trio.current_time()
                    await self.idle_task.restart(self._task_group, self._idle_timeout)
                await self._read_data()
            finally:
                self._reader_ended = True
                # Wakes a send, which Hypercorn shields from cancellation.
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                task_group.stop_helpers()
            await self.idle_task.stop()

    def _on_upgrade(self) -> None:
        limits = self._limits
        # If the socket has failed, the reader finds out.
        with contextlib.suppress(OSError):
            end_when_stalled_for(
                self._socket, min(limits.websocket_stall_timeout, limits.write_stall_timeout)
            )

    async def _read_data(self) -> None:
        with self._reading:
            while True:
                stream = self.stream
                try:
                    data = await stream.receive_some(self.protocol.read_size)
                except (trio.ClosedResourceError, trio.BrokenResourceError, ssl.SSLError):
                    if self.stream is not stream:
                        continue  # TLS has ended; further input is read from the socket
                    break
                if self._lingering:
                    if not data:
                        break
                    self._await_silence()
                    continue
                self._reading.deadline = math.inf
                self._handling = True
                try:
                    await self.protocol.handle(RawData(bytes(data)))
                except ClientLeft:
                    break
                finally:
                    self._handling = False
                if not data:
                    break
                self._set_deadline(len(data))
        if self._reading.cancelled_caught and not self._lingering:
            self._reading = trio.CancelScope()
            await self.protocol.time_out()
            await self._read_data()  # until the client has read the response
            return
        await self.protocol.handle(Closed())

    def _set_deadline(self, received: int) -> None:
        """Set the time by which the rest of a request must arrive, if one is incomplete."""
        now = trio.current_time()
        limits = self._limits
        if self._lingering:
            self._await_silence()
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

    def _await_silence(self) -> None:
        deadline = trio.current_time() + self._limits.linger
        self._reading.deadline = min(deadline, self._linger_until)

    def _has_ended(self) -> bool:
        return self._lingering or has_event(self._socket.fileno(), select.POLLRDHUP)

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            if not event.data:
                return  # the end of a body with a Content-Length
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
            if self._reader_ended:
                return  # a response ended after its client had left
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
                # Received bytes reach the reader one turn later, and tasks run in random order.
                await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            await self._initiate_server_close()

    def _has_request(self) -> bool:
        """Whether a request, or its first bytes, have arrived."""
        if self._handling or self.protocol.busy:
            return True
        return has_event(self._socket.fileno(), select.POLLIN) and not self._has_ended()

    async def _close(self) -> None:
        """End the output. The reader continues until the client closes.

        Closing while the client still sends would reset the connection, and the reset could
        overtake the response.
        """
        if self._lingering:
            return
        self._lingering = True
        self._linger_until = trio.current_time() + self._limits.max_linger
        self._await_silence()
        if self.protocol.close_looks_complete:
            # Only a reset shows an HTTP/1.0 client that the response is truncated.
            await wait_until_delivered(self._socket, self._limits.linger)
            # TLS must not announce an end either.
            reset_on_close(self._socket)
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
