"""The public port: inference over HTTP/1.1 goes down the lane, everything else to Hypercorn.

A connection starts in the lane. The first request that is not the lane's moves it to Hypercorn,
together with the bytes read so far, and there it stays. HTTP/2 (by prior knowledge or ALPN) goes
to Hypercorn from the first byte on.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from vllm_router.http.addresses import plain_peer
from vllm_router.http.headers import RefusalTold
from vllm_router.http.hypercorn.bridge import ALPN_PROTOCOLS, HypercornSide
from vllm_router.http.io.keepalive import enable_keepalive
from vllm_router.http.server.server import App, Limits, Server, SocketConnection, StreamConnection
from vllm_router.http.server.socket_handover import step_aside, take_turns
from vllm_router.http.server.tls_stream import Handshakes, TlsStream, take_apart

log = logging.getLogger(__name__)

BACKLOG = 2048
"""Connections that wait to be accepted; the kernel allows net.core.somaxconn at most."""

ACCEPTS_PER_TURN = 16
"""Connections accepted before other tasks get their turn."""

PAUSE_WHEN_EXHAUSTED = 0.1
"""Seconds without accepting when descriptors or memory have run out."""

RELIEF = 0.9
"""The share of `max_connections` below which connections may be idle again."""

FULL_TOLD_EVERY = 60.0
"""Seconds between two lines of the log that say that `max_connections` are open."""

IDLE_WHEN_FULL = 1.0
"""Seconds that a connection may wait for a request while others wait to be accepted."""

ASIDE = 0.5
"""Seconds for handshakes to end that had begun before a successor got all the new ones."""

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_TLS_HANDSHAKE = b"\x16"

# The kernel holds back what a slow client cannot take; more would only wait in its memory.
_UNSENT_BYTES = 65536

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the front has seen."""

    connections: int
    """Open now, in the lane and with Hypercorn."""
    lane: int
    hypercorn: int
    accepted: int
    """Connections since the start."""
    handed_over: int
    """Of those, how many moved from the lane to Hypercorn."""
    lane_requests: int
    """Requests served by the lane."""
    refused: int
    """Requests the lane refused for their form, size or slowness."""


Stream = trio.SocketStream | TlsStream


class Side(Protocol):
    """Who serves the connections that are not the lane's.

    With `closing`, every HTTP/1.1 answer is the last one of its connection.
    """

    closing: bool

    @property
    def connections(self) -> int:
        """How many are open."""
        ...

    async def serve(self, stream: Stream, data: bytes = b"") -> None:
        """One connection to its end, `data` having been read from it."""
        ...

    def use_limits(self, limits: Limits) -> None:
        """Serve new connections within these limits."""
        ...

    def close_idle(self, seconds: float) -> None:
        """Close the connections that have waited so long for a request."""
        ...

    def drain(self) -> None:
        """Close idle connections, and the others after their answer."""
        ...

    def abort(self) -> None:
        """End every connection now."""
        ...


class Gate(Protocol):
    """Which of several processes accepts a connection."""

    async def turn(self) -> int:
        """Awaited before any is accepted; how many may be until it is asked again."""
        ...

    def count(self, connections: int) -> None:
        """So many are open."""
        ...


