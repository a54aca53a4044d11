"""Response heads, byte for byte as uvicorn and vLLM's middleware write them."""

from __future__ import annotations

import http
import os
import time
from email.utils import formatdate

from vllm_router.lab.mock.connection import Incoming

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"

_PHRASES = {status.value: status.phrase for status in http.HTTPStatus}


class Heads:
    """`name` is sent as x-mock-server; `request_ids` as --enable-request-id-headers of vLLM."""

    def __init__(self, name: str, *, request_ids: bool) -> None:
        self.name = name
        self._request_ids = request_ids
        self._second = 0
        self._dated = b""
        self._lines: dict[int, bytes] = {}

    def head(
        self,
        incoming: Incoming,
        status: int,
        *,
        length: int | None,
        content_type: bytes = b"",
        extra: bytes = b"",
        vary: bool = True,
        chunked: bool = True,
        location: bytes = b"",
    ) -> bytes:
        """`length` None: chunked, or delimited by the connection's end.

        `extra`, `location` and `vary` are header lines at their place in the captured heads.
        """
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._dated = f"date: {formatdate(now, usegmt=True)}\r\nserver: uvicorn\r\n".encode()
        line = self._lines.get(status)
        if line is None:
            line = f"HTTP/1.1 {status} {_PHRASES.get(status, 'Unknown')}\r\n".encode()
            self._lines[status] = line
        parts = [line, self._dated, extra]
        if length is not None:
            parts.append(b"content-length: %d\r\n" % length)
        if location:
            parts.append(b"location: %b\r\n" % location)
        if content_type:
            parts.append(b"content-type: %b\r\n" % content_type)
        if vary:
            parts.append(b"vary: Origin\r\n")
        if self._request_ids and vary:
            given = incoming.header(b"x-request-id")
            identity = os.urandom(16).hex() if given is None else given
            parts.append(b"x-request-id: %b\r\n" % identity.encode("latin-1"))
        parts.append(b"x-mock-server: %b\r\n" % self.name.encode())
        if not incoming.keep_alive:
            parts.append(b"connection: close\r\n")
        if length is None and chunked:
            parts.append(b"transfer-encoding: chunked\r\n")
        parts.append(b"\r\n")
        return b"".join(parts)
