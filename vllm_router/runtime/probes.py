"""Sources of server state: this process probes the servers, or follows another that does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

import trio

from vllm_router.config.ssl_contexts import ServerContexts
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.probe_pace import ProbePace
from vllm_router.fleet.server import Server
from vllm_router.http.client.resolver import Resolver
from vllm_router.routing.sharing.scrapes import SharedScrapes
from vllm_router.runtime.background import BackgroundTasks
from vllm_router.runtime.model_lists import LOOK_GAP, Reader
from vllm_router.runtime.probe import Probe

SERVERS_AT_ONCE = 4
"""Servers whose probes are started, or ended, in one turn of the event loop: 5 ms."""

BATCH_PAUSE = 0.005
"""Seconds between two such turns."""


class ProbeSource(Protocol):
    """Keeps the state of the fleet's servers up to date."""

    list_gap: float
    """Seconds between two refreshes of the model lists."""

    async def run(self) -> None: ...

    def start(self, server: Server) -> None:
        """Begin to follow a server; no effect if it is followed already."""

    def stop(self, server: Server) -> None: ...

    def read_list_soon(self, server: Server) -> None:
        """Read the server's model list again without waiting for its interval."""

    def check_soon(self, server: Server) -> None:
        """Check the server's health without waiting for its interval."""

    def list_readers(self) -> list[Reader]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeContext:
    """The parts of the supervisor that a probe source uses.

    `server_down` is called when a server goes down, `upkeep` after each scrape of a server, or when
    one is due and left to another router (`scrapes`).
    """

    fleet: Fleet
    rng: Random
    tls: ServerContexts
    resolver: Resolver
    tasks: BackgroundTasks
    server_down: Callable[[Server], None]
    upkeep: Callable[[Server, float], None]
    scrapes: SharedScrapes


class ActiveProbes:
    """One probe task per server. Tasks are started in small batches: each takes a millisecond."""

    list_gap = LOOK_GAP

    def __init__(self, context: ProbeContext) -> None:
        self._context = context
        self._pace = ProbePace()
        self._scopes: dict[Server, trio.CancelScope] = {}
        self._running: dict[Server, Probe] = {}
        self._to_start: deque[tuple[Server, trio.CancelScope]] = deque()
        self._work = trio.Event()
        context.scrapes.probes = self
        context.fleet.on_failed += [context.scrapes.failed, self._pace.failed]

    async def run(self) -> None:
        """Run all probes until cancelled."""
        for server in list(self._scopes):  # after a failure, all of them start again
            del self._scopes[server]
            self.start(server)
        async with trio.open_nursery() as nursery:
            while True:
                await self._work.wait()
                self._work = trio.Event()
                while self._to_start:
                    for _ in range(min(SERVERS_AT_ONCE, len(self._to_start))):
                        server, scope = self._to_start.popleft()
                        if self._scopes.get(server) is scope:
                            nursery.start_soon(self._probe, server, scope)
                    await trio.sleep(BATCH_PAUSE)

    def start(self, server: Server) -> None:
        if server in self._scopes:
            return
        scope = self._scopes[server] = trio.CancelScope()
        self._to_start.append((server, scope))
        self._work.set()

    def stop(self, server: Server) -> None:
        scope = self._scopes.pop(server, None)
        if scope is not None:
            scope.cancel(reason="server removed")

    def read_list_soon(self, server: Server) -> None:
        probe = self._running.get(server)
        if probe is not None:
            probe.read_list_soon()

    def check_soon(self, server: Server) -> None:
        probe = self._running.get(server)
        if probe is not None:
            probe.check_soon()

    def list_readers(self) -> list[Reader]:
        return [probe.read_list for probe in self._running.values()]

    async def _probe(self, server: Server, scope: trio.CancelScope) -> None:
        context = self._context
        probe = Probe(
            server,
            context.fleet,
            context.rng,
            context.tls.of(server.config),
            context.server_down,
            context.upkeep,
            context.resolver,
            self._pace,
            context.scrapes,
        )
        self._running[server] = probe
        try:
            with scope:
                await context.tasks.keep_running(f"probe of {server.name}", probe.run)
        finally:
            if self._running.get(server) is probe:
                del self._running[server]
                context.scrapes.forget(server)
