"""The first events of a stream, held until they prove that the engine has answered.

vLLM sends the head and the opening events of a stream before the engine has done anything. Until
an event proves output, the request may be sent to another server and the client sees one answer.
"""

from __future__ import annotations

import enum
from typing import Any

from vllm_router.proxy.answers.events import BlockReader, decode_event
from vllm_router.proxy.answers.faults import Fault, fault_of
from vllm_router.proxy.answers.quick import opening_signs
from vllm_router.proxy.answers.signs import (
    ABORTS,
    ENDS,
    FAILS,
    FINISHES,
    OPENS,
    PROVES,
    UNKNOWN,
    Signs,
)
from vllm_router.proxy.answers.tables import CHUNKED, Api, error_in_plain_json, read_event


class Verdict(enum.Enum):
    """The judgement of an answer, or of the beginning of one."""

    WAIT = "wait"  # more must come
    PROVEN = "proven"  # output
    REJECTED = "rejected"  # an error that is the client's own: the answer for the client
    UNJUDGED = "unjudged"  # not readable: passed on as it comes
    NO_TOKENS = "no_tokens"  # a proper end and not one token: suspect
    UNCLEAR = "unclear"  # an error that may be the client's or the server's
    EMPTY = "empty"  # nothing, or an end without a reason
    UNFINISHED = "unfinished"  # output, and no end
    ABORTED = "aborted"  # the engine gave up before the first token
    CUT = "cut"  # the engine gave up after tokens: its answer, with a reason
    FAILED = "failed"  # an error of the server
    BUSY = "busy"  # an error that says the server is full


WAIT, PROVEN, UNJUDGED = Verdict.WAIT, Verdict.PROVEN, Verdict.UNJUDGED
"""Module-level names, see `ANSWERED` in `retry.py`."""

FAULTS = {
    Fault.CLIENT: Verdict.REJECTED,
    Fault.SERVER: Verdict.FAILED,
    Fault.BUSY: Verdict.BUSY,
    Fault.UNCLEAR: Verdict.UNCLEAR,
}


class Opening:
    """Reads the first pieces of an event stream.

    `held` are the bytes that the client has not got, in order, without the comments: whole
    comment lines may go to the client at once (`take_comments`), since they commit nothing.
    `error` is the payload of the event that failed.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._blocks: BlockReader | None = None
        """Made for the first piece that the quick reader does not know."""
        self._held: list[bytes] = []
        self._seen: Signs = OPENS
        self._size = 0
        self.error: Any = None

    @property
    def size(self) -> int:
        """Bytes held and being read."""
        return self._size

    @property
    def has_events(self) -> bool:
        """Whether any event has come."""
        return bool(self._held)

    @property
    def held(self) -> bytes:
        if self._blocks is not None:
            return b"".join([*self._held, self._blocks.pending])
        return b"".join(self._held)

    def take_comments(self) -> bytes:
        """Comment lines that have come since the last call."""
        comments = self._blocks.comments if self._blocks is not None else None
        if not comments:
            return b""
        taken = bytes(comments)
        comments.clear()
        self._size -= len(taken)
        # Blank lines alone keep nothing alive and say nothing.
        return taken if not taken.isspace() else b""

    def feed(self, piece: bytes) -> Verdict:
        """Read one piece. After another verdict than WAIT it must not be called again."""
        self._size += len(piece)
        blocks = self._blocks
        if self._api in CHUNKED and (blocks is None or blocks.empty):
            signs = opening_signs(piece)
            if signs is not None:
                self._held.append(piece)
                return PROVEN if signs else WAIT
        if blocks is None:
            blocks = self._blocks = BlockReader()
        for block in blocks.feed(piece):
            self._held.append(block)
            verdict = self._judge(block.rstrip(b"\r\n"))
            if verdict is not WAIT:
                return verdict
        return WAIT

    def end(self) -> Verdict:
        """The stream has ended, as its framing says. A last event may lack its blank line.

        Some servers send an error as plain JSON under the type of a stream. It becomes an event:
        clients would see nothing.
        """
        pending = self._blocks.pending if self._blocks is not None else b""
        if not pending.startswith(b":"):
            error = error_in_plain_json(self._api, self.held)
            if error is not None:
                self._held, self._blocks = [error], None
                return self._judge(error.rstrip())
        if pending and not pending.startswith(b":"):
            verdict = self._judge(pending.rstrip(b"\r\n"))
            if verdict is not WAIT:
                # Half an event is not readable, and is not passed on as if it were whole.
                return Verdict.EMPTY if verdict is Verdict.UNJUDGED else verdict
        return self._ended()

    def _judge(self, block: bytes) -> Verdict:
        event = decode_event(block)
        signs = read_event(self._api, event)
        if signs & FAILS:
            self.error = event.payload
            return FAULTS[fault_of(event.payload)]
        if signs & PROVES:
            return PROVEN
        if signs & UNKNOWN:
            return Verdict.UNJUDGED
        self._seen |= signs
        if signs & ENDS or self._seen & ABORTS:
            return self._ended()
        return WAIT

    def _ended(self) -> Verdict:
        if self._seen & ABORTS:
            return Verdict.ABORTED
        return Verdict.NO_TOKENS if self._seen & FINISHES else Verdict.EMPTY
