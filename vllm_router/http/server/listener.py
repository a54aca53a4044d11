"""The listener of the public port.

A connection starts in the lane, which serves inference over HTTP/1.1. The first request that the
lane does not accept moves the connection to Hypercorn, with the bytes read so far, for the rest of
its life. HTTP/2 (by prior knowledge or ALPN) goes to Hypercorn from its first byte.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import socket
import ssl
from collections.abc import Callable

import trio

from vllm_router.http.addresses import plain_peer
from vllm_router.http.asgi_types import App
from vllm_router.http.http_error import OnRejected
from vllm_router.http.hypercorn.handler import HypercornHandler
from vllm_router.http.server.dispatcher import ConnectionDispatcher
from vllm_router.http.server.interfaces import (
    AcceptPolicy,
    Address,
    ConnectionHandler,
    Statistics,
)
from vllm_router.http.server.lane import Lane
from vllm_router.http.server.limits import Limits
from vllm_router.http.server.listening_sockets import ListeningSockets
from vllm_router.http.server.socket_handover import redirect_handshakes

log = logging.getLogger(__name__)

ACCEPTS_PER_TURN = 16
"""Connections accepted before other tasks get their turn."""

PAUSE_WHEN_EXHAUSTED = 0.1
"""Seconds without accepting after descriptors or memory have run out."""

IDLE_AGAIN_BELOW = 0.9
"""Share of `max_connections` below which connections may be idle again."""

FULL_LOG_INTERVAL = 60.0
"""Seconds between two log lines that say that `max_connections` are open."""

IDLE_WHEN_FULL = 1.0
"""Seconds that a connection may wait for a request while others wait to be accepted."""

HANDSHAKE_GRACE = 0.5
"""Seconds for handshakes to end that began before a successor received all new ones."""

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Listener:
    """Accepts connections and serves them.

    `app` serves every request, in the lane and with Hypercorn. `lane=False` leaves everything to
    Hypercorn. With `ssl_context`, TLS is spoken to clients that begin with it, and plain HTTP to
    the others unless `tls_only`; the lane serves inference over TLS too. At most
    `max_connections` are open at a time: others wait in the kernel's backlog, and open ones are
    closed once they are idle. `on_rejected` is called for requests that `app` never sees.

    With several processes, `handler` replaces Hypercorn, and `accept_policy` decides which process
    accepts.
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
        on_rejected: OnRejected | None = None,
        handler: ConnectionHandler | None = None,
        accept_policy: AcceptPolicy | None = None,
    ) -> None:
        limits = limits or Limits()
        self._sockets = ListeningSockets(limits)
        self._dispatcher = ConnectionDispatcher(
            Lane(app, accepts=accepts, limits=limits, on_rejected=on_rejected) if lane else None,
            handler or HypercornHandler(app, limits=limits, on_rejected=on_rejected),
            limits,
            tls_only=tls_only,
            is_plain=self._sockets.is_plain,
        )
        self.use_tls(ssl_context)
        self._accept_policy = accept_policy
        self._max_connections = math.inf if max_connections is None else max_connections
        self._accepting = trio.CancelScope()
        self._everything = trio.CancelScope()
        self._open = 0
        self._accepted = 0
        self._changed = trio.Event()
        self._draining = False
        self._full = False
        self._full_logged_at = -math.inf

    # -- settings ------------------------------------------------------------------------------

    def use_tls(self, ssl_context: ssl.SSLContext | None) -> None:
        """Serve new connections with this context; None for plain HTTP."""
        self._dispatcher.use_tls(ssl_context)

    def use_limits(self, limits: Limits) -> None:
        """Serve new connections within these limits."""
        self._dispatcher.use_limits(limits)
        self._sockets.use_limits(limits)

    def open(
        self,
        host: str,
        port: int,
        *,
        reuse_port: bool = False,
        plain: bool = False,
    ) -> list[Address]:
        """Listen on every address of `host`; the addresses, with the port that 0 became.

        `plain` accepts plain HTTP on this port even if the others speak TLS only. With
        `reuse_port`, other processes may listen at the same address, and this one listens from
        `serve` on. Raises OSError if an address is not available; then nothing is opened.
        """
        return self._sockets.open(host, port, reuse_port=reuse_port, plain=plain)

    def adopt(self, fileno: int, *, later: bool = False) -> Address:
        """Listen on a bound socket that another process opened. Raises OSError.

        This object owns the descriptor; child processes do not inherit it. With `later`, it
        listens from `serve` on: another process may serve the address until then.
        """
        return self._sockets.adopt(fileno, later=later)

    @property
    def listeners(self) -> list[socket.socket]:
        """The listening sockets."""
        return list(self._sockets.all)

    def allow_plain(self, port: int) -> None:
        """Accept plain HTTP on this port even if the others speak TLS only."""
        self._sockets.allow_plain(port)

    def takes_plain(self, sock: socket.socket) -> bool:
        """Whether connections of this listening socket may be plain HTTP."""
        return self._sockets.is_plain(sock)

    # -- life cycle ----------------------------------------------------------------------------

    async def serve(
        self, task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until `stop_accepting` and the last connection has ended, or `abort`."""
        try:
            self._sockets.start()
            with self._everything:
                async with trio.open_nursery() as helpers:
                    self._dispatcher.start_helpers(helpers)
                    async with trio.open_nursery() as connections:
                        task_status.started(self._sockets.addresses())
                        with self._accepting:
                            await self._accept_from(self._sockets.all, connections)
                        await self._redirect_to_successor(connections)
                        for listener in self._sockets.all:
                            # Closing would reset connections whose handshake is done.
                            with contextlib.suppress(OSError):
                                while True:
                                    self._take(listener, connections)
                        self.close()
                    helpers.cancel_scope.cancel()
        finally:
            self.close()

    def close(self) -> None:
        """Close the listening sockets."""
        self._sockets.close()
        self._notify()

    def stop_accepting(self) -> None:
        """Accept no new connections; open ones continue.

        On a port shared with another process, connections whose handshake has begun are accepted.
        """
        self._accepting.cancel(reason="stop accepting")

    def close_after_responses(self) -> None:
        """Make every response the last one of its connection.

        Idle connections stay open until `begin_drain`: their clients may be about to use them.
        """
        self._draining = True
        self._dispatcher.shorten_waits()
        self._set_closing()

    def begin_drain(self) -> None:
        """Close idle connections at once, and the others after their response."""
        self.close_after_responses()
        self._dispatcher.drain()

    async def drained(self) -> None:
        """Wait until no listening socket and no connection is open."""
        while self._open or self._sockets.all:
            await self._changed.wait()

    def abort(self) -> None:
        """End everything now."""
        self._dispatcher.abort()
        self._everything.cancel(reason="aborted")

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return self._open

    def statistics(self) -> Statistics:
        lane = self._dispatcher.lane
        return Statistics(
            connections=self._open,
            lane=lane.connections if lane is not None else 0,
            hypercorn=self._dispatcher.handler.connections,
            accepted=self._accepted,
            handed_over=self._dispatcher.handed_over,
            lane_requests=lane.requests if lane is not None else 0,
            refused=lane.refused if lane is not None else 0,
        )

    # -- connections ---------------------------------------------------------------------------

    async def _accept_from(self, listeners: list[socket.socket], connections: trio.Nursery) -> None:
        async with trio.open_nursery() as acceptors:
            for listener in listeners:
                acceptors.start_soon(self._accept, listener, connections)

    async def _redirect_to_successor(self, connections: trio.Nursery) -> None:
        """Redirect new handshakes to a successor on the port; accept handshakes in progress."""
        redirected = [sock for sock in self._sockets.shared if redirect_handshakes(sock)]
        if redirected:
            with trio.move_on_after(HANDSHAKE_GRACE):
                await self._accept_from(redirected, connections)

    async def _accept(self, listener: socket.socket, connections: trio.Nursery) -> None:
        exhausted = False
        while True:
            while self._open >= self._max_connections:
                await self._wait_for_room()
            await trio.lowlevel.wait_readable(listener)
            policy = self._accept_policy
            allowed = ACCEPTS_PER_TURN if policy is None else await policy.turn()
            for _ in range(allowed):
                if self._open >= self._max_connections:
                    break
                try:
                    self._take(listener, connections)
                except BlockingIOError:
                    exhausted = False
                    break
                except OSError as error:
                    if error.errno not in _EXHAUSTED:
                        continue  # the client left before it was accepted
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

    async def _wait_for_room(self) -> None:
        """Wait for a connection to end. Meanwhile idle connections are closed."""
        if not self._full:
            self._full = True
            self._set_closing()
            now = trio.current_time()
            if now - self._full_logged_at >= FULL_LOG_INTERVAL:
                self._full_logged_at = now
                log.error(
                    "%d connections are open, the limit for file descriptors; new ones wait. "
                    "Raise the limit (ulimit -n) to allow more",
                    self._open,
                )
        self._dispatcher.close_idle(IDLE_WHEN_FULL)
        with trio.move_on_after(IDLE_WHEN_FULL / 2):
            await self._changed.wait()

    def _set_closing(self) -> None:
        self._dispatcher.set_closing(self._draining or self._full)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _count(self, difference: int) -> None:
        self._open += difference
        if self._accept_policy is not None:
            self._accept_policy.count(self._open)

    async def _serve(self, sock: socket.socket, address: Address) -> None:
        """Serve one connection, from its first byte to its last."""
        try:
            await self._dispatcher.serve(sock, address[:2])
        except* Exception:
            # A bug that one client meets must not end the others' connections.
            log.exception("a connection failed")
        finally:
            sock.close()
            self._count(-1)
            if self._full and self._open < self._max_connections * IDLE_AGAIN_BELOW:
                self._full = False
                self._set_closing()
            self._notify()
