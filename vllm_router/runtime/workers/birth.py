"""What a process of the router is told when it is started, and how it is told what to do."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable

import msgspec
import trio

from vllm_router.runtime.serve import StopSignals
from vllm_router.runtime.workers.channel import Channel

logger = logging.getLogger(__name__)


class Birth(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers are descriptors, unless said otherwise.

    number: 0 for the leader, else the worker's.
    workers: how many there are.
    line: the channel to the parent.
    channels: to every worker, for the leader; to the leader alone, for a worker.
    board, in_force: the shared memory of these names.
    columns: of the board.
    queue: the shared memory with the requests that wait in each process. bells: what wakes each of
        the processes, the leader first.
    listeners: what this process accepts from.
    plain: those of them that take plain HTTP even if the others speak TLS only.
    local: listening Unix sockets for the commands on this machine; the leader serves them.
    admin_port, door: the ports of administration and of the router's own view, with the digest of
        the key for the latter.
    source: the configuration file, to be followed by the leader.
    patient: another process serves the port, until this one knows the servers.
    log: the file that the log goes to, None for stderr; level, form, access: as in Overrides.
    """

    number: int
    workers: int
    line: int
    channels: tuple[int, ...]
    board: int
    columns: int
    in_force: int
    queue: int
    bells: tuple[int, ...]
    listeners: tuple[int, ...]
    plain: tuple[int, ...] = ()
    local: tuple[int, ...] = ()
    admin_port: int | None = None
    door: tuple[int, str] | None = None
    source: str | None = None
    demo: int = 0
    patient: bool = False
    log: str | None = None
    level: str | None = None
    form: str | None = None
    access: bool | str | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All that the process inherits."""
        return (
            self.line,
            self.board,
            self.in_force,
            self.queue,
            *self.bells,
            *self.channels,
            *self.listeners,
            *self.local,
        )

    @property
    def name(self) -> str:
        return f"worker {self.number}" if self.number else "leader"


def write(birth: Birth) -> int:
    """A descriptor to be inherited, from which `read` gets it; whoever calls closes it."""
    fileno = os.memfd_create("vllm-router birth")
    os.pwrite(fileno, msgspec.json.encode(birth), 0)
    return fileno


def read(fileno: int) -> Birth:
    """Closes the descriptor."""
    with open(fileno, "rb") as file:
        file.seek(0)
        return msgspec.json.decode(file.read(), type=Birth)


SERVING = b"serving"
FAILED = b"failed "
"""Begins the one line that says why a process cannot start."""

ALIVE = b"alive"
"""Said every ALIVE_EVERY seconds, from the loop that does the work."""

ALIVE_EVERY = 0.5

LAME = b"lame"
DRAIN = b"drain"
STOP = b"stop"
RELOAD = b"reload"
REOPEN = b"reopen"
LOST = b"lost "
"""Begins what the leader is told of a worker that has died: number and process id follow."""


class Orders(StopSignals):
    """What the parent says, instead of signals: those may reach a whole process group at once.

    A parent that is gone is an order to drain. `reload` and `reopen` are called when asked for,
    `lame` when the router begins to drain, `lost` with the number and process id of a
    worker that has died.
    """

    def __init__(self, fileno: int) -> None:
        super().__init__()
        self._line = Channel(socket.socket(fileno=fileno))
        self.reload: Callable[[], None] = _nothing
        self.reopen: Callable[[], None] = _nothing
        self.lame: Callable[[], None] = _nothing
        self.lost: Callable[[int, int], None] = _nothing

    def close(self) -> None:
        self._line.close()

    def say(self, word: bytes) -> None:
        """Tell the parent."""
        self._line.send_now(word)

    async def listen(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_saying_alive)
            task_status.started()
            await self._follow()
            nursery.cancel_scope.cancel(reason="no parent any more")

    async def _keep_saying_alive(self) -> None:
        while True:
            self.say(ALIVE)
            await trio.sleep(ALIVE_EVERY)

    async def _follow(self) -> None:
        while True:
            word, _ = await self._line.receive()
            match word:
                case b"":
                    if not self.first.is_set():
                        logger.warning("the process that started this one is gone: draining")
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
                    self.reload()
                case b"reopen":
                    self.reopen()
                case _ if word.startswith(LOST):
                    number, pid = map(int, word.removeprefix(LOST).split())
                    self.lost(number, pid)


def _nothing(*_: object) -> None:
    """Nobody has asked for it yet."""
