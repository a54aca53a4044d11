"""The channel between the parent and each process: orders, life signs and start-up failures."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import trio

from vllm_router.runtime.background import Task
from vllm_router.runtime.serve import StopSignals
from vllm_router.runtime.workers.channel import Channel

logger = logging.getLogger(__name__)

# From a process to the parent.
SERVING = b"serving"
FAILED = b"failed "
"""Prefix of the one line that says why the process cannot start."""

ALIVE = b"alive"
"""Sent every ALIVE_EVERY seconds by the event loop that does the work."""

ALIVE_EVERY = 0.5

# From the parent to a process.
LAME = b"lame"
DRAIN = b"drain"
STOP = b"stop"
RELOAD = b"reload"
REOPEN = b"reopen"
LOST = b"lost "
"""Prefix of the number and process id of a worker that has died; sent to the leader."""


class ControlChannel(StopSignals):
    """A process's end. Replaces signals, which a terminal sends to the whole process group.

    End of file means that the parent has died, and is an order to drain. `lame` is called when the
    router begins to drain, `lost` with the number and process id of a worker that has died.
    """

    def __init__(self, fileno: int) -> None:
        super().__init__()
        self._channel = Channel(socket.socket(fileno=fileno))
        self.lame: Callable[[], None] = _ignore
        self.lost: Callable[[int, int], None] = _ignore
        self._reload: Callable[[], None] = _ignore
        self._reopen: Callable[[], None] = _ignore

    def close(self) -> None:
        self._channel.close()

    def send(self, message: bytes) -> None:
        """Send to the parent."""
        self._channel.send_now(message)

    def tasks(
        self, reload: Callable[[], None] | None, reopen: Callable[[], None] | None
    ) -> list[tuple[str, Task]]:
        """As a `SignalSource`: `listen` makes the calls, no further task is needed."""
        self._reload, self._reopen = reload or _ignore, reopen or _ignore
        return []

    async def listen(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_life_signs)
            task_status.started()
            await self._follow_orders()
            nursery.cancel_scope.cancel(reason="the parent has ended")

    async def _send_life_signs(self) -> None:
        while True:
            self.send(ALIVE)
            await trio.sleep(ALIVE_EVERY)

    async def _follow_orders(self) -> None:
        while True:
            order, _ = await self._channel.receive()
            match order:
                case b"":
                    if not self.first.is_set():
                        logger.warning("the parent process has ended: draining")
                    self.first.set()
                    return
                case b"lame":
                    self.lame()
                case b"drain":
                    self.first.set()
                case b"stop":
                    self.first.set()
                    self.end_now()
                case b"reload":
                    self._reload()
                case b"reopen":
                    self._reopen()
                case _ if order.startswith(LOST):
                    number, pid = map(int, order.removeprefix(LOST).split())
                    self.lost(number, pid)


def _ignore(*_: object) -> None:
    """The callback until one is set."""
