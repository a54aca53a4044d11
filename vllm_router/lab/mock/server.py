"""A simulated vLLM server: listeners, engines, failure switches and the ways it ends."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Container, Sequence

import msgspec
import trio

from vllm_router.lab.mock import api
from vllm_router.lab.mock.api_error import ApiError
from vllm_router.lab.mock.connection import Connection, Incoming
from vllm_router.lab.mock.driver import EngineDriver
from vllm_router.lab.mock.engine import Engine, QueueFull
from vllm_router.lab.mock.exchange import Exchange
from vllm_router.lab.mock.faults import Faults
from vllm_router.lab.mock.generation import Generation
from vllm_router.lab.mock.heads import JSON, Heads
from vllm_router.lab.mock.options import MockOptions

log = logging.getLogger(__name__)

# What /mock/log keeps of one request's body; /mock/last keeps all of it.
_LOGGED_BODY_BYTES = 65536


class Counts(msgspec.Struct):
    """Since the start or the last `/mock/reset`."""

    total: int = 0  # inference requests
    done: int = 0  # completely answered, errors of the API included
    failed: int = 0  # mistreated on purpose
    aborted: int = 0  # left by the client before the end
    rejected: int = 0  # queue limit
    bugs: int = 0  # exceptions in this program
    scrapes: int = 0
    health_checks: int = 0
    model_lists: int = 0


class MockServer:
    """One server; `serve` runs it, everything else is synchronous and for the same thread."""

    def __init__(self, options: MockOptions) -> None:
        self.options = options
        self.counts = Counts()
        self.faults = Faults(options.switches)
        self.drivers = [EngineDriver(Engine(options)) for _ in range(options.engines)]
        self.heads = Heads(options.name or "mock", request_ids=options.enable_request_id_headers)
        self.loras = {
            name: path or name for name, _, path in (lora.partition("=") for lora in options.loras)
        }
        self.active: set[Exchange] = set()
        self.connections: set[Connection] = set()
        self.connections_total = 0
        self.held: list[Generation] = []  # while asleep or paused
        self.sleep_level = 0
        self.paused: bool = False
        self.ending = False  # SIGTERM has come: no new requests for the engine
        self.last: Incoming | None = None
        self.log: deque[Incoming] = deque(maxlen=options.log_size)
        self.started = time.time()
        self._nursery: trio.Nursery | None = None
        self._accepting = trio.CancelScope()
        self._all_gone = trio.Event()  # replaced each time it has been set
        self.stopped = trio.Event()

    async def serve(
        self,
        *,
        listeners: Sequence[trio.abc.Listener[trio.abc.Stream]] | None = None,
        task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `terminate` has come to its end, or until cancelled.

        Reports (host, port) when connections are accepted. Closes the listeners, those given
        included. Raises OSError if the address cannot be bound.
        """
        options = self.options
        given: Sequence[trio.abc.Listener[trio.abc.Stream]]
        given = listeners or await trio.open_tcp_listeners(options.port, host=options.host)
        address = ("memory", 0)
        if isinstance(given[0], trio.SocketListener):
            name = given[0].socket.getsockname()
            address = (name[0], name[1])
        if not options.name:
            self.heads.name = f"mock-{address[1]}"
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for driver in self.drivers:
                nursery.start_soon(driver.run)
            if options.sse_keep_alive:
                nursery.start_soon(self._keep_streams_alive)
            await nursery.start(self._accept, given)
            task_status.started(address)
            await self.stopped.wait()
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
                handler_nursery=self._nursery,
                task_status=task_status,
            )

    async def _serve_stream(self, stream: trio.abc.Stream) -> None:
        self.connections_total += 1
        connection = Connection(
            stream, self.connections_total, self._handle, self.start_soon, self.options.keep_alive
        )
        self.connections.add(connection)
        try:
            await connection.run()
        finally:
            self.connections.discard(connection)
            if not self.connections:
                self._all_gone.set()
                self._all_gone = trio.Event()

    def _handle(self, connection: Connection, incoming: Incoming) -> None:
        if not incoming.target.startswith(b"/mock/"):
            self._record(incoming)
        try:
            api.handle(self, connection, incoming)
        except ApiError as error:
            self.counts.done += 1
            self.reply(connection, incoming, error.status, error.body(), JSON)
        except Exception:
            # A bug of the simulation must show as a failed request, not end the whole server.
            log.exception("%s %r failed", incoming.method, incoming.target)
            self.counts.bugs += 1
            connection.close("rst")

    def _record(self, incoming: Incoming) -> None:
        if incoming.method != "GET":
            self.last = incoming
        if len(incoming.body) > _LOGGED_BODY_BYTES:
            short = Incoming(incoming.method, incoming.target, incoming.headers, incoming.number)
            short.connection_id, short.arrived = incoming.connection_id, incoming.arrived
            short.body = incoming.body[:_LOGGED_BODY_BYTES]
            incoming = short
        self.log.append(incoming)

    def start_soon(self, work: Callable[[], Awaitable[None]]) -> None:
        """A task that ends with the server."""
        assert self._nursery is not None
        self._nursery.start_soon(work)

    def reply(
        self,
        connection: Connection,
        incoming: Incoming,
        status: int,
        body: bytes,
        content_type: bytes = b"",
        *,
        extra: bytes = b"",
        vary: bool = True,
        location: bytes = b"",
    ) -> None:
        """A whole answer that nothing spoils."""
        head = self.heads.head(
            incoming,
            status,
            length=len(body),
            content_type=content_type,
            extra=extra,
            vary=vary,
            location=location,
        )
        connection.write(head if incoming.method == "HEAD" else head + body)
        connection.finish(keep_alive=incoming.keep_alive)

    # engines

    @property
    def sleeping(self) -> bool:
        return self.sleep_level > 0

    def submit(self, generation: Generation) -> None:
        """To the least loaded engine; or hold it while there is none awake. Raises QueueFull."""
        if self.paused or self.sleeping:
            generation.begin()
            self.held.append(generation)
            return
        driver = min(self.drivers, key=lambda driver: driver.load)
        present = len(driver.engine.running) + len(driver.engine.waiting)
        limit = self.options.max_num_queued_reqs
        if (
            limit is not None
            and present >= self.options.max_num_seqs
            and driver.engine.queued >= limit
        ):
            self.counts.rejected += 1
            raise QueueFull
        generation.driver = driver
        generation.begin()
        if not generation.over and generation.fault.mode != "hang_after_head":
            driver.submit(generation.request)

    def release(self) -> None:
        """Awake and running again: what was held goes to the engines, in order."""
        if self.paused or self.sleeping:
            return
        held, self.held = self.held, []
        for generation in held:
            if not generation.over:
                generation.driver = min(self.drivers, key=lambda driver: driver.load)
                generation.driver.submit(generation.request)

    def abort_generations(self, identities: Container[str] | None = None) -> int:
        """End them as the engine does that aborts them: running, waiting and held ones alike, or
        only those whose answers have these ids. Returns how many."""
        chosen = [
            exchange
            for exchange in list(self.active)
            if isinstance(exchange, Generation)
            and (identities is None or exchange.identity in identities)
        ]
        for generation in chosen:
            generation.abort_finish([])
        return len(chosen)

    def freeze(self, *, frozen: bool) -> None:
        for driver in self.drivers:
            driver.freeze(frozen=frozen)

    def admit(self, *, admitting: bool) -> None:
        """Whether waiting requests get the places that become free."""
        for driver in self.drivers:
            driver.admit(admitting=admitting)

    async def run_dry(self) -> None:
        """Until no engine runs a request."""
        for driver in self.drivers:
            while driver.engine.running:
                await driver.quiet.wait()

    async def _keep_streams_alive(self) -> None:
        interval = self.options.sse_keep_alive
        while True:
            now = trio.current_time()
            # A stream that begins meanwhile is silent for no longer than that.
            due = now + interval
            for exchange in list(self.active):
                if isinstance(exchange, Generation):
                    due = min(due, exchange.comment(now, interval))
            await trio.sleep_until(due)

    # the end

    def terminate(self) -> None:
        """What SIGTERM does, as the options have it; `serve` returns when all is over."""
        if not self.ending:
            self.ending = True
            self.start_soon(self._end)

    def lose_engine(self) -> None:
        """The engine has died: all requests fail, checks get a 503, and soon it is over."""

        async def end() -> None:
            await trio.sleep(0.3)
            self.stop()

        self.faults.change(self.faults.switches.updated({"health": 503}))
        for exchange in list(self.active):
            exchange.terminate(error=True)
        self.start_soon(end)

    def stop(self) -> None:
        """Cut everything and return from `serve`, like SIGKILL."""
        self.stopped.set()

    async def _end(self) -> None:
        """vLLM 0.32, observed: with a shutdown timeout all but new generation goes on to the end of
        it; then, or without one, the port refuses at once, and the requests in the engine,
        running or waiting, meet one of three fates. After a timeout none is aborted: the engine is
        killed."""
        fate = self.options.sigterm
        if self.options.shutdown_timeout:
            await trio.sleep(self.options.shutdown_timeout)
            fate = "silence" if fate == "silence" else "error"
        self._accepting.cancel()
        for connection in list(self.connections):
            if connection.answerer is None:
                connection.close("fin")
        if fate == "silence":
            self.freeze(frozen=True)
        else:
            for exchange in list(self.active):
                exchange.incoming.keep_alive = False
                exchange.terminate(error=fate == "error")
        if self.connections:
            await self._all_gone.wait()
        self.stopped.set()


async def serve_mock(
    options: MockOptions,
    *,
    listeners: Sequence[trio.abc.Listener[trio.abc.Stream]] | None = None,
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """One simulated server in the caller's nursery; see `MockServer.serve`."""
    await MockServer(options).serve(listeners=listeners, task_status=task_status)
