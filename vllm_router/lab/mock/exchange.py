"""One response in progress, with the injected faults."""

from __future__ import annotations

import trio

from vllm_router.lab.mock.connection import Connection, Incoming
from vllm_router.lab.mock.faults import Fault
from vllm_router.lab.mock.heads import JSON
from vllm_router.lab.mock.shapes import encode, engine_dead
from vllm_router.lab.mock.state import ServerState
from vllm_router.lab.mock.wire import Wire


class Exchange:
    """In `server.active` until it ends or the client disconnects."""

    def __init__(
        self, server: ServerState, connection: Connection, incoming: Incoming, fault: Fault
    ) -> None:
        self.server = server
        self.connection = connection
        self.incoming = incoming
        self.fault = fault
        self.wire = Wire.of(fault)
        self.over = False
        self.spoiled = False  # complete, but deliberately wrong
        server.active.add(self)
        connection.answerer = self

    def end(self) -> None:
        """The response is complete."""
        self._leave()
        if self.spoiled:
            self.server.counts.failed += 1
        else:
            self.server.counts.done += 1
        self.connection.finish(keep_alive=self.incoming.keep_alive)

    def cut(self, how: str) -> None:
        """Close the connection in the middle of the response: `fin` or `rst`."""
        self._leave()
        self.server.counts.failed += 1
        self.connection.close(how)

    def lost(self) -> None:
        """The client has disconnected."""
        if not self.over:
            self._leave()
            self.server.counts.aborted += 1

    def terminate(self, *, error: bool) -> None:
        """The server ends: close without a byte, as a real server does."""
        self.cut("fin")

    def abort(self, identities: set[str] | None) -> bool:
        """Only generations can be aborted."""
        return False

    def send_keep_alive(self, now: float, interval: float) -> float:
        """Only streams send comments."""
        return now + interval

    def _leave(self) -> None:
        self.over = True
        self.server.active.discard(self)

    def mistreat_unanswered(self) -> bool:
        """Apply the modes that need no response; returns True if the request is handled."""
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
            self.server.reply(self.connection, self.incoming, 500, engine_dead().body(), JSON)
            self.server.lose_engine()
        else:
            return fault.mode == "hang"
        return True

    def head(self, content_type: bytes, length: int | None) -> bytes:
        """The head of a 200 response; `length` None: chunked, or until the connection ends."""
        wire = self.wire
        if wire is None:
            return self.server.heads.head(
                self.incoming, 200, length=length, content_type=content_type
            )
        if wire.until_close:
            self.incoming.keep_alive = False
        return self.server.heads.head(
            self.incoming,
            200,
            length=None if wire.until_close else length,
            content_type=content_type,
            extra=wire.headers,
            chunked=length is None and not wire.until_close,
        )

    def plain(self, body: bytes, content_type: bytes = JSON) -> None:
        """Send a complete response, or the part of it that the fault allows."""
        if self.over:
            return
        mode = self.fault.mode
        if mode in ("empty", "unfinished"):
            self.spoiled = True
            body = b"" if mode == "empty" else body[: len(body) // 2]
        if self.wire is not None:
            body = self.wire.whole(body)
        head = self.head(content_type, len(body))
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
            self.server.counts.failed += 1  # stays open and silent


class Trickle:
    """Sends byte by byte, including data added later; ends the exchange after the last byte."""

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
