"""One answer in progress, and everything that may deliberately go wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from .connection import Connection, Incoming
from .faults import Fault
from .heads import EVENT_STREAM, JSON
from .request import Request
from .shapes import DONE, ENGINE_DEAD, LAST_CHUNK, Shape, encode, error_event

if TYPE_CHECKING:
    from .driver import EngineDriver
    from .server import MockServer


def engine_dead() -> bytes:
    return encode(
        {
            "error": {
                "message": ENGINE_DEAD,
                "type": "InternalServerError",
                "param": None,
                "code": 500,
            }
        }
    )


class Exchange:
    """Holds its place in `server.active` until it is ended or the client leaves."""

    def __init__(
        self, server: MockServer, connection: Connection, incoming: Incoming, fault: Fault
    ) -> None:
        self.server = server
        self.connection = connection
        self.incoming = incoming
        self.fault = fault
        self.over = False
        self.spoiled = False  # complete, but wrong on purpose
        server.active.add(self)
        connection.answerer = self

    def end(self) -> None:
        """All has been written."""
        self._leave()
        if self.spoiled:
            self.server.counts.failed += 1
        else:
            self.server.counts.done += 1
        self.connection.finish(keep_alive=self.incoming.keep_alive)

    def cut(self, how: str) -> None:
        """Close the connection in the middle of something: `fin` or `rst`."""
        self._leave()
        self.server.counts.failed += 1
        self.connection.close(how)

    def lost(self) -> None:
        """The client has left."""
        if not self.over:
            self._leave()
            self.server.counts.aborted += 1

    def terminate(self, *, error: bool) -> None:
        """The server ends while this waits: not a byte, as was seen of a real one."""
        self.cut("fin")

    def _leave(self) -> None:
        self.over = True
        self.server.active.discard(self)

    def mistreat_unanswered(self) -> bool:
        """Modes that need no answer to spoil; True if the request has been dealt with."""
        fault = self.fault
        if fault.status:
            kind = "BadRequestError" if fault.status < 500 else "InternalServerError"
            error = {
                "message": f"mock {fault.status}",
                "type": kind,
                "param": None,
                "code": fault.status,
            }
            extra = b""
            if fault.retry_after is not None:
                extra = b"retry-after: %b\r\n" % f"{fault.retry_after:g}".encode()
            self._leave()
            self.server.counts.failed += 1
            body = b"" if fault.status in (204, 304) else encode({"error": error})
            self.server.reply(self.connection, self.incoming, fault.status, body, JSON, extra=extra)
        elif fault.mode == "reset":
            self.cut("rst")
        elif fault.mode == "close":
            self.cut("fin")
        elif fault.mode == "raw":
            self.connection.write(fault.raw)
            self.server.counts.failed += 1
            if not fault.keep_open:
                self._leave()
                self.connection.close("fin")
        elif fault.mode == "die":
            self.server.stop()
        elif fault.mode == "engine_death":
            self._leave()
            self.server.counts.failed += 1
            self.server.reply(self.connection, self.incoming, 500, engine_dead(), JSON)
            self.server.lose_engine()
        else:
            return fault.mode == "hang"
        return True

    def plain(self, body: bytes, content_type: bytes = JSON) -> None:
        """A complete answer, or as much of it as the fault lets through."""
        if self.over:
            return
        mode = self.fault.mode
        head = self.server.heads.head(
            self.incoming, 200, length=len(body), content_type=content_type
        )
        if mode == "hang_after_head":
            self.connection.write(head)
        elif mode in ("midreset", "midclose", "midhang"):
            self.connection.write(head + body[: len(body) // 2])
            self._break(mode)
        elif mode == "trickle":
            self.connection.write(head)
            self.server.start_soon(Trickle(self, body).run)
        else:
            self.connection.write(head + body)
            self.end()

    def _break(self, mode: str) -> None:
        if mode == "midreset":
            self.cut("rst")
        elif mode == "midclose":
            self.cut("fin")
        else:
            self.server.counts.failed += 1  # and stays open, silent


class Trickle:
    """Sends byte by byte; what is added later follows. Ends the exchange when told so."""

    def __init__(self, exchange: Exchange, data: bytes = b"", *, complete: bool = True) -> None:
        self._exchange = exchange
        self._data = data
        self._complete = complete

    def add(self, data: bytes, *, complete: bool) -> None:
        self._data += data
        self._complete = complete

    async def run(self) -> None:
        while not self._exchange.over:
            if self._data:
                self._exchange.connection.write(self._data[:1])
                self._data = self._data[1:]
            elif self._complete:
                self._exchange.end()
                return
            await trio.sleep(self._exchange.fault.trickle)


class Generation(Exchange):
    """An exchange that gets words from an engine. Is the request's sink."""

    def __init__(
        self,
        server: MockServer,
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
        self.last_write = incoming.arrived
        self._shape = shape
        self._opened = False
        self._sent = 0
        self._trickle: Trickle | None = None
        self._limit: int | None = None  # tokens to let pass before the fault
        if fault.mode in ("midreset", "midclose", "midhang", "abort_finish", "error_event"):
            self._limit = fault.after if fault.after is not None else request.limit // 2

    def begin(self) -> None:
        """Called when the engine has accepted the request: a stream's head goes out at once."""
        if self.stream:
            self.connection.write(
                self.server.heads.head(self.incoming, 200, length=None, content_type=EVENT_STREAM)
            )
            if self.fault.mode == "trickle":
                self._trickle = Trickle(self, complete=False)
                self.server.start_soon(self._trickle.run)
        elif self.fault.mode == "hang_after_head":
            self.plain(self._shape.whole())

    def lost(self) -> None:
        super().lost()
        if self.driver is not None:
            self.driver.abort(self.request)

    def comment(self, now: float, interval: float) -> float:
        """A sign of life if this is a stream that has been silent; when the next may be due."""
        if not self.stream or self.over:
            return now + interval
        if self.last_write + interval <= now:
            self.connection.write(b"e\r\n: keep-alive\n\n\r\n")
            self.last_write = now
        return self.last_write + interval

    def deliver(self, words: list[bytes]) -> None:
        if self.over:
            return
        if self.fault.mode == "no_token":
            self._end_before_the_first_token()
            return
        limit = self._limit
        cut_here = self.stream or self.fault.mode in ("abort_finish", "error_event")
        if limit is not None and cut_here and self._sent + len(words) >= limit:
            self._spoil(words[: limit - self._sent])
            return
        self._sent += len(words)
        # The engine may be steps ahead of what is delivered: the last word is still to come then.
        finished = self.request.finish_reason is not None and self._sent >= len(self.request.words)
        if not self.stream:
            if finished:
                self.plain(self._shape.whole())
            return
        events = self._events(words)
        if finished:
            events += self._ending()
        self._write(b"".join(events), complete=finished)

    def _events(self, words: list[bytes]) -> list[bytes]:
        events = [] if self._opened else self._shape.opening()
        self._opened = True
        return events + self._shape.delta(words)

    def _ending(self) -> list[bytes]:
        events = self._shape.closing()
        if self._shape.done:
            events.append(DONE)
        return [*events, LAST_CHUNK]

    def _write(self, data: bytes, *, complete: bool) -> None:
        if self._trickle is not None:
            self._trickle.add(data, complete=complete)
            return
        self.connection.write(data)
        if complete:
            self.end()
        else:
            self.last_write = trio.current_time()

    def _stop_engine(self, words: list[bytes], reason: str | None) -> None:
        """Take the request away from the engine, with no more than `words` delivered on top."""
        request = self.request
        if self.driver is not None:
            self.driver.abort(request)
        self._sent += len(words)
        request.words = request.words[: self._sent]
        request.generated = len(request.words)
        request.finish_reason = reason

    def _spoil(self, words: list[bytes]) -> None:
        """The point of the fault is reached; these are the last words to pass."""
        mode = self.fault.mode
        if mode == "abort_finish":
            self.abort_finish(words)
        elif mode == "error_event":
            self.error(words)
        else:
            self._stop_engine(words, None)
            if words or self._sent:
                self.connection.write(b"".join(self._events(words)))
            self._break(mode)

    def abort_finish(self, words: list[bytes]) -> None:
        """A clean-looking end with finish_reason "abort"."""
        self._stop_engine(words, "abort")
        self.spoiled = True
        if self.stream:
            self._write(b"".join(self._events(words) + self._ending()), complete=True)
        else:
            self._limit = None
            self.plain(self._shape.whole())

    def error(self, words: list[bytes]) -> None:
        """An error event and `[DONE]`; status 500 if nothing has been sent."""
        self._stop_engine(words, None)
        self.spoiled = True
        if self.stream:
            events = self._events(words) if words or self._opened else []
            self._write(b"".join([*events, error_event(), DONE, LAST_CHUNK]), complete=True)
        else:
            self._leave()
            self.server.counts.failed += 1
            self.server.reply(self.connection, self.incoming, 500, engine_dead(), JSON)

    def _end_before_the_first_token(self) -> None:
        """A clean-looking end of a stream with no token and no reason; 500 if it is no stream."""
        if not self.stream:
            self.error([])
            return
        self._stop_engine([], None)
        self.spoiled = True
        self._write(b"".join([*self._shape.opening(), DONE, LAST_CHUNK]), complete=True)

    def terminate(self, *, error: bool) -> None:
        if error:
            self.error([])
        else:
            self.abort_finish([])
