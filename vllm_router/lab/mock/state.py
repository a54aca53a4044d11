"""State of one simulated server, shared by its request handlers; also writes whole responses."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
import trio

from vllm_router.lab.mock.connection import Connection, Incoming
from vllm_router.lab.mock.engines import Engines
from vllm_router.lab.mock.faults import Faults
from vllm_router.lab.mock.heads import Heads
from vllm_router.lab.mock.options import MockOptions
from vllm_router.lab.mock.response_store import ResponseStore
from vllm_router.lab.mock.text import tokens_of

_ENGINE_DEATH_SECONDS = 0.3
"""Time between the death of the engine and the end of the process."""


class Counts(msgspec.Struct):
    """Counters since the start or the last `/mock/reset`."""

    total: int = 0  # inference requests
    done: int = 0  # complete responses, API errors included
    failed: int = 0  # failures injected by a switch
    aborted: int = 0  # the client disconnected early
    rejected: int = 0  # queue limit
    bugs: int = 0  # exceptions in this program
    scrapes: int = 0
    health_checks: int = 0
    model_lists: int = 0


class Active(Protocol):
    """A request in progress."""

    @property
    def incoming(self) -> Incoming: ...

    def terminate(self, *, error: bool) -> None:
        """End because the server shuts down."""

    def abort(self, identities: set[str] | None) -> bool:
        """Abort the generation if its response id is in `identities` (None: any)."""

    def send_keep_alive(self, now: float, interval: float) -> float:
        """Send a comment if the stream has been silent; returns the time of the next check."""


class ServerState:
    """Synchronous, used by the tasks of one Trio thread; `MockServer` runs those tasks."""

    def __init__(self, options: MockOptions) -> None:
        self.options = options
        self.counts = Counts()
        self.answer = tokens_of(options.answer)
        self.faults = Faults(options.switches)
        self.engines = Engines(options)
        self.heads = Heads(options.name or "mock", request_ids=options.enable_request_id_headers)
        self.loras = {
            name: path or name for name, _, path in (lora.partition("=") for lora in options.loras)
        }
        self.responses = ResponseStore()
        self.active: set[Active] = set()
        self.connections: set[Connection] = set()
        self.connections_total = 0
        self.last: Incoming | None = None
        self.log: deque[Incoming] = deque(maxlen=options.log_size)
        self.started = time.time()
        self.nursery: trio.Nursery | None = None  # while the server runs
        self.terminating = trio.Event()
        self.stopped = trio.Event()

    def start_soon(self, work: Callable[[], Awaitable[None]]) -> None:
        """Start a task that is cancelled when the server ends."""
        assert self.nursery is not None
        self.nursery.start_soon(work)

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
        """Send a complete response, without any injected fault."""
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

    def abort_generations(self, identities: set[str] | None = None) -> int:
        """Abort running, waiting and held requests, all or those with these response ids.

        Returns the number of aborted requests.
        """
        return sum(exchange.abort(identities) for exchange in list(self.active))

    @property
    def ending(self) -> bool:
        """True after SIGTERM: the engine accepts no new requests."""
        return self.terminating.is_set()

    def terminate(self) -> None:
        """Shut down as the `sigterm` option says; `MockServer.serve` then returns."""
        self.terminating.set()

    def lose_engine(self) -> None:
        """Simulate the engine's death: fail all requests and checks, then stop."""

        async def stop_later() -> None:
            await trio.sleep(_ENGINE_DEATH_SECONDS)
            self.stop()

        self.faults.change(self.faults.switches.updated({"health": 503}))
        for exchange in list(self.active):
            exchange.terminate(error=True)
        self.start_soon(stop_later)

    def stop(self) -> None:
        """Cut all connections and end, like SIGKILL."""
        self.stopped.set()
