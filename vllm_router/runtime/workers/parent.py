"""The process that was started: it opens the port, starts the others, and replaces who dies.

It serves nothing, so hardly anything can happen to it. It holds what must outlive the others: the
listening sockets, whose backlog waits for whoever accepts next, both ends of every channel, and
the shared memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import trio

from vllm_router.errors import RouterError
from vllm_router.http.asgi_types import Receive, Scope, Send
from vllm_router.http.server.listener import ASIDE, Address, Front
from vllm_router.http.server.server import Limits
from vllm_router.http.server.socket_handover import notify, step_aside, take_turns
from vllm_router.observability.log_output import Overrides
from vllm_router.routing.paths import is_inference
from vllm_router.runtime.early_signals import came
from vllm_router.runtime.local_door import LocalSockets
from vllm_router.runtime.serve import (
    ServeOptions,
    StopSignals,
    addresses_of,
    listen,
    take_tls,
    url_of,
)
from vllm_router.runtime.supervisor import tell_memory
from vllm_router.runtime.workers import birth
from vllm_router.runtime.workers.bells import Bells
from vllm_router.runtime.workers.birth import Birth
from vllm_router.runtime.workers.board import Board, columns_for
from vllm_router.runtime.workers.channel import Channel, pair
from vllm_router.runtime.workers.fleet import counted_in
from vllm_router.runtime.workers.in_force import InForce
from vllm_router.runtime.workers.peers import check_limits
from vllm_router.runtime.workers.queue_board import QueueBoard

logger = logging.getLogger(__name__)

LONG_LIFE = 10.0
"""Seconds after which a death is no longer part of a series."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds before a process is started again: doubled with each early death."""

LOOK_EVERY = 1.0
"""Seconds between two looks at whether a process still gives signs of life."""

LEADER_HANGS, WORKER_HANGS = 8, 20
"""Looks in a row without one, after which a process is killed and another takes its place. Looks
and not seconds: when this process was stopped, too, or the machine asleep, nothing is known."""

KILL_AFTER = 5.0
"""Seconds that a process has to end when it was told to do so at once."""


class CannotStart(RouterError):
    """A leader or worker has said why it cannot even begin."""


@dataclass(slots=True)
class _Shared:
    """What all processes inherit."""

    options: ServeOptions
    listeners: list[socket.socket]
    private: list[socket.socket]
    local: list[socket.socket]
    plain: list[int]
    admin_port: int | None
    door: tuple[int, str] | None
    board_fd: int
    board: Board
    in_force: int
    queue_fd: int
    queue: QueueBoard
    bells: tuple[int, ...]
    channels: list[tuple[socket.socket, socket.socket]]


async def serve_workers(options: ServeOptions, listening: Callable[[str], None]) -> None:
    """Like `serve`, with `options.workers` processes that serve and one that leads them.

    Raises what `serve` does, and CannotStart.
    """
    with contextlib.ExitStack() as ending:
        shared, public, admin = _open(options, ending)
        signals = StopSignals()
        failure: RouterError | None = None
        async with trio.open_nursery() as nursery:
            await nursery.start(signals.listen)
            crew = Crew(shared, nursery)
            nursery.start_soon(crew.pass_on, signal.SIGHUP, birth.RELOAD)
            nursery.start_soon(crew.pass_on, signal.SIGUSR1, birth.REOPEN)
            try:
                await crew.start()
                if admin is not None:
                    logger.info("administration on %s", url_of(*admin))
                listening(url_of(*public, secure=options.config.tls is not None))
                if options.reuse_port:
                    for listener in shared.listeners:
                        take_turns(listener)
                notify("READY=1", os.environ)
                await signals.first.wait()
                notify("STOPPING=1", os.environ)
                with signals.until_second() as patience:
                    await crew.drain()
                if patience.cancelled_caught:
                    await crew.stop()
            except CannotStart as error:
                # Ctrl-C in a terminal ends a process that has not got so far as to ignore it.
                if not signals.first.is_set():
                    failure = error  # raised outside, where no group wraps it
            nursery.cancel_scope.cancel(reason="stopped")
    if failure is not None:
        raise failure
    logger.info("stopped")


