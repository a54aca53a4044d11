"""`AsyncSocket` on the event loop hub: the fast implementation."""

from __future__ import annotations

import math
import select
import socket
import types
from collections.abc import Callable, Generator
from typing import Any

import outcome
import trio
from trio.lowlevel import Abort, RaiseCancelT, current_task, reschedule, wait_task_rescheduled

from vllm_router.http.io import trio_internals
from vllm_router.http.io.async_socket import (
    BUFFERED_WRITE_SIZE,
    READ_SIZE,
    Interrupted,
    has_unread,
    unexpected_input,
)
from vllm_router.http.io.hub import EventLoopHub

_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_ENDED = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR

_MORE, _NO_MORE = outcome.Value(True), outcome.Value(False)
"""Preallocated wake-up values: continue reading, or end `stream_into`. `outcome.Value` can be
unwrapped only once; the reads compare identity instead, so two instances serve all waits."""


class HubSocket:
    """Registered with the hub from creation to `detach`. See `AsyncSocket`.

    `read` and `stream_into` are coroutines written as generators: `yield self._trap` suspends the
    task until it is rescheduled. Any other value than the two above is trio's: a cancellation,
    which `unwrap` raises.
    """

    __slots__ = (
        "_deadline",
        "_error",
        "_hub",
        "_out",
        "_poll",
        "_reader",
        "_ready",
        "_take",
        "_trap",
        "_verify_silence",
        "_writer",
        "broken",
        "ended",
        "fileno",
        "on_hangup",
        "sock",
        "unsent",
    )

    def __init__(self, sock: socket.socket, on_hangup: Callable[[], None] | None = None) -> None:
        self.sock = sock
        self.fileno = sock.fileno()
        self.on_hangup = on_hangup
        self.ended = self.broken = False
        # The waiting reader, if any, and what its wait returns or raises.
        self._reader: trio.lowlevel.Task | None = None
        self._ready = False
        self._trap: object = trio_internals.make_trap(self._abort_read)
        self._take: Callable[[bytes], bool] | None = None
        self._deadline = math.inf
        self._error: Exception | None = None
        self._poll: select.poll | None = None
        # Buffered writes, bytes the kernel has not accepted, and the task in `drain`.
        self._out: list[bytes] = []
        self.unsent = b""
        self._verify_silence = False
        self._writer: trio.lowlevel.Task | None = None
        self._hub = hub = EventLoopHub.of_this_run()
        hub.add(self)

    def detach(self) -> None:
        hub = self._hub
        if hub.members.get(self.fileno) is self:
            self.flush()
            del hub.members[self.fileno]
            # Break reference cycles with the owner and the trap: cycles are rarely collected.
            self.on_hangup = self._trap = None
            if not hub.epoll.closed:
                hub.epoll.unregister(self.fileno)

    # -- reading ------------------------------------------------------------------------------

    def is_silent(self) -> bool:
        return not (self._ready or self.ended or self.broken)

    def has_input(self) -> bool:
        # A third of a `recv` that raises BlockingIOError.
        poll = self._poll
        if poll is None:
            self._poll = poll = select.poll()
            poll.register(self.fileno, select.POLLIN)
        return bool(poll.poll(0))

    def has_unread(self) -> bool:
        return has_unread(self.sock)

    @types.coroutine
    def read(self, until: float = math.inf, size: int = READ_SIZE) -> Generator[object, Any, bytes]:
        # `until` does the work of a cancel scope for a tenth of the cost.
        while True:
            if self._ready:
                # Let other tasks run.
                yield from trio.lowlevel.checkpoint()  # noqa: ASYNC105 (a coroutine's await)
            else:
                self._reader = current_task()
                if until != math.inf:
                    self._deadline = until
                    if until < self._hub.wake_up:
                        self._hub.wake_up_by(until)
                woken = yield self._trap
                if woken is not _MORE and woken is not _NO_MORE:
                    woken.unwrap()
            if self._error is not None:
                raise self._take_error()
            try:
                data = self.sock.recv(size)
            except BlockingIOError:
                self._ready = False
                continue
            # After a short read the kernel reports new input, but not again the end.
            self._ready = self.ended or len(data) == size
            return data

    @types.coroutine
    def stream_into(self, take: Callable[[bytes], bool]) -> Generator[object, Any, None]:
        # `take` runs between tasks: relayed bytes wake no task.
        more = True
        while more:
            if self._ready:
                yield from trio.lowlevel.checkpoint()  # noqa: ASYNC105 (a coroutine's await)
                more = self._read_into(take)
            else:
                self._take, self._reader = take, current_task()
                woken = yield self._trap
                more = woken is _MORE
                if not more and woken is not _NO_MORE:
                    woken.unwrap()
            if self._error is not None:
                raise self._take_error()

    def interrupt(self) -> bool:
        if self._reader is None:
            return False
        self._error = Interrupted()
        self._wake_reader(_NO_MORE)
        return True

    def _take_error(self) -> Exception:
        """The error to raise. A local name of it in the frame that raises it would be a cycle."""
        error, self._error = self._error, None
        assert error is not None
        return error

    def _read_into(self, take: Callable[[bytes], bool]) -> bool:
        """Whether `take` wants more; False, too, after an exception, which `_error` keeps."""
        try:
            data = self.sock.recv(READ_SIZE)
            self._ready = self.ended or len(data) == READ_SIZE
            return take(data)
        except BlockingIOError:
            self._ready = False
            return True
        except Exception as error:  # noqa: BLE001 (raised by `stream_into`, in the task)
            self._error = error
            return False

    def expire(self, now: float) -> float:
        """End the read if its time has passed; else the time when it must end (inf if none)."""
        deadline = self._deadline
        if self._reader is None:
            return math.inf
        if deadline <= now:
            self.interrupt()
            return math.inf
        return deadline

    def _abort_read(self, _: RaiseCancelT) -> Abort:
        self._reader = self._take = None
        self._deadline = math.inf
        return Abort.SUCCEEDED

    # -- writing ------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        out = self._out
        if not out:
            self._hub.written.append(self)
        out.append(data)
        if len(data) > BUFFERED_WRITE_SIZE:
            self.flush()

    def write_request(self, data: bytes) -> None:
        self._verify_silence = True
        if not self._out:
            self._hub.written.append(self)
        self._out.append(data)

    def flush(self) -> None:
        out = self._out
        if out:
            data = out[0] if len(out) == 1 else b"".join(out)
            out.clear()
            if self.unsent:
                self.unsent += data
            elif not self.broken:
                self._send(data)

    def _send(self, data: bytes) -> None:
        if self._verify_silence:
            self._verify_silence = False
            if self.has_input():
                self._error = unexpected_input()
                self._break()
                return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.unsent = b""
            self._break()
            return
        self.unsent = b"" if sent == len(data) else data[sent:]

    def _break(self) -> None:
        self.broken = self._ready = True
        self._hub.report_failure(self)

    async def drain(self) -> None:
        self.flush()
        while self.unsent and not self.broken:
            self._writer = current_task()
            await wait_task_rescheduled(self._abort_drain)

    def _abort_drain(self, _: RaiseCancelT) -> Abort:
        self._writer = None
        return Abort.SUCCEEDED

    # -- called by the hub, between tasks -----------------------------------------------------

    def on_events(self, events: int) -> None:
        if events & _OUT and self.unsent:
            self._send(self.unsent)
            self._wake_writer()
        if events & _ENDED and not self.ended:
            self.ended = self._ready = True
            if self.on_hangup is not None:
                self.on_hangup()
        if events & _IN:
            self._ready = True
        if self._ready and self._reader is not None:
            take = self._take
            if take is None or not self._read_into(take):
                self._wake_reader(_NO_MORE)
            elif self._ready:
                self._wake_reader(_MORE)

    def on_write_failed(self) -> None:
        if self.on_hangup is not None:
            self.on_hangup()
        self._wake_writer()
        if self._reader is not None:
            self._wake_reader(_MORE)

    def _wake_reader(self, woken: outcome.Value[bool]) -> None:
        reader, self._reader = self._reader, None
        self._take = None
        self._deadline = math.inf
        assert reader is not None
        reschedule(reader, woken)

    def _wake_writer(self) -> None:
        if self._writer is not None and (self.broken or not self.unsent):
            task, self._writer = self._writer, None
            reschedule(task)
