"""One generated response in progress: words from the engine to the client."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from vllm_router.lab.mock.api_error import ApiError
from vllm_router.lab.mock.connection import Connection, Incoming
from vllm_router.lab.mock.exchange import Exchange, Trickle
from vllm_router.lab.mock.faults import Fault
from vllm_router.lab.mock.foreign import ERRORS, json_of
from vllm_router.lab.mock.heads import EVENT_STREAM, JSON
from vllm_router.lab.mock.request import Request
from vllm_router.lab.mock.shapes import DONE, LAST_CHUNK, Shape, chunk, engine_dead
from vllm_router.lab.mock.state import ServerState

if TYPE_CHECKING:
    from vllm_router.lab.mock.driver import EngineDriver

# Modes that let `after` tokens pass, by default half of them.
_LATE_MODES = frozenset(
    ("midreset", "midclose", "midhang", "abort_finish", "error_event", "unfinished")
)


class Generation(Exchange):
    """An exchange that receives words from an engine, as the request's sink."""

    def __init__(
        self,
        server: ServerState,
        connection: Connection,
        incoming: Incoming,
        fault: Fault,
        request: Request,
        shape: Shape,
        *,
        stream: bool,
    ) -> None:
        super().__init__(server, connection, incoming, fault)
        request.sink = self
        self.request = request
        self.driver: EngineDriver | None = None
        self.stream = stream
        self.identity = shape.identity  # the response id, for /abort_requests
        self.anthropic = incoming.path == "/v1/messages"
        self.last_write = incoming.arrived
        self._shape = shape
        self._opened = False
        self._sent = 0
        self._trickle: Trickle | None = None
        self.on_done: Callable[[], None] | None = None  # called with the last words
        self._limit: int | None = None  # tokens to send before the fault
        if fault.mode in _LATE_MODES:
            self._limit = fault.after if fault.after is not None else request.limit // 2

    def begin(self) -> None:
        """Called when the request is accepted, before the engine gets it: a stream's head and first
        events are sent at once.
        """
        fault = self.fault
        if not self.stream:
            if fault.mode in ("hang_after_head", "empty"):
                self.plain(self._shape.whole())
            elif fault.mode == "opening":
                self._stop_engine([], None)
                self.spoiled = True
                self.plain(self._shape.whole())
            return
        self.connection.write(self.head(EVENT_STREAM, None))
        if fault.mode == "trickle":
            self._trickle = Trickle(self, complete=False)
            self.server.start_soon(self._trickle.run)
        if fault.mode == "empty":
            self.spoiled = True
            self._write([LAST_CHUNK], complete=True)
            return
        if fault.mode == "hang_after_head":
            return
        events = self._shape.accepted()
        if fault.early_opening or fault.mode == "opening":
            self._opened = True
            events += self._shape.opening()
        if fault.mode == "opening":
            self.spoiled = True
            self._write([*events, LAST_CHUNK], complete=True)
        elif events:
            self._write(events, complete=False)

    def lost(self) -> None:
        super().lost()
        if self.driver is not None:
            self.driver.abort(self.request)

    def abort(self, identities: set[str] | None) -> bool:
        if identities is not None and self.identity not in identities:
            return False
        self.abort_finish([])
        return True

    def send_keep_alive(self, now: float, interval: float) -> float:
        if not self.stream or self.over or not self._shape.comments:
            return now + interval
        if self.last_write + interval <= now:
            self._write([chunk(b": keep-alive\n\n")], complete=False)
        return self.last_write + interval

    def deliver(self, words: list[bytes]) -> None:
        if self.over:
            return
        if self.fault.mode == "no_token":
            self.abort_finish([])
            return
        limit = self._limit
        cut_here = self.stream or self.fault.mode in ("abort_finish", "error_event")
        if limit is not None and cut_here and self._sent + len(words) >= limit:
            self._spoil(words[: limit - self._sent])
            return
        self._sent += len(words)
        # The engine may be steps ahead of the delivery: more words may follow.
        finished = self.request.finish_reason is not None and self._sent >= len(self.request.words)
        if finished and self.on_done is not None:
            self.on_done()
        if not self.stream:
            if finished:
                self.plain(self._shape.whole())
            return
        events = self._events(words, last=finished)
        if finished:
            events += self._ending()
        self._write(events, complete=finished)

    def _events(self, words: list[bytes], *, last: bool = False) -> list[bytes]:
        events = [] if self._opened else self._shape.opening()
        self._opened = True
        return events + self._shape.delta(words, last=last)

    def _ending(self) -> list[bytes]:
        events = self._shape.closing()
        if self._shape.done:
            events.append(DONE)
        return [*events, LAST_CHUNK]

    def _write(self, events: list[bytes], *, complete: bool) -> None:
        data = b"".join(events) if self.wire is None else self.wire.write(events)
        if self._trickle is not None:
            self._trickle.add(data, complete=complete)
            return
        self.connection.write(data)
        if complete:
            self.end()
        else:
            self.last_write = trio.current_time()

    def _stop_engine(self, words: list[bytes], reason: str | None) -> None:
        """Abort the request in the engine, with at most `words` delivered in addition."""
        request = self.request
        if self.driver is not None:
            self.driver.abort(request)
        self._sent += len(words)
        request.words = request.words[: self._sent]
        request.generated = len(request.words)
        request.finish_reason = reason

    def _spoil(self, words: list[bytes]) -> None:
        """The point of the fault is reached; these are the last words."""
        mode = self.fault.mode
        if mode == "abort_finish":
            self.abort_finish(words)
        elif mode == "error_event":
            self.fail(words)
        elif mode == "unfinished":
            self._stop_engine(words, None)
            self.spoiled = True
            self._write([*self._events(words), LAST_CHUNK], complete=True)
        else:
            self._stop_engine(words, None)
            if words or self._sent:
                self._write(self._events(words), complete=False)
            self._break(mode)

    def abort_finish(self, words: list[bytes]) -> None:
        """A normal-looking end, as for a request that the engine has aborted."""
        self._stop_engine(words, "abort")
        self.spoiled = True
        if self.stream:
            self._write([*self._events(words, last=True), *self._ending()], complete=True)
        else:
            self._limit = None
            self.plain(self._shape.whole())

    def fail(self, words: list[bytes], error: ApiError | None = None) -> None:
        """The request has failed, by default because the engine has died.

        Sends the API's error, or another engine's error if the fault names one, and nothing
        afterwards.
        """
        self._stop_engine(words, None)
        self.spoiled = True
        foreign = ERRORS[self.fault.error].event if error is None and self.fault.error else None
        error = error or engine_dead()
        if not self.stream:
            self._fail_plain(error, foreign)
            return
        events = self._events(words) if words or self._opened else []
        if foreign is not None:
            end = [chunk(foreign), DONE] if self._shape.done else [chunk(foreign)]
        else:
            failed = self._shape.failed(error)
            if failed is None:
                if events:
                    self._write(events, complete=False)
                self.cut("fin")
                return
            end = failed
        self._write([*events, *end, LAST_CHUNK], complete=True)

    def _fail_plain(self, error: ApiError, foreign: bytes | None) -> None:
        """A foreign error has status 200, as some engines send it."""
        self._leave()
        if error.status >= 500:
            self.server.counts.failed += 1
        else:
            self.server.counts.done += 1
        status, body = error.status, error.body(anthropic=self.anthropic)
        if foreign is not None:
            status, body = 200, json_of(foreign)
        self.server.reply(self.connection, self.incoming, status, body, JSON)

    def terminate(self, *, error: bool) -> None:
        if error:
            self.fail([])
        else:
            self.abort_finish([])
