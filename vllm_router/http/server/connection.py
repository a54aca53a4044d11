"""One client's connection: requests read ahead of the application, answers in order."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import trio

from vllm_router.http.error_format import path_of
from vllm_router.http.headers import Refusal, check_method, request_line, split_target, too_large
from vllm_router.http.io.wires import READ_SIZE
from vllm_router.http.request_head import (
    HTTP2_PREFACE,
    ChunkedBody,
    Head,
    KnownHead,
    check_partial,
    read_head,
    without_empty_lines,
)
from vllm_router.http.request_ids import request_id
from vllm_router.http.server.response_writer import Answer, Message

if TYPE_CHECKING:
    from vllm_router.http.server.server import Server

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CANCEL_ON_DISCONNECT = "vllm_router.cancel_on_disconnect"
OUTLET = "vllm_router.outlet"
HEAD_MEMO = "vllm_router.head_memo"

BODY_READ_SIZE = 262144

SENDS_PER_CHECKPOINT = 16
"""Sends that went straight into the kernel's buffer before other tasks get their turn."""


class ClientGone(OSError):
    """Sent to nobody: the connection has ended (the ASGI specification asks for an OSError)."""


class Connection:
    """Serves one client; subclasses know how its bytes travel.

    `await run()` serves it to its end. The result is None if it has been closed, else the bytes
    read so far, from the first of the request that the server does not accept: then the
    connection is open, every earlier answer is sent, and the transport belongs to the caller.
    """

    __slots__ = (
        "_answer",
        "_body_open",
        "_body_received",
        "_body_waited",
        "_buffer",
        "_chunks",
        "_client",
        "_delivered",
        "_finished",
        "_gone",
        "_handed_over",
        "_head",
        "_hung_up",
        "_known",
        "_left",
        "_limits",
        "_local",
        "_pieces",
        "_reading",
        "_refusal",
        "_scope",
        "_sends",
        "_server",
        "_unfed",
        "deadline",
    )

    scheme = "http"

    def __init__(
        self,
        server: Server,
        client: tuple[str, int] | None = None,
        local: tuple[str, int] | None = None,
    ) -> None:
        self._server = server
        self._limits = server.limits
        self._client = client
        self._local = local
        self._scope = trio.CancelScope()
        self.deadline = math.inf
        self._sends = 0
        # Why it ends, if it does.
        self._gone = False
        self._hung_up = False
        self._refusal: Refusal | None = None
        self._handed_over: bytes | None = None
        # Bytes behind the current request.
        self._buffer = bytearray()
        # The current request, and its body as far as it has come.
        self._known = KnownHead()
        self._head: Head | None = None
        self._answer: Answer | None = None
        self._finished: trio.Event | None = None
        self._reading = False
        self._body_open = False
        self._chunks: ChunkedBody | None = None
        self._unfed = b""
        self._left = 0
        self._pieces: list[bytes] = []
        self._delivered = False
        self._body_received = 0
        self._body_waited = 0.0

    # -- what a transport does -----------------------------------------------------------------

    async def _serve(self) -> None:
        """Answer requests, and call `hang_up` when the client closes while nobody reads."""
        raise NotImplementedError

    async def _read(self, size: int = READ_SIZE) -> bytes:
        """Some bytes; none when the client has left, or an OSError. Loses nothing when cancelled.

        No more than `size` if they need not be read ahead.
        """
        raise NotImplementedError

    def _write_now(self, data: bytes) -> bool:
        """Begin to send. False if somebody has to wait, in `_write_rest`. Raises OSError."""
        raise NotImplementedError

    async def _write_rest(self, data: bytes) -> None:
        """Wait until what `_write_now` was given has been sent. Raises OSError."""
        raise NotImplementedError

    def has_input(self) -> bool:
        """Whether there are bytes that nobody has read."""
        raise NotImplementedError

    def has_output(self) -> bool:
        """Whether there are bytes that have not been sent."""
        return False

    def left_unseen(self) -> bool:
        """Whether the client has left behind more bytes than are read ahead."""
        return False

    def extensions(self, head: Head) -> dict[str, Any]:
        """What is offered to the application beyond ASGI."""
        return {CANCEL_ON_DISCONNECT: {}, HEAD_MEMO: head.memo}

    async def _end_output(self) -> None:
        """Show the client the end of the stream, but go on listening. Raises OSError."""
        raise NotImplementedError

    async def _close(self, *, reset: bool) -> None:
        """Give everything back; with `reset` so that no client takes it for an orderly end."""
        raise NotImplementedError

    # -- life and death ------------------------------------------------------------------------

    async def run(self) -> bytes | None:
        self._server.add(self)
        kept_open = False
        try:
            with self._scope:
                await self._serve()
                if self._handed_over is not None:
                    kept_open = True
                    return self._handed_over
            await self._say_goodbye()
            return None
        finally:
            self._server.discard(self)
            if not kept_open:
                answer = self._answer
                truncated = answer is not None and not answer.finished and answer.looks_whole
                with trio.CancelScope(shield=True):
                    await self._close(reset=truncated)

    async def _answer_all(self) -> None:
        """One request after the other, until the connection ends or is somebody else's."""
        server, limits = self._server, self._limits
        patience = limits.header_timeout if server.draining else limits.keep_alive_timeout
        now = server.now
        self.deadline = now() + patience
        while True:
            head = self._head
            while head is None:
                try:
                    data = await self._read()
                except OSError:
                    data = b""
                if not data:
                    self._gone = True
                    return
                self._look_for_head(data)
                if self._handed_over is not None or self._refusal is not None:
                    return
                head = self._head
            await self._respond(head)
            answer = self._answer
            if answer is None or answer.close or not answer.finished or server.closing:
                return
            self._head = self._answer = self._finished = None
            self._pieces.clear()
            self.deadline = now() + limits.keep_alive_timeout
            if self._buffer:
                data = bytes(self._buffer)
                self._buffer.clear()
                self._look_for_head(data)
                if self._handed_over is not None or self._refusal is not None:
                    return

    def hang_up(self) -> None:
        """The client has closed its side; bytes that it sent before may still be unread.

        Whoever is reading will find the end behind them, and whoever is refused shall hear it.
        """
        self._hung_up = True
        if self._head is not None and not self._reading and self._refusal is None:
            self.client_left()

    def client_left(self) -> None:
        """End everything: nobody is there to be answered."""
        self._gone = True
        self.deadline = math.inf
        self._scope.cancel(reason="client disconnected")

    def refuse(self, refusal: Refusal) -> None:
        """End the connection; the client is told why, unless an answer has begun."""
        self._server.refused += 1
        head = self._head
        if head is not None:
            refusal.path = head.path
            refusal.request_id = dict(head.headers).get(b"x-request-id")
        self._refusal = refusal
        self.deadline = math.inf
        self._scope.cancel(reason=refusal.code)

    def _refuse_head(self, refusal: Refusal, data: bytes) -> None:
        """The same, for a request of which nobody will hear otherwise."""
        line = bytes(self._buffer or data).partition(b"\r\n")[0]
        refusal.path = path_of(line)
        refusal.request_id = request_id(None)
        told = self._server.told
        if told is not None:
            told(refusal, self._client, line)
        self.refuse(refusal)

    def abort(self) -> None:
        """End the connection now, whatever it is doing."""
        self._gone = True
        self._scope.cancel(reason="aborted")

    def close_if_idle(self) -> None:
        """Close a connection that waits for a request; bytes that have arrived count as one."""
        if (
            self._head is None
            and self._handed_over is None
            and not self._buffer
            and not self.has_input()
            and not self.has_output()
        ):
            self._scope.cancel(reason="closed while idle")

    def close_if_idle_since(self, moment: float) -> None:
        """Close a connection that has waited for a request since `moment` or longer."""
        if self.deadline - self._limits.keep_alive_timeout <= moment:
            self.close_if_idle()

    def expire(self) -> None:
        """The deadline has passed."""
        if self._head is not None:
            self.refuse(Refusal(408, "request_timeout", "the request body took too long"))
        elif self._buffer:
            slow = Refusal(408, "request_timeout", "the request head took too long")
            self._refuse_head(slow, b"")
        else:
            self.close_if_idle()

    async def _say_goodbye(self) -> None:
        """The last bytes, and patience enough for the client to read them.

        Closing while the client still sends would reset the connection, and the reset could
        overtake the answer (RFC 9112 9.6).
        """
        if self._gone:
            return
        limits = self._limits
        refusal = self._refusal
        if refusal is None and not self._body_open and not self._buffer and not self.has_input():
            return
        with trio.move_on_after(limits.max_linger):
            try:
                if refusal is not None and (self._answer is None or not self._answer.started):
                    with trio.move_on_after(limits.linger):
                        await self._write_all(refusal.encode())
                await self._end_output()
                quiet = False
                while not quiet:
                    with trio.move_on_after(limits.linger) as silence:
                        quiet = not await self._read()
                    quiet = quiet or silence.cancelled_caught
            except OSError:
                return  # it did not want to hear

    # -- reading -------------------------------------------------------------------------------

    def _look_for_head(self, data: bytes) -> None:
        """Begin the next request if its head is complete; `data` comes behind the buffer."""
        try:
            buffer = self._buffer
            if buffer:
                self._look_further(data)
                return
            # RFC 9112 2.2: empty lines before a request are an old client's mistake.
            if data.startswith(b"\r\n"):
                data = without_empty_lines(data)
                if not data:
                    return
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                self.deadline = self._server.now() + self._limits.header_timeout
                self._keep_partial(data)
            else:
                self._begin(data, end)
        except Refusal as refusal:
            self._refuse_head(refusal, data)

    def _look_further(self, data: bytes) -> None:
        buffer = self._buffer
        checked = max(0, len(buffer) - 3)
        buffer += data
        if buffer.startswith(b"\r"):
            whole = bytes(buffer)
            buffer.clear()
            self._look_for_head(whole)
            return
        end = buffer.find(b"\r\n\r\n", checked) + 4
        if end < 4:
            self._check_partial(checked)
        else:
            whole = bytes(buffer)
            buffer.clear()
            try:
                self._begin(whole, end)
            except Refusal as refusal:
                self._refuse_head(refusal, whole)

    def _keep_partial(self, data: bytes) -> None:
        self._buffer += data
        self._check_partial(0)

    def _check_partial(self, checked: int) -> None:
        if len(self._buffer) > self._limits.max_head_bytes:
            raise too_large()
        check_partial(self._buffer, checked)

    def _begin(self, data: bytes, end: int) -> None:
        """`data` starts with a whole head of `end` bytes. Raises Refusal."""
        if end > self._limits.max_head_bytes:
            raise too_large()
        head = self._known.read(data, end)
        if head is None:
            head = self._read_new(data, end)
            if head is None:
                return
        self._head = head
        self._answer = Answer(head)
        self._delivered = False
        length = head.content_length
        if not head.chunked and len(data) - end >= length:
            # The whole request at once, as nearly always.
            self._body_open = False
            self.deadline = math.inf
            stop = end + length
            if length:
                self._pieces.append(data[end:stop])
            if stop < len(data):
                self._buffer += data[stop:]
        else:
            self._body_open = True
            self._chunks = ChunkedBody() if head.chunked else None
            self._left = length
            self._body_received = 0
            self._body_waited = 0.0
            self.deadline = math.inf
            if end < len(data):
                self._take_body(data[end:])

    def _read_new(self, data: bytes, end: int) -> Head | None:
        """A head that is not the same as the last; None if it is handed over. Raises Refusal."""
        accepts = self._server.accepts
        if accepts is not None and data.startswith(HTTP2_PREFACE):
            self._hand_over(data)
            return None
        line = request_line(data[: data.find(b"\r\n")])
        method, target, _ = line
        check_method(method)
        if accepts is not None and not accepts(method, split_target(method, target)[0]):
            self._hand_over(data)
            return None
        head = read_head(data[:end], line)
        self._known.note(data[:end], head)
        return head

    def _hand_over(self, data: bytes) -> None:
        self._handed_over = data
        self.deadline = math.inf

    async def _read_body(self) -> None:
        """Wait for more of the current request's body; only now can its client be too slow."""
        limits, now = self._limits, self._server.now()
        credit = self._body_received / limits.min_body_rate - self._body_waited
        self.deadline = now + limits.body_read_timeout + min(0.0, credit)
        self._reading = True
        try:
            if self._unfed:
                data, self._unfed = self._unfed, b""
                await trio.lowlevel.checkpoint()
            else:
                # What is known to come is taken in larger pieces: each costs a turn of the loop.
                data = await self._read(BODY_READ_SIZE if self._left > READ_SIZE else READ_SIZE)
        except OSError:
            data = b""
        finally:
            self._reading = False
            self.deadline = math.inf
            self._body_waited += self._server.now() - now
        if data:
            try:
                self._take_body(data)
            except Refusal as refusal:
                self.refuse(refusal)
            if self._hung_up and not self._body_open:
                self.client_left()
        else:
            self.client_left()

    def _take_body(self, data: bytes) -> None:
        """More of the current request's body, perhaps with something behind it.

        Raises Refusal.
        """
        chunks = self._chunks
        if chunks is None:
            used = min(len(data), self._left)
            self._left -= used
            complete = not self._left
            self._pieces.append(data if used == len(data) else data[:used])
        else:
            pieces, used = chunks.feed(data)
            self._pieces += pieces
            complete = chunks.complete
            if not complete:
                self._unfed = data[used:]
        self._body_received += used
        if complete:
            self._body_open = False
            if used < len(data):
                self._buffer += data[used:]

    # -- answering -----------------------------------------------------------------------------

    async def _respond(self, head: Head) -> None:
        """One request, from the application's first step to its last."""
        server = self._server
        server.requests += 1
        if self._hung_up and not self._body_open:
            self.client_left()
        path = head.path
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": head.http_version,
            "method": head.method,
            "scheme": self.scheme,
            "path": (unquote_to_bytes(path) if b"%" in path else path).decode("utf-8", "replace"),
            "raw_path": path,
            "query_string": head.query,
            "root_path": "",
            "headers": head.headers,
            "client": self._client,
            "server": self._local,
            "extensions": self.extensions(head),
        }
        try:
            await server.app(scope, self._receive, self._send)
        except ClientGone:
            return
        except Exception:
            # Its bug, not ours: this connection ends, the others go on.
            level = logging.DEBUG if self._gone else logging.ERROR
            target = path.decode("ascii")
            log.log(level, "the application failed: %s %s", head.method, target, exc_info=True)
        answer = self._answer
        if answer is not None and not answer.started and not self._gone:
            self.refuse(Refusal(500, "internal_error", "internal error"))

    async def _receive(self) -> Message:
        pieces = self._pieces
        while not pieces:
            head, answer = self._head, self._answer
            if self._gone or head is None or answer is None or answer.finished:
                await trio.lowlevel.checkpoint()  # where the application is cancelled
                return {"type": "http.disconnect"}
            if self._refusal is not None:
                await trio.sleep_forever()  # until the application is cancelled
            if self._reading:
                raise RuntimeError("two tasks receive from one connection")
            if self._body_open:
                if head.expects_continue and not answer.started:
                    head.expects_continue = False
                    await self._write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                await self._read_body()
            elif not self._delivered:
                break
            else:
                # Whoever asks once more wants to know of the end.
                if self._finished is None:
                    self._finished = trio.Event()
                await self._finished.wait()
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._delivered = not self._body_open
        return {"type": "http.request", "body": body, "more_body": self._body_open}

    async def _send(self, message: Message) -> None:
        answer = self._answer
        if answer is None:
            raise RuntimeError("sent after the end of the request")
        kind = message["type"]
        if kind == "http.response.body":
            # An answer to half a request cannot be followed by another.
            data = answer.encode(message, close=self._body_open or self._server.closing)
            wait = self._write(data) if data else None
            if wait is not None:
                await wait
            if self._finished is not None and answer.finished:
                self._finished.set()
        elif kind == "http.response.start":
            answer.hold(message)
        else:
            raise RuntimeError(f"unexpected message {kind!r}")

    async def _write_all(self, data: bytes) -> None:
        """At once if the transport takes it, with a checkpoint only now and then."""
        wait = self._write(data)
        if wait is not None:
            await wait

    def _write(self, data: bytes) -> Awaitable[None] | None:
        """The same; what there is to be awaited is returned, if there is anything."""
        if self._gone:
            raise ClientGone("the client has left")
        try:
            written = self._write_now(data)
        except OSError as error:
            return self._fail(error)
        if not written:
            return self._write_on(data)
        self._sends += 1
        if self._sends % SENDS_PER_CHECKPOINT:
            return None
        return trio.lowlevel.checkpoint()  # noqa: ASYNC105 (the caller does)

    async def _write_on(self, data: bytes) -> None:
        try:
            await self._write_rest(data)
        except OSError as error:
            await self._fail(error)

    async def _fail(self, error: OSError) -> None:
        self.client_left()
        await trio.lowlevel.checkpoint()  # where the application is cancelled
        raise ClientGone("the client has left") from error