class Front:
    """Listeners, and the connections that come through them.

    `app` serves every request, wherever it comes in. `lane=False` leaves everything to Hypercorn.
    With `ssl_context`, TLS is spoken to clients that begin with it, and plain HTTP to the others
    unless `tls_only`; requests for the lane over TLS are served by it too.
    `max_connections` are open at a time, the others wait in the kernel's backlog, and those that
    are open make room as soon as they are idle. `told` hears of requests that `app` never sees.

    One of several processes may give what is not the lane's to another `side` than Hypercorn, and
    let a `gate` decide which of them accepts.
    """

    def __init__(
        self,
        app: App,
        *,
        lane: bool = True,
        accepts: Callable[[str, bytes], bool],
        limits: Limits | None = None,
        ssl_context: ssl.SSLContext | None = None,
        tls_only: bool = False,
        max_connections: int | None = None,
        told: RefusalTold | None = None,
        side: Side | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._lane = Server(app, accepts=accepts, limits=self._limits, told=told) if lane else None
        self._hypercorn: Side = side or HypercornSide(app, limits=self._limits, told=told)
        self._gate = gate
        self._ssl_context: ssl.SSLContext | None = None
        self._tls_only = tls_only
        self._plain_ports: set[int] = set()
        self._handshakes = Handshakes()
        self.use_tls(ssl_context)
        self._most = math.inf if max_connections is None else max_connections
        self._listeners: list[socket.socket] = []
        self._shared: list[socket.socket] = []
        self._later: list[socket.socket] = []
        self._accepting = trio.CancelScope()
        self._everything = trio.CancelScope()
        self._open = 0
        self._accepted = 0
        self._handed_over = 0
        self._changed = trio.Event()
        self._draining = False
        self._full = False
        self._full_told_at = -math.inf
        self._silent: set[trio.CancelScope] = set()

    def use_tls(self, ssl_context: ssl.SSLContext | None) -> None:
        """Serve new connections with this context; None for plain HTTP."""
        if ssl_context is not None:
            ssl_context.set_alpn_protocols(ALPN_PROTOCOLS)
        self._ssl_context = ssl_context

    def use_limits(self, limits: Limits) -> None:
        """Serve new connections within these limits."""
        self._limits = limits
        if self._lane is not None:
            self._lane.limits = limits
        self._hypercorn.use_limits(limits)
        for listener in self._listeners:
            self._prepare(listener)

    # -- listeners -----------------------------------------------------------------------------

    def open(
        self,
        host: str,
        port: int,
        *,
        reuse_port: bool = False,
        plain: bool = False,
    ) -> list[Address]:
        """Listen on every address of `host`; the addresses, with the port that 0 became.

        `plain` takes plain HTTP on this port even if the others speak TLS only. With `reuse_port`
        other processes may listen at the same address: this one does from `serve` on.
        Raises OSError if any of them cannot be had; those opened before are closed then.
        """
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        opened: list[socket.socket] = []
        try:
            for family, kind, protocol, _, address in found:
                sock = socket.socket(family, kind, protocol)
                opened.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if reuse_port:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    only = len(found) > 1 or address[0] != "::"
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
                if port == 0 and len(opened) > 1:
                    address = (address[0], opened[0].getsockname()[1], *address[2:])
                sock.bind(address)
                self._prepare(sock)
                if not reuse_port:
                    sock.listen(BACKLOG)
        except BaseException:
            for sock in opened:
                sock.close()
            raise
        self._listeners += opened
        if reuse_port:
            self._shared += opened
        if plain:
            self.allow_plain(opened[0].getsockname()[1])
        return [sock.getsockname()[:2] for sock in opened]

    def adopt(self, fileno: int, *, later: bool = False) -> Address:
        """Listen on a bound socket that somebody else opened. Raises OSError.

        The descriptor is ours from then on; processes that we start do not get it. With `later`
        it is listened on from `serve` on: others may be serving the address until then.
        """
        sock = socket.socket(fileno=fileno)
        try:
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                raise OSError(errno.EAFNOSUPPORT, "the passed socket is not one of TCP")
            address: Address = sock.getsockname()[:2]
            sock.set_inheritable(False)
            self._prepare(sock)
            if not later:
                sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
        self._listeners.append(sock)
        if later:
            self._later.append(sock)
        return address

    @property
    def listeners(self) -> list[socket.socket]:
        """The listening sockets."""
        return list(self._listeners)

    def allow_plain(self, port: int) -> None:
        """Take plain HTTP on this port even if the others speak TLS only."""
        self._plain_ports.add(port)

    def _prepare(self, sock: socket.socket) -> None:
        # Accepted sockets inherit all of these (Linux), which saves four system calls for each.
        stall = int(self._limits.write_stall_timeout * 1000)
        sock.setblocking(False)
        enable_keepalive(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stall)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)

    # -- life cycle ----------------------------------------------------------------------------

    async def serve(
        self, task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until `stop_accepting` and the last connection has ended, or `abort`."""
        try:
            for listener in self._shared:
                listener.listen(BACKLOG)
                take_turns(listener)
            for listener in self._later:
                listener.listen(BACKLOG)
            with self._everything:
                async with trio.open_nursery() as helpers:
                    if self._lane is not None:
                        helpers.start_soon(self._lane.watch)
                    helpers.start_soon(self._handshakes.run)
                    async with trio.open_nursery() as connections:
                        task_status.started([s.getsockname()[:2] for s in self._listeners])
                        with self._accepting:
                            await self._accept_from(self._listeners, connections)
                        await self._step_aside(connections)
                        for listener in self._listeners:
                            # Closing would reset those whose handshake is done.
                            with contextlib.suppress(OSError):
                                while True:
                                    self._take(listener, connections)
                        self.close()
                    helpers.cancel_scope.cancel()
        finally:
            self.close()

    def close(self) -> None:
        """Close the listeners."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        self._notify()

    def stop_accepting(self) -> None:
        """Take no new connections; those that have been made go on.

        On a port that is shared with another process, those go on, too, whose handshake has begun.
        """
        self._accepting.cancel(reason="stop accepting")

    def last_call(self) -> None:
        """From now on an answer is the last one of its connection.

        Those that are idle stay open, until `begin_drain`: their clients may be about to use them.
        """
        self._draining = True
        if self._lane is not None:
            self._lane.draining = True
        self._set_closing()

    def begin_drain(self) -> None:
        """Close idle connections at once, and the others after the answer they wait for."""
        self.last_call()
        for patience in self._silent:
            patience.cancel(reason="draining")
        if self._lane is not None:
            self._lane.drain()
        self._hypercorn.drain()

    async def drained(self) -> None:
        """Wait until nothing is listened on and no connection is open."""
        while self._open or self._listeners:
            await self._changed.wait()

    def abort(self) -> None:
        """End everything now."""
        if self._lane is not None:
            self._lane.abort()
        self._hypercorn.abort()
        self._everything.cancel(reason="aborted")

    @property
    def connections(self) -> int:
        """How many are open."""
        return self._open

    def statistics(self) -> Statistics:
        lane = self._lane
        return Statistics(
            connections=self._open,
            lane=lane.connections if lane is not None else 0,
            hypercorn=self._hypercorn.connections,
            accepted=self._accepted,
            handed_over=self._handed_over,
            lane_requests=lane.requests if lane is not None else 0,
            refused=lane.refused if lane is not None else 0,
        )

    # -- connections ---------------------------------------------------------------------------

    async def _accept_from(self, listeners: list[socket.socket], connections: trio.Nursery) -> None:
        async with trio.open_nursery() as acceptors:
            for listener in listeners:
                acceptors.start_soon(self._accept, listener, connections)

    async def _step_aside(self, connections: trio.Nursery) -> None:
        """Let a successor on the same port have the handshakes that begin from now on."""
        left = [listener for listener in self._shared if step_aside(listener)]
        if left:
            with trio.move_on_after(ASIDE):
                await self._accept_from(left, connections)

    async def _accept(self, listener: socket.socket, connections: trio.Nursery) -> None:
        exhausted = False
        while True:
            while self._open >= self._most:
                await self._relieve()
            await trio.lowlevel.wait_readable(listener)
            most = ACCEPTS_PER_TURN if self._gate is None else await self._gate.turn()
            for _ in range(most):
                if self._open >= self._most:
                    break
                try:
                    self._take(listener, connections)
                except BlockingIOError:
                    exhausted = False
                    break
                except OSError as error:
                    if error.errno not in _EXHAUSTED:
                        continue  # that one left before it was accepted
                    if not exhausted:
                        log.error("cannot accept connections: %s", error)
                        exhausted = True
                    await trio.sleep(PAUSE_WHEN_EXHAUSTED)
                    break

    def _take(self, listener: socket.socket, connections: trio.Nursery) -> None:
        """Accept one connection. Raises OSError, BlockingIOError if there is none."""
        sock, address = listener.accept()
        sock.setblocking(False)
        self._count(1)
        self._accepted += 1
        connections.start_soon(self._serve, sock, plain_peer(address))

    async def _relieve(self) -> None:
        """Wait for a connection to end. Meanwhile none is kept open for requests to come."""
        if not self._full:
            self._full = True
            self._set_closing()
            now = trio.current_time()
            if now - self._full_told_at >= FULL_TOLD_EVERY:
                self._full_told_at = now
                log.error(
                    "%d connections are open, as many as there are descriptors for: others wait",
                    self._open,
                )
        if self._lane is not None:
            self._lane.close_idle(IDLE_WHEN_FULL)
        self._hypercorn.close_idle(IDLE_WHEN_FULL)
        soon = trio.current_time() + IDLE_WHEN_FULL
        for patience in self._silent:
            patience.deadline = min(patience.deadline, soon)
        with trio.move_on_after(IDLE_WHEN_FULL / 2):
            await self._changed.wait()

    def _set_closing(self) -> None:
        closing = self._draining or self._full
        if self._lane is not None:
            self._lane.closing = closing
        self._hypercorn.closing = closing

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _count(self, difference: int) -> None:
        self._open += difference
        if self._gate is not None:
            self._gate.count(self._open)

    async def _serve(self, sock: socket.socket, address: Address) -> None:
        """One connection, from its first byte to its last."""
        try:
            await self._dispatch(sock, address[:2])
        except* Exception:
            # Whatever is wrong with it, the others go on.
            log.exception("a connection failed")
        finally:
            sock.close()
            self._count(-1)
            if self._full and self._open < self._most * RELIEF:
                self._full = False
                self._set_closing()
            self._notify()

    async def _dispatch(self, sock: socket.socket, client: Address) -> None:
        context = self._ssl_context
        if context is not None:
            first = await self._first_byte(sock)
            if not first:
                return
            if first == _TLS_HANDSHAKE or (self._tls_only and not self.takes_plain(sock)):
                await self._serve_tls(sock, client, context)
                return
        if self._lane is None:
            await self._hypercorn.serve(_stream_over(sock))
            return
        try:
            local = sock.getsockname()[:2]
        except OSError:
            return
        data = await SocketConnection(self._lane, sock, client, local).run()
        if data is not None:
            self._handed_over += 1
            await self._hypercorn.serve(_stream_over(sock), data)

    async def _first_byte(self, sock: socket.socket) -> bytes:
        """What the client begins with, left unread; nothing if it says nothing."""
        with trio.move_on_after(self._limits.keep_alive_timeout) as patience:
            if self._draining:
                patience.deadline = trio.current_time() + self._limits.header_timeout
            self._silent.add(patience)
            try:
                await trio.lowlevel.wait_readable(sock)
            finally:
                self._silent.discard(patience)
        # When the patience has ended, something may have come that nobody had a turn to see.
        try:
            return sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return b""

    def takes_plain(self, sock: socket.socket) -> bool:
        try:
            return sock.getsockname()[1] in self._plain_ports
        except OSError:
            return False

    async def _serve_tls(
        self, sock: socket.socket, client: Address, context: ssl.SSLContext
    ) -> None:
        stream = await self._handshakes.accept(
            _stream_over(sock), context, self._limits.header_timeout
        )
        if stream is None:
            return
        try:
            await self._serve_encrypted(stream, sock, client)
        finally:
            take_apart(stream)

    async def _serve_encrypted(
        self, stream: TlsStream, sock: socket.socket, client: Address
    ) -> None:
        if self._lane is None or stream.selected_alpn_protocol() == "h2":
            await self._hypercorn.serve(stream)
            return
        local = stream.transport_stream.socket.getsockname()[:2]
        lane = StreamConnection(
            self._lane, stream, client, local, scheme="https", fileno=sock.fileno()
        )
        data = await lane.run()
        if data is not None:
            self._handed_over += 1
            await self._hypercorn.serve(stream, data)


def _stream_over(sock: socket.socket) -> trio.SocketStream:
    """The same socket as a Trio stream, which owns it from now on."""
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
