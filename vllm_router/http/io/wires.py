"""Sockets of the data path: read when the kernel says so, written to together.

Trio waits for a socket by registering it with its epoll anew each time, and a write of its own
wakes the peer at once. For thousands of short waits and writes a second both cost more than the
work between them. So a `Wire` is registered once, edge-triggered, in an epoll of the data path,
and what tasks write while they have their turns leaves when all have had theirs, just before the
loop waits again: what goes to one peer in one piece, and to many without waking each in between.

The epoll is itself waited for like a socket. Reading and writing hook into the loop as one of
Trio's instruments (`before_io_wait`, `after_io_wait`), between tasks and never inside one.
"""

from __future__ import annotations

import logging
import math
import select
import socket
import types
from collections.abc import Callable, Generator
from typing import Any, NoReturn

import outcome
import trio
from trio.lowlevel import Abort, RaiseCancelT, current_task, reschedule, wait_task_rescheduled

from vllm_router.http.io.turns import Turns

log = logging.getLogger(__name__)

READ_SIZE = 65536

SOON = 16384
"""A write of more bytes is not put off: it would be copied, or held while others are."""

_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_ENDED = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_EVENTS = _IN | _OUT | select.EPOLLRDHUP | select.EPOLLET

_MOST_EVENTS = 1024
"""That are looked at in one pass; the others are still there in the next."""


_MORE, _NO_MORE = outcome.Value(True), outcome.Value(False)
"""What a task that waits is told: to go on, or that `pour` is over. They are never unwrapped, which
may be done once only: so the same two do for every wait."""


def _trap(abort: Callable[[RaiseCancelT], Abort]) -> object:
    """What Trio is handed by a task that waits and may be woken by such an `abort`.

    `wait_task_rescheduled` makes one for each wait; a wire has the same for all.
    """
    waiting = wait_task_rescheduled(abort)  # noqa: ASYNC105 (asked for its first step only)
    trap: object = waiting.send(None)
    waiting.close()
    return trap


@types.coroutine
def _wait(trap: object) -> Generator[object, Any, bool]:
    """Wait until the task is rescheduled, and return what it was told; raises when cancelled."""
    told = yield trap
    if told is _MORE:
        return True
    return told is not _NO_MORE and bool(told.unwrap())


class Interrupted(Exception):
    """A wait has been ended from outside, or has lasted too long."""


