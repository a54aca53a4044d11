"""One client's connection: requests read ahead of the application, answers in order."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import trio

from vllm_router.http1.answer import Answer, Message
from vllm_router.http1.headers import Refusal, check_method, request_line, split_target, too_large
from vllm_router.http1.request import HTTP2_PREFACE, ChunkedBody, Head, check_partial, read_head

if TYPE_CHECKING:
    from vllm_router.http1.server import Server

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

READ_SIZE = 65536

CANCEL_ON_DISCONNECT = "vllm_router.cancel_on_disconnect"

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
        "_body_began",
        "_body_open",
        "_body_received",
        "_buffer",
        "_chunks",
        "_client",
        "_delivered",
        "_gone",
        "_handed_over",
        "_head",
        "_left",
        "_limits",
        "_local",
        "_paused_task",
        "_pieces",
        "_refusal",
        "_scope",
        "_sends",
        "_server",
        "_unread",
        "_waiting",
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
        self._refusal: Refusal | None = None
        self._handed_over: bytearray | None = None
        # Who waits.
        self._waiting: trio.lowlevel.Task | None = None
        self._paused_task: trio.lowlevel.Task | None = None
        # Bytes behind the current request.
        self._buffer = bytearray()
        # The current request, and its body as far as it has come.
        self._head: Head | None = None
        self._answer: Answer | None = None
        self._body_open = False
        self._chunks: ChunkedBody | None = None
        self._left = 0
        self._pieces: list[bytes] = []
        self._unread = 0
        self._delivered = False
        self._body_received = 0
        self._body_began = 0.0

    # -- what a transport does -----------------------------------------------------------------

    async def _read(self) -> bytes:
        """Some bytes; none when the client has left. Loses nothing when cancelled."""
        raise NotImplementedError

    def _write_now(self, data: bytes) -> int:
        """Send what fits at once; the number of bytes that did. Raises OSError."""
        raise NotImplementedError

    async def _write_rest(self, data: memoryview) -> None:
        """Send all of `data`. Raises OSError."""
        raise NotImplementedError

    def hung_up(self) -> bool:
        """Whether the client has left, though nobody reads."""
        raise NotImplementedError

    def has_input(self) -> bool:
        """Whether there are bytes that nobody has read."""
        raise NotImplementedError

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
                    return bytes(self._handed_over)
            await self._say_goodbye()
            return None
        finally:
            self._server.discard(self)
            if not kept_open:
                answer = self._answer
                truncated = answer is not None and not answer.finished and answer.looks_whole
                with trio.CancelScope(shield=True):
                    await self._close(reset=truncated)

    async def _serve(self) -> None:
        limits = self._limits
        patience = limits.header_timeout if self._server.draining else limits.keep_alive_timeout
        self.deadline = trio.current_time() + patience
        # Until the first request, one task is enough.
        while self._head is None:
            data = await self._read()
            if not data:
                self._gone = True
                return
            self._look_for_head(data)
            if self._handed_over is not None:
                return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_reading)
            await self._keep_answering()
            nursery.cancel_scope.cancel()

    def client_left(self) -> None:
        """End everything: nobody is there to be answered."""
        self._gone = True
        self.deadline = math.inf
        self._scope.cancel(reason="client disconnected")
        self._wake()

    def refuse(self, refusal: Refusal) -> None:
        """End the connection; the client is told why, unless an answer has begun."""
        self._server.refused += 1
        self._refusal = refusal
        self.deadline = math.inf
        self._scope.cancel(reason=refusal.code)

    def _refuse_head(self, refusal: Refusal, data: bytes) -> None:
        """The same, for a request of which nobody will hear otherwise."""
        told = self._server.told
        if told is not None:
            told(refusal, self._client, bytes(self._buffer or data).partition(b"\r\n")[0])
        self.refuse(refusal)

    def abort(self) -> None:
        """End the connection now, whatever it is doing."""
        self._gone = True
        self._scope.cancel(reason="aborted")

    def close_if_idle(self) -> None:
        """Close a connection that waits for a request; bytes that have arrived count as one."""
        if self._head is None and not self._buffer and not self.has_input():
            self._scope.cancel(reason="draining")

    def close_if_idle_since(self, moment: float) -> None:
        """Close a connection that has waited for a request since `moment` or longer."""
        if self.deadline - self._limits.keep_alive_timeout <= moment:
            self.close_if_idle()

    def expire(self) -> None:
        """The deadline has passed."""
        self.deadline = math.inf
        if self._head is not None:
            self.refuse(Refusal(408, "request_timeout", "the request body took too long"))
        elif self._buffer:
            slow = Refusal(408, "request_timeout", "the request head took too long")
            self._refuse_head(slow, b"")
        else:
            self._scope.cancel(reason="idle")

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

    async def _keep_reading(self) -> None:
        limits = self._limits
        while True:
            data = await self._read()
            if self._handed_over is not None:
                self._handed_over += data
                return
            if not data:
                self.client_left()
                return
            if self._head is None:
                self._look_for_head(data)
            elif self._body_open:
                self._take_body(data)
            else:
                self._buffer += data
            while self._head is not None and (
                self._unread >= limits.max_unread_body
                if self._body_open
                else len(self._buffer) >= limits.max_read_ahead
            ):
                await self._pause()

    @property
    def paused(self) -> bool:
        """Whether the reader waits for the application rather than for the client."""
        return self._paused_task is not None

    async def _pause(self) -> None:
        def abort(_: object) -> trio.lowlevel.Abort:
            self._paused_task = None
            return trio.lowlevel.Abort.SUCCEEDED

        before = trio.current_time()
        self.deadline = math.inf
        self._paused_task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)
        if self._body_open:
            now = trio.current_time()
            self._body_began += now - before
            self.deadline = now + self._limits.body_read_timeout

    def _resume(self) -> None:
        task = self._paused_task
        if task is not None:
            self._paused_task = None
            trio.lowlevel.reschedule(task)

    def _look_for_head(self, data: bytes) -> None:
        """Begin the next request if its head is complete; `data` comes behind the buffer."""
        try:
            buffer = self._buffer
            if buffer:
                self._look_further(data)
                return
            # RFC 9112 2.2: empty lines before a request are an old client's mistake.
            while data.startswith(b"\r\n"):
                data = data[2:]
            if not data:
                return
            self.deadline = trio.current_time() + self._limits.header_timeout
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
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
            self._begin(whole, end)

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
        accepts = self._server.accepts
        if accepts is not None and data.startswith(HTTP2_PREFACE):
            self._hand_over(data)
            return
        line = request_line(data[: data.find(b"\r\n")])
        method, target, _ = line
        check_method(method)
        if accepts is not None and not accepts(method, split_target(method, target)[0]):
            self._hand_over(data)
            return
        head = read_head(data[:end], line)
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
            self._unread = 0
            self._body_received = 0
            self._body_began = trio.current_time()
            self._take_body(data[end:])
        self._wake()

    def _hand_over(self, data: bytes) -> None:
        self._handed_over = bytearray(data)
        self.deadline = math.inf
        self._wake()

    def _take_body(self, data: bytes) -> None:
        """More of the current request's body, perhaps with something behind it."""
        chunks = self._chunks
        if chunks is None:
            used = min(len(data), self._left)
            self._left -= used
            self._unread += used
            complete = not self._left
            if used:
                self._pieces.append(data if used == len(data) else data[:used])
        else:
            try:
                pieces, used = chunks.feed(data)
            except Refusal as refusal:
                self.refuse(refusal)
                return
            self._pieces += pieces
            self._unread += sum(map(len, pieces))
            complete = chunks.complete
        if complete:
            self._body_open = False
            self.deadline = math.inf
            if used < len(data):
                self._buffer += data[used:]
        else:
            limits = self._limits
            self._body_received += used
            self.deadline = limits.body_read_timeout + min(
                trio.current_time(),
                self._body_began + self._body_received / limits.min_body_rate,
            )
        self._wake()

    # -- the handler's waiting -----------------------------------------------------------------

    async def _wait(self) -> None:
        """Until the reader has something new."""
        if self._waiting is not None:
            raise RuntimeError("two tasks receive from one connection")

        def abort(_: object) -> trio.lowlevel.Abort:
            self._waiting = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._waiting = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    def _wake(self) -> None:
        task = self._waiting
        if task is not None:
            self._waiting = None
            trio.lowlevel.reschedule(task)

    # -- answering -----------------------------------------------------------------------------

    async def _keep_answering(self) -> None:
        while True:
            while self._head is None:
                await self._wait()
                if self._handed_over is not None:
                    return
            if self._refusal is not None or self._gone:
                return
            await self._respond(self._head)
            answer = self._answer
            if answer is None or answer.close or not answer.finished or self._server.closing:
                return
            self._head = self._answer = None
            self._pieces.clear()
            if self._buffer:
                data = bytes(self._buffer)
                self._buffer.clear()
                self._look_for_head(data)
                if self._handed_over is not None or self._refusal is not None:
                    return
                self._resume()
            else:
                self.deadline = trio.current_time() + self._limits.keep_alive_timeout

    async def _respond(self, head: Head) -> None:
        """One request, from the application's first step to its last."""
        server = self._server
        server.requests += 1
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
            "extensions": {CANCEL_ON_DISCONNECT: {}},
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
        while True:
            head, answer = self._head, self._answer
            if self._gone or head is None or answer is None or answer.finished:
                await trio.lowlevel.checkpoint()  # where the application is cancelled
                return {"type": "http.disconnect"}
            if self._pieces:
                break
            if not self._body_open:
                if not self._delivered:
                    break
            elif head.expects_continue and not answer.started:
                head.expects_continue = False
                await self._write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                continue
            await self._wait()
        pieces = self._pieces
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._unread = 0
        self._resume()
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
            if data:
                await self._write_all(data)
            if answer.finished:
                self._wake()
        elif kind == "http.response.start":
            answer.hold(message)
        else:
            raise RuntimeError(f"unexpected message {kind!r}")

    async def _write_all(self, data: bytes) -> None:
        """At once if the transport takes it, with a checkpoint only now and then."""
        try:
            if self._gone:
                raise ClientGone("the client has left")
            sent = self._write_now(data)
            if sent < len(data):
                await self._write_rest(memoryview(data)[sent:])
                return
        except OSError as error:
            self.client_left()
            await trio.lowlevel.checkpoint()  # where the application is cancelled
            raise ClientGone("the client has left") from error
        self._sends += 1
        if self._sends % SENDS_PER_CHECKPOINT == 0:
            await trio.lowlevel.checkpoint()
