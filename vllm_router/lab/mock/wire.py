"""Framing and compression of response bodies that differ from uvicorn's."""

from __future__ import annotations

import gzip
import zlib

from vllm_router.lab.mock.faults import Fault
from vllm_router.lab.mock.shapes import LAST_CHUNK, chunk

_GZIP = 31  # zlib's window bits for a gzip header and trailer


def payload(framed: bytes) -> bytes:
    """The payload of one HTTP chunk; `framed` is a chunk made by `shapes.chunk`."""
    return framed[framed.index(b"\r\n") + 2 : -2]


class Wire:
    """The treatment of one answer's body, as the fault has it.

    `framing: close`: no length and no chunks, the end of the connection ends the body.
    `packing: gzip`: packed, flushed after each write, as a compressing proxy does.
    `null_error`: every JSON event says `"error": null` first, as some engines do.
    """

    def __init__(self, fault: Fault) -> None:
        self.until_close = fault.framing == "close"
        self._packing = fault.packing == "gzip"
        self._packer = zlib.compressobj(wbits=_GZIP) if self._packing else None
        self._null_error = fault.null_error

    @staticmethod
    def of(fault: Fault) -> Wire | None:
        """None if the fault does not change the framing."""
        if fault.framing == "close" or fault.packing or fault.null_error:
            return Wire(fault)
        return None

    @property
    def headers(self) -> bytes:
        return b"content-encoding: gzip\r\n" if self._packing else b""

    def whole(self, body: bytes) -> bytes:
        """The body of a response that is not a stream."""
        return gzip.compress(body, mtime=0) if self._packing else body

    def write(self, chunks: list[bytes]) -> bytes:
        """Frame events, each as its own chunk; the last item may be `LAST_CHUNK`."""
        last = bool(chunks) and chunks[-1] == LAST_CHUNK
        events = [payload(each) for each in (chunks[:-1] if last else chunks)]
        if self._null_error:
            events = [event.replace(b"data: {", b'data: {"error":null,', 1) for event in events]
        if self._packer is not None:
            packed = self._packer.compress(b"".join(events))
            packed += self._packer.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)
            events = [packed]
        if self.until_close:
            return b"".join(events)
        framed = b"".join(chunk(event) for event in events if event)
        return framed + LAST_CHUNK if last else framed
