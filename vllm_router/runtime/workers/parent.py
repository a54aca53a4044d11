"""`run --workers N`: the parent process opens the port, starts the others and replaces them.

It serves no requests, so that little can make it fail. It holds the resources that must outlive the
other processes: listening sockets with their backlog, both ends of every channel, shared memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable

import trio

from vllm_router.errors import RouterError
from vllm_router.http.server.listener import HANDSHAKE_GRACE
from vllm_router.http.server.socket_handover import redirect_handshakes, spread_handshakes
from vllm_router.runtime.early_signals import came
from vllm_router.runtime.serve import ServeOptions, StopSignals, start_demo_traffic, url_of
from vllm_router.runtime.service_manager import ServiceManager
from vllm_router.runtime.workers import control_channel
from vllm_router.runtime.workers.process_slot import ProcessSlot
from vllm_router.runtime.workers.resources import Resources, open_resources

logger = logging.getLogger(__name__)

KILL_AFTER = 5.0
"""Seconds for a process to end after the order to stop at once."""


class CannotStart(RouterError):
    """A leader or worker cannot start, for the reason that it has given."""


async def serve_workers(options: ServeOptions, listening: Callable[[str], None]) -> None:
    """Like `serve`, with a leader and `options.workers` worker processes.

    Raises the same errors as `serve`, and CannotStart.
    """
    with contextlib.ExitStack() as ending:
        resources = open_resources(options, ending)
        listeners = resources.listeners
        signals = StopSignals()
        failure: RouterError | None = None
        async with trio.open_nursery() as nursery:
            await nursery.start(signals.listen)
            group = ProcessGroup(resources, nursery)
            manager = ServiceManager(os.environ)
            nursery.start_soon(
                group.forward, signal.SIGHUP, control_channel.RELOAD, manager.reloading
            )
            nursery.start_soon(group.forward, signal.SIGUSR1, control_channel.REOPEN)
            try:
                await group.start()
                if listeners.admin_address is not None:
                    logger.info("administration on %s", url_of(*listeners.admin_address))
                url = url_of(*listeners.address, secure=options.config.tls is not None)
                listening(url)
                start_demo_traffic(nursery, options, url)
                if options.reuse_port:
                    for listener in listeners.public:
                        spread_handshakes(listener)
                manager.ready(group.status_line())
                nursery.start_soon(manager.run, group.status_line)
                await signals.first.wait()
                manager.stopping()
                with signals.until_second() as patience:
                    await group.drain()
                if patience.cancelled_caught:
                    await group.stop()
            except CannotStart as error:
                # Ctrl-C also ends a process that does not ignore SIGINT yet: no failure then.
                if not signals.first.is_set():
                    failure = error  # raised outside of the nursery, which would wrap it
            nursery.cancel_scope.cancel(reason="stopped")
    if failure is not None:
        raise failure
    logger.info("stopped")


class ProcessGroup:
    """The leader and the workers."""

    def __init__(self, resources: Resources, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._resources = resources
        numbers = range(1, 1 + resources.options.workers)
        self._leader = ProcessSlot(resources, 0, self._lost)
        self._workers = [ProcessSlot(resources, number, self._lost) for number in numbers]

    @property
    def _all(self) -> list[ProcessSlot]:
        return [self._leader, *self._workers]

    async def start(self) -> None:
        """Start all processes; returns once all serve. Raises CannotStart."""
        for slot in self._all:
            self._nursery.start_soon(slot.run)
        for slot in self._all:
            await slot.served_or_ended()
            if slot.failure is not None:
                raise CannotStart(slot.failure)

    def _lost(self, number: int, pid: int) -> None:
        if number:
            self._leader.send(control_channel.LOST + f"{number} {pid}".encode())

    def status_line(self) -> str:
        """The state of the processes in one line, for the service manager."""
        return f"{len(self._workers)} workers"

    async def forward(
        self,
        number: signal.Signals,
        order: bytes,
        announced: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Send an order to all processes whenever a signal arrives, within `announced()`."""
        with trio.open_signal_receiver(number) as signals:
            if came(number):
                with announced():
                    self._forward(order)
            async for _ in signals:
                with announced():
                    self._forward(order)

    def _forward(self, order: bytes) -> None:
        output = self._resources.options.output
        if order == control_channel.REOPEN and output is not None:
            output.reopen()
        for slot in self._all:
            slot.send(order)

    async def drain(self) -> None:
        """Let all processes finish. The leader, which serves the control plane, ends last."""
        self._leader.lame = True
        self._leader.send(control_channel.LAME)
        public = self._resources.listeners.public
        shared = public if self._resources.options.reuse_port else []
        if [listener for listener in shared if redirect_handshakes(listener)]:
            # New connections go to the successor; handshakes in progress get time to complete.
            await trio.sleep(HANDSHAKE_GRACE)
        for worker in self._workers:
            worker.leave(control_channel.DRAIN)
        # An open socket in this process would queue connections that no worker accepts.
        for listener in public:
            listener.close()
        for worker in self._workers:
            await worker.ended.wait()
        self._leader.leave(control_channel.DRAIN)
        await self._leader.ended.wait()

    async def stop(self) -> None:
        """End all processes at once."""
        for slot in self._all:
            slot.leave(control_channel.STOP)
        with trio.move_on_after(KILL_AFTER):
            for slot in self._all:
                await slot.ended.wait()
