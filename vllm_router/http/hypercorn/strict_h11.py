"""h11 made as strict about request framing as the lane.

h11 joins folded lines, accepts control characters, takes a bare LF for the end of a line, and
ignores a bare CR in a chunk extension and framing fields in a trailer; RFC 9112 permits most of
that. If two servers share an address, both must read a request alike. h11 also refuses the last
request of a connection because of bytes that follow it.

Names that h11 does not promise are used in this file alone.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import h11
from h11._readers import ChunkedReader, expect_nothing, maybe_read_from_IDLE_client

from vllm_router.http.chunked import ChunkedBody
from vllm_router.http.http_error import HttpError
from vllm_router.http.request_head import BARE, BARE_MESSAGE, without_empty_lines
from vllm_router.http.syntax import too_many_fields

_HEAD_END = re.compile(rb"\n\r?\n")
_FOLDED = re.compile(rb"\n[ \t]")
_CONTROL = re.compile(rb"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")


class StrictConnection(h11.Connection):
    """The server's side of one connection.

    `line` is the first line of the last request head, well-formed or not. The application, not
    the server, decides about 100 Continue: see `expects_continue`.
    """

    def __init__(self, max_head: int) -> None:
        self.line = b""
        super().__init__(h11.SERVER, max_incomplete_event_size=max_head)

    @property
    def they_are_waiting_for_100_continue(self) -> bool:
        """False: Hypercorn would send it before the application has seen the request."""
        return False

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for 100 Continue."""
        return self.client_is_waiting_for_100_continue and self.our_state is h11.SEND_RESPONSE

    def _get_io_object(self, role: Any, event: Any, io_dict: Any) -> Any:
        found = super()._get_io_object(role, event, io_dict)
        if found is maybe_read_from_IDLE_client:
            return self._read_head
        if found is expect_nothing:
            return _drop
        return _Chunks() if isinstance(found, ChunkedReader) else found

    def _read_head(self, buffer: Any) -> Any:
        data = bytes(buffer)
        if data.startswith(b"\r\n"):
            # RFC 9112 2.2: some old clients send empty lines before a request.
            found = without_empty_lines(data)
            buffer.maybe_extract_at_most(len(data) - len(found))
            data = found
        end = _HEAD_END.search(data)
        head = data[: end.end()] if end is not None else data
        if end is not None or b"\n" in head:
            self.line = head.partition(b"\r\n")[0]
        if end is not None and too_many_fields(head):
            raise h11.LocalProtocolError("too many fields", error_status_hint=431)
        if BARE.search(head):
            raise h11.LocalProtocolError(BARE_MESSAGE)
        if _FOLDED.search(head):
            raise h11.LocalProtocolError("folded line in the head")
        if _CONTROL.search(head):
            raise h11.LocalProtocolError("control character in the head")
        return maybe_read_from_IDLE_client(buffer)


def _drop(buffer: Any) -> None:
    """Drop bytes that follow the last request of a connection (RFC 9112 9.6).

    h11 refuses the request before them instead.
    """
    buffer.maybe_extract_at_most(len(buffer))


class _Chunks:
    """h11's reader of a chunked body, with the lane's decoder."""

    def __init__(self) -> None:
        self._body = ChunkedBody()
        self._pieces: list[bytes] = []

    def __call__(self, buffer: Any) -> h11.Data | h11.EndOfMessage | None:
        if not self._pieces and not self._body.complete:
            data = bytes(buffer.maybe_extract_at_most(len(buffer)) or b"")
            if not data:
                return None
            try:
                pieces, used = self._body.feed(data)
            except HttpError as error:
                raise h11.LocalProtocolError(
                    error.message, error_status_hint=error.status
                ) from None
            self._pieces += pieces
            buffer += data[used:]
        if self._pieces:
            # One event for all: a body may arrive in chunks of one byte.
            body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._pieces.clear()
            return h11.Data(data=body)
        return h11.EndOfMessage() if self._body.complete else None

    def read_eof(self) -> NoReturn:
        raise h11.RemoteProtocolError("the client left in the middle of a chunked body")
