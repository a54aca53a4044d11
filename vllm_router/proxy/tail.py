"""The end of a relayed response: kept, and judged when the response is over."""

from __future__ import annotations

from vllm_router.proxy.answers.ending import Ending, read_ending
from vllm_router.proxy.answers.events import block_start
from vllm_router.proxy.answers.opening import Verdict
from vllm_router.proxy.answers.tables import Api
from vllm_router.proxy.answers.usage import Usage, UsageScanner
from vllm_router.proxy.answers.whole import JsonBalance

KEPT = 2048
"""Bytes of a stream's end that are kept at least: its last few events."""

TRIM_AT = 16384
"""Bytes at which the kept end of a stream is cut back."""

LONGEST_EVENT = 1024 * 1024
"""Bytes of one event that are kept whole, so that it can be read if it is the last: the last event
of /v1/responses repeats the whole answer."""


BEGINNING = 256
"""Bytes of a longer event's beginning that are kept: its name is there."""


class StreamTail:
    """The last events of an event stream, at most LONGEST_EVENT and a piece."""

    __slots__ = ("_beginning", "_kept", "_pieces", "_trim_at")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._kept = 0
        self._trim_at = TRIM_AT
        self._beginning: bytes | None = None
        """The first bytes of the event whose end comes first; None if that is whole."""

    def add(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._kept = kept = self._kept + len(piece)
        if kept > self._trim_at:
            self._trim()

    def _trim(self) -> None:
        """Drop events from the front; linear in the bytes added, however long an event is."""
        data = b"".join(self._pieces)
        start = block_start(data, len(data) - KEPT)
        if start == 0 and len(data) > LONGEST_EVENT:
            start = len(data) - KEPT
            while start and data[start - 1] in b"\r\n":  # a boundary of events stays whole
                start -= 1
            if self._beginning is None:
                self._beginning = data[:BEGINNING]
        elif start:
            self._beginning = None
        self._pieces = [data[start:]]
        self._kept = len(data) - start
        self._trim_at = max(TRIM_AT, 2 * self._kept)

    @property
    def bytes(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces = [data]
        return data

    def read(self, api: Api) -> Ending:
        data = b"".join(self._pieces)
        self._pieces = [data]
        return read_ending(api, data, beginning=self._beginning)


class PlainTail:
    """The state of a plain body that is too long to be held.

    The brackets of JSON are counted if its length was not announced. A proxy that reads up to the
    end of a connection writes an orderly end behind half an answer.
    """

    __slots__ = ("_balance", "_last", "_usage")

    def __init__(self, *, json: bool, has_length: bool) -> None:
        self._usage = UsageScanner() if json else None
        self._balance = None if has_length or not json else JsonBalance()
        self._last = b""

    def add(self, piece: bytes) -> None:
        self._last = piece
        if self._usage is not None:
            self._usage.feed(piece)
        if self._balance is not None:
            self._balance.feed(piece)

    @property
    def bytes(self) -> bytes:
        return self._last[-KEPT:]

    def read(self, api: Api) -> Ending:
        usage: Usage | None = self._usage.usage if self._usage is not None else None
        if self._balance is not None and not self._balance.whole:
            return Ending(Verdict.UNFINISHED, usage)
        return Ending(Verdict.UNJUDGED, usage)