def _open(
    options: ServeOptions, ending: contextlib.ExitStack
) -> tuple[_Shared, Address, Address | None]:
    """Everything that can fail before a process is started. `ending` closes it."""
    settings = options.config.settings
    check_limits(options.config)
    tell_memory(settings, options.workers)
    front = Front(
        _nobody,
        accepts=is_inference,
        limits=Limits(write_stall_timeout=settings.write_stall_timeout),
    )
    ending.callback(front.close)
    take_tls(front, options.config)
    public, admin = listen(front, options)
    local = ending.enter_context(contextlib.closing(LocalSockets()))
    local.open(addresses_of(front))
    view = options.view
    own_door = view.open(front, options.config, local) if view is not None else None
    doors = {admin[1] if admin is not None else None, own_door.port if own_door else None}
    doors.discard(public[1])
    private = [sock for sock in front.listeners if sock.getsockname()[1] in doors]
    listeners = [sock for sock in front.listeners if sock not in private]
    plain = [sock.fileno() for sock in private if front.takes_plain(sock)]
    rows = options.workers + 1
    columns = columns_for(len(counted_in(options.config)) + options.demo)
    board_fd = Board.create(rows, columns)
    ending.callback(os.close, board_fd)
    in_force = InForce.create(options.config)
    ending.callback(os.close, in_force)
    queue_fd = QueueBoard.create(rows)
    ending.callback(os.close, queue_fd)
    bells = tuple([Bells.create() for _ in range(rows)])
    for bell in bells:
        ending.callback(os.close, bell)
    channels = []
    for _ in range(options.workers):
        ends = pair()
        channels.append(ends)
        for end in ends:
            ending.callback(end.close)
    shared = _Shared(
        options,
        listeners,
        private,
        local.sockets,
        plain,
        admin[1] if admin is not None else None,
        (own_door.port, str.__str__(own_door.digest)) if own_door is not None else None,
        board_fd,
        Board(board_fd, rows, columns),
        in_force,
        queue_fd,
        QueueBoard(queue_fd, rows),
        bells,
        channels,
    )
    return shared, public, admin