class Wire:
    """A connected non-blocking socket, owned by whoever made the wire; one task reads at a time.

    `ended` is true once the peer has closed its side, though bytes may be unread before the end.
    `hung_up`, if there is one, is called then, and when a write fails. `broken` is true after
    that: nothing can be sent any more. Both are called between tasks.
    """

    __slots__ = (
        "_asks",
        "_hub",
        "_late",
        "_late_task",
        "_out",
        "_reader",
        "_ready",
        "_take",
        "_trap",
        "_until",
        "_wrong",
        "broken",
        "ended",
        "fileno",
        "hung_up",
        "sock",
    )

    def __init__(self, sock: socket.socket, hung_up: Callable[[], None] | None = None) -> None:
        self.sock = sock
        self.fileno = sock.fileno()
        self.hung_up = hung_up
        self.ended = self.broken = False
        self._reader: trio.lowlevel.Task | None = None
        self._ready = False
        self._trap: object = _trap(self._abort_read)
        self._take: Callable[[bytes], bool] | None = None
        self._asks = False
        self._until = math.inf
        self._wrong: Exception | None = None
        self._out: list[bytes] = []
        self._late = b""
        self._late_task: trio.lowlevel.Task | None = None
        self._hub = hub = Hub.of_this_run()
        hub.add(self)

    def leave(self) -> None:
        """The socket is about to be closed, or given to somebody else. Sends what it can before.

        May be called more than once.
        """
        hub = self._hub
        if hub.wires.get(self.fileno) is self:
            self.flush()
            del hub.wires[self.fileno]
            # Cycles, which would wait for a garbage collection: its owner has us, and the trap.
            self.hung_up = self._trap = None
            if not hub.epoll.closed:
                hub.epoll.unregister(self.fileno)

    # -- reading ------------------------------------------------------------------------------

    @property
    def silent(self) -> bool:
        """Whether nothing has come that nobody has read, as far as the loop has looked."""
        return not self._ready

    def has_input(self) -> bool:
        """Whether there are bytes that nobody has read, or the end. Asks the kernel."""
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    async def read(self, size: int = READ_SIZE, until: float = math.inf) -> bytes:
        """At most `size` bytes, none at the end. Loses nothing when cancelled. Raises OSError.

        Raises Interrupted if nothing has come `until` then, by Trio's clock, or at `interrupt`:
        what a cancel scope around it would do, for a tenth of its price.
        """
        while True:
            if self._ready:
                await trio.lowlevel.checkpoint()  # others shall have their turn, too
            else:
                self._reader = current_task()
                if until != math.inf:
                    self._until = until
                    self._hub.wake_up_by(until)
                await _wait(self._trap)
            if self._wrong is not None:
                self._raise_wrong()
            try:
                data = self.sock.recv(size)
            except BlockingIOError:
                self._ready = False
                continue
            # Of what comes after a short read the kernel tells; of the end it has told.
            self._ready = self.ended or len(data) == size
            return data

    async def pour(self, take: Callable[[bytes], bool]) -> None:
        """Have `take` called with what comes, as `read` would return it, until it returns False.

        It is called between tasks: no task has to be woken for what is only passed on. What it
        raises is raised here. Loses nothing when cancelled. Raises OSError.
        """
        more = True
        while more:
            if self._ready:
                await trio.lowlevel.checkpoint()
                more = self._take_some(take)
            else:
                self._take, self._reader = take, current_task()
                more = await _wait(self._trap)
            if self._wrong is not None:
                self._raise_wrong()

    def interrupt(self) -> bool:
        """End the wait of who reads; False if nobody waits, for something has come."""
        if self._reader is None:
            return False
        self._wrong = Interrupted()
        self._wake_reader(more=False)
        return True

    def _raise_wrong(self) -> NoReturn:
        wrong, self._wrong = self._wrong, None
        assert wrong is not None
        raise wrong

    def _take_some(self, take: Callable[[bytes], bool]) -> bool:
        """Whether it wants more; False, too, if something is `_wrong`."""
        try:
            data = self.sock.recv(READ_SIZE)
            self._ready = self.ended or len(data) == READ_SIZE
            return take(data)
        except BlockingIOError:
            self._ready = False
            return True
        except Exception as error:  # noqa: BLE001 (raised by `pour`, in the task)
            self._wrong = error
            return False

    def expired(self, now: float) -> float:
        """When the wait of who reads must end; if that was before `now`, it ends."""
        until = self._until
        if self._reader is None:
            return math.inf
        if until <= now:
            self.interrupt()
            return math.inf
        return until

    def _abort_read(self, _: RaiseCancelT) -> Abort:
        self._reader = self._take = None
        self._until = math.inf
        return Abort.SUCCEEDED

    # -- writing ------------------------------------------------------------------------------

    @property
    def late(self) -> bool:
        """Whether the peer has not taken all that it was sent: `caught_up` waits for it."""
        return bool(self._late)

    def write(self, data: bytes) -> None:
        """Have all of it sent, soon. Raises nothing: `broken` and `hung_up` tell."""
        out = self._out
        if not out:
            self._hub.written.append(self)
        out.append(data)
        if len(data) > SOON:
            self.flush()

    def ask(self, data: bytes) -> None:
        """`write` a request, to which what is read next must be the answer.

        It is not sent if something has come before, or the end: an answer that nobody asked for
        must not reach whoever asks next. Then `read` raises ConnectionAbortedError.
        """
        self._asks = True
        self.write(data)

    def flush(self) -> None:
        """Send now what has been written."""
        out = self._out
        if not out:
            return
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        if self._late:
            self._late += data
        elif not self.broken:
            self._send(data)

    def _send(self, data: bytes) -> None:
        if self._asks:
            self._asks = False
            if self.has_input():
                self._wrong = ConnectionAbortedError("it has closed, or spoken unasked")
                self._break()
                return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._late = b""
            self._break()
            return
        self._late = b"" if sent == len(data) else data[sent:]

    def _break(self) -> None:
        self.broken = self._ready = True
        self._hub.tell_soon(self)

    async def caught_up(self) -> None:
        """Wait until the peer has taken everything, or is gone. Cancelled, it takes the rest on."""
        self.flush()
        while self._late and not self.broken:
            self._late_task = current_task()
            await wait_task_rescheduled(self._abort_late)

    def _abort_late(self, _: RaiseCancelT) -> Abort:
        self._late_task = None
        return Abort.SUCCEEDED

    # -- what the hub tells -------------------------------------------------------------------

    def happened(self, events: int) -> None:
        """The kernel has news. Between tasks."""
        if events & _OUT and self._late:
            self._send(self._late)
            self._wake_writer()
        if events & _ENDED and not self.ended:
            self.ended = self._ready = True
            if self.hung_up is not None:
                self.hung_up()
        if events & _IN:
            self._ready = True
        if self._ready and self._reader is not None:
            take = self._take
            more = take is not None and self._take_some(take)
            if not more or self._ready:
                self._wake_reader(more)

    def failed(self) -> None:
        """A write has failed. Between tasks."""
        if self.hung_up is not None:
            self.hung_up()
        self._wake_writer()
        if self._reader is not None:
            self._wake_reader(more=True)

    def _wake_reader(self, more: bool) -> None:
        reader, self._reader = self._reader, None
        self._take = None
        self._until = math.inf
        assert reader is not None
        reschedule(reader, _MORE if more else _NO_MORE)

    def _wake_writer(self) -> None:
        if self._late_task is not None and (self.broken or not self._late):
            task, self._late_task = self._late_task, None
            reschedule(task)


