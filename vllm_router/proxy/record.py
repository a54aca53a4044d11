"""What is remembered of one exchange: written once, read by metrics, feed and access log."""

from __future__ import annotations

import enum
from typing import Protocol

import msgspec

from vllm_router.fleet.server import Server
from vllm_router.proxy.retry import Outcome
from vllm_router.routing.prompt.routing_info import RoutingInfo


class Phase(enum.Enum):
    """How far an exchange has come; a client that leaves is counted by it."""

    BODY = "body"  # its request is being read
    QUEUE = "queue"  # no server has been picked yet
    CONNECT = "connect"
    WAIT = "wait"  # sent, no byte of the answer passed on
    STREAM = "stream"
    DONE = "done"


QUEUE, WAIT, STREAM, DONE = Phase.QUEUE, Phase.WAIT, Phase.STREAM, Phase.DONE


class Record(msgspec.Struct, eq=False, gc=False):
    """Times are trio's clock, in seconds; `status` is 0 until an answer is chosen.

    `waited` is how long it stood in the waiting room.

    Tokens are known where the answer's end tells them and somebody wants them. `facts` and `trace`
    are there only until the recorders have been told: records are kept, prompts are not.
    `model` is what the client asked for, `served_model` what the server was, if that differs;
    `policy` is the one that picked.
    """

    started_at: float
    method: str
    path: bytes
    client: str
    request_id: bytes
    key_name: str = ""
    model: str | None = None
    stream: bool = False
    phase: Phase = Phase.BODY
    server: Server | None = None
    attempts: int = 0
    status: int = 0
    code: str = ""
    outcome: Outcome | None = None
    body_read_at: float = 0.0
    sent_at: float = 0.0
    first_byte_at: float = 0.0
    ended_at: float = 0.0
    waited: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    chunks: int = 0
    retries: list[Outcome] = []
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    facts: RoutingInfo | None = None
    trace: Trace | None = None
    served_model: str | None = None
    policy: str = ""

    @property
    def first_byte(self) -> float | None:
        """Seconds from the first to the answer's first data; None if there was none."""
        return self.first_byte_at - self.started_at if self.first_byte_at else None


class Recorder(Protocol):
    """Whoever wants to know how exchanges end. Called on the loop: must be quick."""

    def attempt_ended(self, server: Server, outcome: Outcome) -> None: ...

    def exchange_ended(self, record: Record) -> None: ...


class Trace(Protocol):
    """One exchange as distributed tracing sees it. Called on the loop.

    `replaced`: the fields of the request that are not forwarded.
    """

    replaced: frozenset[bytes]

    @property
    def trace_id(self) -> str: ...

    def attempt_started(self, server: Server, now: float) -> bytes:
        """The `traceparent` to be sent to the server."""
        ...

    def attempt_ended(self, outcome: Outcome | None, now: float) -> None:
        """None if the exchange was broken off from outside."""
        ...

    def answered(self, status: int) -> None:
        """The head of the server's answer has come."""
        ...

    def tail(self, tail: bytes) -> None:
        """The last bytes of a complete answer."""
        ...


class Tracer(Protocol):
    """Begins a trace, or goes on with the client's."""

    def begin(self, fields: dict[bytes, bytes]) -> Trace: ...
