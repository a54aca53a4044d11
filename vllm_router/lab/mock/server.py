"""A simulated vLLM server: listeners, connections, background tasks and shutdown."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from vllm_router.lab.mock import api
from vllm_router.lab.mock.api_error import ApiError
from vllm_router.lab.mock.connection import Connection, Incoming
from vllm_router.lab.mock.heads import JSON
from vllm_router.lab.mock.options import MockOptions
from vllm_router.lab.mock.state import ServerState

log = logging.getLogger(__name__)

_LOGGED_BODY_BYTES = 65536
"""Body bytes of a request that /mock/log keeps; /mock/last keeps the whole body."""


class MockServer:
    """One server: `serve` runs it; `state` can be changed at any time from the same thread."""

    def __init__(self, options: MockOptions) -> None:
        self.state = ServerState(options)
        self._accepting = trio.CancelScope()
        self._disconnected = trio.Event()  # set, and replaced, when the last connection closes

    async def serve(
        self,
        *,
        listeners: Sequence[trio.abc.Listener[trio.abc.Stream]] | None = None,
        task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until terminated or stopped through `state`, or cancelled.

        Reports (host, port) once connections are accepted. Closes the listeners, also those passed
        by the caller. Raises OSError if the address cannot be bound.
        """
        state = self.state
        options = state.options
        given: Sequence[trio.abc.Listener[trio.abc.Stream]]
        given = listeners or await trio.open_tcp_listeners(options.port, host=options.host)
        address = ("memory", 0)
        if isinstance(given[0], trio.SocketListener):
            name = given[0].socket.getsockname()
            address = (name[0], name[1])
        if not options.name:
            state.heads.name = f"mock-{address[1]}"
        async with trio.open_nursery() as nursery:
            state.nursery = nursery
            for driver in state.engines.drivers:
                nursery.start_soon(driver.run)
            if options.sse_keep_alive:
                nursery.start_soon(self._keep_streams_alive)
            nursery.start_soon(self._shut_down)
            await nursery.start(self._accept, given)
            task_status.started(address)
            await state.stopped.wait()
            nursery.cancel_scope.cancel()

    async def _accept(
        self,
        listeners: Sequence[trio.abc.Listener[trio.abc.Stream]],
        *,
        task_status: trio.TaskStatus[object],
    ) -> None:
        with self._accepting:
            await trio.serve_listeners(
                self._serve_stream,
                list(listeners),
                handler_nursery=self.state.nursery,
                task_status=task_status,
            )

    async def _serve_stream(self, stream: trio.abc.Stream) -> None:
        state = self.state
        state.connections_total += 1
        connection = Connection(
            stream,
            state.connections_total,
            self._handle,
            state.start_soon,
            state.options.keep_alive,
        )
        state.connections.add(connection)
        try:
            await connection.run()
        finally:
            state.connections.discard(connection)
            if not state.connections:
                self._disconnected.set()
                self._disconnected = trio.Event()

    def _handle(self, connection: Connection, incoming: Incoming) -> None:
        state = self.state
        if not incoming.target.startswith(b"/mock/"):
            self._record(incoming)
        try:
            api.handle(state, connection, incoming)
        except ApiError as error:
            state.counts.done += 1
            state.reply(connection, incoming, error.status, error.body(), JSON)
        except Exception:
            # A bug of the simulation must show as a failed request, not end the whole server.
            log.exception("%s %r failed", incoming.method, incoming.target)
            state.counts.bugs += 1
            connection.close("rst")

    def _record(self, incoming: Incoming) -> None:
        if incoming.method != "GET":
            self.state.last = incoming
        if len(incoming.body) > _LOGGED_BODY_BYTES:
            short = Incoming(incoming.method, incoming.target, incoming.headers, incoming.number)
            short.connection_id, short.arrived = incoming.connection_id, incoming.arrived
            short.body = incoming.body[:_LOGGED_BODY_BYTES]
            incoming = short
        self.state.log.append(incoming)

    async def _keep_streams_alive(self) -> None:
        interval = self.state.options.sse_keep_alive
        while True:
            now = trio.current_time()
            # A stream that begins before the next check is silent for at most one interval.
            due = now + interval
            for exchange in list(self.state.active):
                due = min(due, exchange.send_keep_alive(now, interval))
            await trio.sleep_until(due)

    async def _shut_down(self) -> None:
        """Wait for SIGTERM, then end as vLLM 0.32 was observed to.

        With a shutdown timeout, everything but new generation continues until the timeout expires.
        Then the port refuses connections, and the requests in the engine, running or waiting, are
        aborted, fail, or stay silent (option `sigterm`). After a timeout the engine is killed, so
        that no request ends as aborted.
        """
        state = self.state
        await state.terminating.wait()
        fate = state.options.sigterm
        if state.options.shutdown_timeout:
            await trio.sleep(state.options.shutdown_timeout)
            fate = "silence" if fate == "silence" else "error"
        self._accepting.cancel()
        for connection in list(state.connections):
            if connection.answerer is None:
                connection.close("fin")
        if fate == "silence":
            state.engines.freeze(frozen=True)
        else:
            for exchange in list(state.active):
                exchange.incoming.keep_alive = False
                exchange.terminate(error=fate == "error")
        if state.connections:
            await self._disconnected.wait()
        state.stopped.set()


async def serve_mock(
    options: MockOptions,
    *,
    listeners: Sequence[trio.abc.Listener[trio.abc.Stream]] | None = None,
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one simulated server in the caller's nursery; see `MockServer.serve`."""
    await MockServer(options).serve(listeners=listeners, task_status=task_status)