class Hub(trio.abc.Instrument):
    """All wires of one run of Trio, as its own I/O manager has all other sockets."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.wires: dict[int, Wire] = {}
        self.written: list[Wire] = []
        self._failed: list[Wire] = []
        self._at_end: list[Callable[[], None]] = []
        self._token = trio.lowlevel.current_trio_token()
        self._timer = trio.CancelScope()
        self._wake_up = math.inf
        self.turns: Turns | None = None
        """Measures the loop's turns, if anything wants that. Must not raise."""
        self.in_trios_epoll = _put_into_trios_epoll(self.epoll.fileno())

    @classmethod
    def of_this_run(cls) -> Hub:
        """The one of the running loop, made with its first wire."""
        hub = _hub.get(None)
        if hub is None:
            hub = cls()
            _hub.set(hub)
            trio.lowlevel.add_instrument(hub)
            trio.lowlevel.spawn_system_task(hub._keep_waiting)
            trio.lowlevel.spawn_system_task(hub._keep_time)
        return hub

    def add(self, wire: Wire) -> None:
        self.epoll.register(wire.fileno, _EVENTS)
        self.wires[wire.fileno] = wire

    def tell_soon(self, wire: Wire) -> None:
        """Its write has failed, perhaps while the loop was about to wait."""
        self._failed.append(wire)
        self._token.run_sync_soon(self._tell, idempotent=True)

    def _tell(self) -> None:
        failed, self._failed = self._failed, []
        for wire in failed:
            wire.failed()

    def wake_up_by(self, until: float) -> None:
        """A wait must end then. Only a time before all others is a reason to do something."""
        if until < self._wake_up:
            self._wake_up = self._timer.deadline = until

    async def _keep_time(self) -> None:
        """End the waits that last too long: one look at all of them when the first of them may be
        over, or would have been.
        """
        while True:
            with self._timer:
                await trio.sleep_forever()
            self._timer = trio.CancelScope()
            self._wake_up = math.inf
            now = trio.current_time()
            self.wake_up_by(
                min([wire.expired(now) for wire in self.wires.values()], default=math.inf)
            )

    async def _keep_waiting(self) -> None:
        """Have the loop wake up for our epoll, until the run ends."""
        fileno = self.epoll.fileno()
        try:
            if self.in_trios_epoll:
                await trio.sleep_forever()
            while True:
                await trio.lowlevel.wait_readable(fileno)
        finally:
            trio.lowlevel.remove_instrument(self)
            self.epoll.close()

    def at_turns_end(self, call: Callable[[], None]) -> None:
        """Have it called once, when every task has had its turn, before anything is sent."""
        self._at_end.append(call)

    def before_io_wait(self, timeout: float) -> None:
        """Every task has had its turn: send what they wrote."""
        if self._at_end:
            calls, self._at_end = self._at_end, []
            for call in calls:
                try:
                    call()
                except Exception:
                    log.exception("something put off to the end of the loop's turn failed")
        written = self.written
        if written:
            self.written = []
            for wire in written:
                wire.flush()
        if self.turns is not None:
            self.turns.turn_ended(timeout)

    def after_io_wait(self, timeout: float) -> None:
        """Wake those for whom something has come."""
        if self.turns is not None:
            self.turns.wait_ended()
        wires = self.wires
        for fileno, events in self.epoll.poll(0, _MOST_EVENTS):
            wire = wires.get(fileno)
            if wire is None:
                continue
            try:
                wire.happened(events)
            except Exception:
                # Trio would drop the instrument, and all wires with it.
                log.exception("a connection failed")


def _put_into_trios_epoll(fileno: int) -> bool:
    """Have the loop wake up for a descriptor without a task that asks for it again and again.

    What it finds there and nobody waits for, Trio passes over. Its epoll is not public: False if
    it is not where it used to be (Trio 0.31 to 0.35).
    """
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        epoll: select.epoll = GLOBAL_RUN_CONTEXT.runner.io_manager._epoll
    except (ImportError, AttributeError):
        return False
    epoll.register(fileno, select.EPOLLIN)
    return True


_hub: trio.lowlevel.RunVar[Hub | None] = trio.lowlevel.RunVar("vllm_router.wires", None)
