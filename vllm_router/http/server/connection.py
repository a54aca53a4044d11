"""The life of one client connection: requests, deadlines, drain and close."""

from __future__ import annotations

import math

import trio

from vllm_router.http.error_format import path_of
from vllm_router.http.http_error import HttpError
from vllm_router.http.request_ids import request_id
from vllm_router.http.server.asgi_connection import GONE, HERE, HUNG_UP, AsgiConnection
from vllm_router.http.server.request_reader import ARRIVING


class Connection(AsgiConnection):
    """Serves one client; subclasses implement the I/O.

    `await run()` serves it to its end. The result is None if the connection has been closed, else
    the bytes read from the start of a request that another server takes: then the connection is
    open, every earlier response is sent, and the transport belongs to the caller.
    """

    __slots__ = ()

    # -- I/O of subclasses ---------------------------------------------------------------------

    async def _serve(self) -> None:
        """Run `_answer_all`; call `hang_up` when the client closes while no task reads."""
        raise NotImplementedError

    def has_input(self) -> bool:
        """Whether unread bytes are pending."""
        raise NotImplementedError

    def has_output(self) -> bool:
        """Whether bytes wait to be sent."""
        return False

    def left_unseen(self) -> bool:
        """Whether the client has closed behind more bytes than are read ahead."""
        return False

    async def _end_output(self) -> None:
        """Show the client the end of the stream, and keep reading. Raises OSError."""
        raise NotImplementedError

    def _close_now(self) -> bool:
        """Close the transport without a wait. False if it needs `_close`."""
        return False

    async def _close(self) -> None:
        """Close the transport."""
        raise NotImplementedError

    async def _reset(self) -> None:
        """Close the transport so that the client sees no orderly end."""
        raise NotImplementedError

    # -- serving -------------------------------------------------------------------------------

    async def run(self) -> bytes | None:
        self._host.add(self)
        kept_open = False
        try:
            with self._scope:
                await self._serve()
                if self._handed_over is not None:
                    kept_open = True
                    return self._handed_over
            await self._finish()
            return None
        finally:
            self._host.discard(self)
            if not kept_open:
                response = self._response
                truncated = (
                    response is not None and not response.finished and response.looks_complete
                )
                if truncated or not self._close_now():
                    with trio.CancelScope(shield=True):
                        await (self._reset() if truncated else self._close())

    async def _answer_all(self) -> None:
        """Serve requests until the connection ends or is handed over."""
        host, limits = self._host, self._limits
        timeout = limits.header_timeout if host.draining else limits.keep_alive_timeout
        now = host.now
        self.deadline = now() + timeout
        while True:
            head = self._head
            while head is None:
                try:
                    data = await self._read(self._read_size)
                except OSError:
                    data = b""
                if not data:
                    self._presence = GONE
                    return
                self._on_data(data)
                if self._handed_over is not None or self._error is not None:
                    return
                head = self._head
            await self._respond(head)
            response = self._response
            if response is None or response.close or not response.finished or host.closing:
                return
            self._head = self._response = self._finished = None
            self._pieces.clear()
            self.deadline = now() + limits.keep_alive_timeout
            if self._buffer:
                data = bytes(self._buffer)
                self._buffer.clear()
                self._on_data(data)
                if self._handed_over is not None or self._error is not None:
                    return

    def _on_data(self, data: bytes) -> None:
        """Feed the reader while no request is being served, and keep the deadline of the head."""
        begun = bool(self._buffer)
        try:
            self._feed_head(data)
        except HttpError as error:
            self._refuse_head(error, data)
            return
        if self._head is not None or self._handed_over is not None:
            self.deadline = math.inf
        elif self._buffer and not begun:
            self.deadline = self._host.now() + self._limits.header_timeout

    async def _finish(self) -> None:
        """Send the error response, if any, and wait until the client has read it.

        Closing while the client still sends would reset the connection, and the reset could
        overtake the response (RFC 9112 9.6).
        """
        if self._presence is GONE:
            return
        limits = self._limits
        error = self._error
        unread = self._body is ARRIVING or self._buffer or self.has_input()
        if error is None and not unread:
            return
        with trio.move_on_after(limits.max_linger):
            try:
                if error is not None and (self._response is None or not self._response.started):
                    with trio.move_on_after(limits.linger):
                        await self._write_all(error.encode())
                await self._end_output()
                quiet = False
                while not quiet:
                    with trio.move_on_after(limits.linger) as silence:
                        quiet = not await self._read()
                    quiet = quiet or silence.cancelled_caught
            except OSError:
                return  # the client has closed

    # -- events --------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """The client has closed its side; bytes sent before may still be unread.

        A task that reads finds the end itself, and an error response is still sent.
        """
        if self._presence is HERE:
            self._presence = HUNG_UP
        if self._head is not None and not self._reading and self._error is None:
            self.client_left()

    def _refuse_head(self, error: HttpError, data: bytes) -> None:
        """Like `refuse`, for a request that the application never sees."""
        line = bytes(self._buffer or data).partition(b"\r\n")[0]
        error.path = path_of(line)
        error.request_id = request_id(None)
        on_rejected = self._host.on_rejected
        if on_rejected is not None:
            on_rejected(error, self._client, line)
        self.refuse(error)

    def abort(self) -> None:
        """End the connection now, in any state."""
        self._presence = GONE
        self._scope.cancel(reason="aborted")

    def close_if_idle(self) -> None:
        """Close the connection if it waits for a request and no byte of one has arrived."""
        if (
            self._head is None
            and self._handed_over is None
            and not self._buffer
            and not self.has_input()
            and not self.has_output()
        ):
            self._scope.cancel(reason="closed while idle")

    def close_if_idle_since(self, moment: float) -> None:
        """Close the connection if it has waited for a request since `moment` or longer."""
        if self.deadline - self._limits.keep_alive_timeout <= moment:
            self.close_if_idle()

    def expire(self) -> None:
        """The deadline has passed."""
        if self._head is not None:
            self.refuse(HttpError(408, "request_timeout", "the request body took too long"))
        elif self._buffer:
            slow = HttpError(408, "request_timeout", "the request head took too long")
            self._refuse_head(slow, b"")
        else:
            self.close_if_idle()