async def _nobody(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("the parent accepts no connections")


class Member:
    """One place in the crew and the process that has it. `number` 0 leads.

    `lost` is called with the number and the process id when the process has died.
    """

    def __init__(self, shared: _Shared, number: int, lost: Callable[[int, int], None]) -> None:
        self._shared = shared
        self._lost = lost
        self._number = number
        self.name = f"worker {number}" if number else "leader"
        self.serving = trio.Event()
        self.ended = trio.Event()
        self.leaving = self.lame = False
        self._line: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._scope = trio.CancelScope()
        self.failure: str | None = None
        self._why = ""
        self._pid = 0
        self._beats = 0

    # -- life ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Have a process in this place until it is told to leave."""
        pause = FIRST_PAUSE
        with self._scope:
            while True:
                began = trio.current_time()
                try:
                    how = _how(await self._live())
                except OSError as error:
                    how = "cannot be started"
                    self._why = str(error)
                self._shared.board.clear(self._number)
                self._shared.queue.pages[self._number].reset()
                if self.leaving:
                    break
                if not self.serving.is_set():
                    self.failure = self._why or f"the {self.name} {how} at its start"
                    break
                pause = FIRST_PAUSE if trio.current_time() - began > LONG_LIFE else pause
                logger.error("%s %s: starting another", self.name, how)
                self._lost(self._number, self._pid)
                if self._why:
                    logger.error("%s: %s", self.name, self._why)
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        self.ended.set()

    async def _live(self) -> int:
        """One process from start to end; how it ended. Raises OSError if there can be none."""
        self._why, self._pid = "", 0
        ours, theirs = pair()
        line = Channel(ours)
        try:
            process = self._process = self._start(theirs)
        except BaseException:
            line.close()
            raise
        self._pid = process.pid
        self._line = line
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, line)
                nursery.start_soon(self._watch, process)
                code = await _end_of(process)
                nursery.cancel_scope.cancel(reason="it has ended")
            return code
        finally:
            self._line = self._process = None
            line.close()
            if process.poll() is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await _end_of(process)

    def _start(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        """The process, at that end of its line, which is closed here. Raises OSError.

        Started by this thread, which lasts: a thread of Trio's ends after 10 s, and the kernel then
        tells the process that its parent has died (PR_SET_PDEATHSIG). Takes some milliseconds.
        """
        with contextlib.ExitStack() as ending:
            ending.callback(theirs.close)
            told = self._birth(theirs.fileno())
            record = birth.write(told)
            ending.callback(os.close, record)
            # What is not a line of the log must not spoil the view.
            elsewhere = subprocess.DEVNULL if told.log is not None else None
            return subprocess.Popen(
                [
                    sys.executable,
                    *_flags(),
                    "-m",
                    "vllm_router.runtime.workers",
                    str(record),
                    self.name,
                ],
                pass_fds=[record, *told.descriptors],
                stdin=subprocess.DEVNULL,
                stdout=elsewhere,
                stderr=elsewhere,
            )

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a process that has stopped to give signs of life: stopped, or its loop stuck.

        Its start, with all that it imports, takes as long as it takes.
        """
        most = WORKER_HANGS if self._number else LEADER_HANGS
        seen = missed = self._beats = 0
        while True:
            await trio.sleep(LOOK_EVERY)
            missed = missed + 1 if seen == self._beats > 0 else 0
            seen = self._beats
            if missed >= most:
                logger.error("%s has hung for %g s: killing it", self.name, most * LOOK_EVERY)
                process.kill()
                return

    async def _listen(self, line: Channel) -> None:
        """Hear what it says until it has ended."""
        while word := (await line.receive())[0]:
            self._beats += 1
            if word == birth.SERVING:
                self.serving.set()
                if self.lame:
                    self.tell(birth.LAME)
            elif word.startswith(birth.FAILED):
                self._why = word.removeprefix(birth.FAILED).decode(errors="replace")

    def _birth(self, line: int) -> Birth:
        shared, options = self._shared, self._shared.options
        output = options.output
        if self._number:
            channels = [shared.channels[self._number - 1][1]]
            listeners = shared.listeners
        else:
            channels = [ours for ours, _ in shared.channels]
            listeners = shared.private
        overrides = output.overrides if output is not None else Overrides(access=False)
        return Birth(
            number=self._number,
            workers=options.workers,
            line=line,
            channels=tuple(end.fileno() for end in channels),
            board=shared.board_fd,
            columns=shared.board.columns,
            in_force=shared.in_force,
            queue=shared.queue_fd,
            bells=shared.bells,
            listeners=tuple(listener.fileno() for listener in listeners),
            plain=tuple(shared.plain),
            local=tuple(sock.fileno() for sock in shared.local) if not self._number else (),
            admin_port=shared.admin_port,
            door=shared.door,
            source=str(options.source.path) if options.source is not None else None,
            demo=options.demo,
            patient=options.reuse_port or bool(options.passed),
            log=str(output.file) if output is not None and output.file is not None else None,
            level=overrides.level,
            form=overrides.form,
            access=overrides.access,
        )

    async def served_or_ended(self) -> None:
        """Wait until it serves, or until it cannot."""
        async with trio.open_nursery() as nursery:

            async def wait(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel(reason="one has come")

            nursery.start_soon(wait, self.serving)
            nursery.start_soon(wait, self.ended)

    # -- orders -------------------------------------------------------------------------------

    def tell(self, word: bytes) -> None:
        """Pass an order on; whoever comes after the one who has it is not told."""
        if self._line is not None:
            self._line.send_now(word)

    def leave(self, word: bytes) -> None:
        """The process ends, soon or at once, and none takes its place."""
        self.leaving = True
        self.tell(word)
        if self._process is None:
            self._scope.cancel(reason="leaving")


class Crew:
    """The leader and the workers."""

    def __init__(self, shared: _Shared, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._shared = shared
        numbers = range(1, 1 + shared.options.workers)
        self._leader = Member(shared, 0, self._lost)
        self._workers = [Member(shared, number, self._lost) for number in numbers]

    @property
    def _all(self) -> list[Member]:
        return [self._leader, *self._workers]

    async def start(self) -> None:
        """Start everybody; returns once all serve. Raises CannotStart."""
        for member in self._all:
            self._nursery.start_soon(member.run)
        for member in self._all:
            await member.served_or_ended()
            if member.failure is not None:
                raise CannotStart(member.failure)

    def _lost(self, number: int, pid: int) -> None:
        if number:
            self._leader.tell(birth.LOST + f"{number} {pid}".encode())

    async def pass_on(self, number: signal.Signals, word: bytes) -> None:
        """Tell all what a signal means, whenever it comes."""
        with trio.open_signal_receiver(number) as signals:
            if came(number):
                self._pass_on(word)
            async for _ in signals:
                self._pass_on(word)

    def _pass_on(self, word: bytes) -> None:
        output = self._shared.options.output
        if word == birth.REOPEN and output is not None:
            output.reopen()
        for member in self._all:
            member.tell(word)

    async def drain(self) -> None:
        """All finish what they have. The leader ends last, for it answers meanwhile."""
        self._leader.lame = True
        self._leader.tell(birth.LAME)
        shared = self._shared.listeners if self._shared.options.reuse_port else ()
        if [listener for listener in shared if step_aside(listener)]:
            # New handshakes go to a successor; those that have begun get time to end.
            await trio.sleep(ASIDE)
        for worker in self._workers:
            worker.leave(birth.DRAIN)
        # Else they would go on listening when the workers no longer do, and clients wait in vain.
        for listener in self._shared.listeners:
            listener.close()
        for worker in self._workers:
            await worker.ended.wait()
        self._leader.leave(birth.DRAIN)
        await self._leader.ended.wait()

    async def stop(self) -> None:
        """All end at once."""
        for member in self._all:
            member.leave(birth.STOP)
        with trio.move_on_after(KILL_AFTER):
            for member in self._all:
                await member.ended.wait()


async def _end_of(process: subprocess.Popen[bytes]) -> int:
    """Wait until the process has ended; its status."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:  # a sandbox without it
        return await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
    try:
        while (code := process.poll()) is None:
            await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)
    return code


def _how(code: int) -> str:
    """How a process has ended."""
    if code >= 0:
        return f"has ended with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _flags() -> list[str]:
    """The options of this interpreter that its children shall have, too."""
    flags = [f"-W{option}" for option in sys.warnoptions]
    if not {"", os.getcwd()}.intersection(sys.path):
        flags.append("-P")  # `-m` would look for modules where we were started, unlike us
    return flags
