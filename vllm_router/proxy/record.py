"""The record of one exchange: written once, read by metrics, feed and access log."""

from __future__ import annotations

import enum
from typing import Protocol

import msgspec

from vllm_router.fleet.server import Server
from vllm_router.http.asgi_types import Scope
from vllm_router.proxy.retry import Outcome
from vllm_router.routing.prompt.routing_info import RoutingInfo


class Phase(enum.Enum):
    """How far an exchange has come; clients that leave are counted by phase."""

    BODY = "body"  # its request is being read
    QUEUE = "queue"  # no server has been picked yet
    CONNECT = "connect"
    WAIT = "wait"  # sent, no byte of the answer passed on
    STREAM = "stream"
    DONE = "done"


QUEUE, WAIT, STREAM, DONE = Phase.QUEUE, Phase.WAIT, Phase.STREAM, Phase.DONE


class Record(msgspec.Struct, eq=False, gc=False):
    """Times are on trio's clock, in seconds; `status` is 0 until a response is chosen.

    `waited` is the time in the admission queue. Token counts are known if the response has them and
    a recorder uses them. `info` and `trace` are removed after the recorders have run: records are
    kept, prompts are not. `model` is the model that the client asked for, `served_model` the name
    sent to the server if that differs; `policy` is the name of the policy that chose the server.
    `owner` is the server with the stored response that the request needs, if it needs one.
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
    info: RoutingInfo | None = None
    trace: Trace | None = None
    served_model: str | None = None
    policy: str = ""
    owner: Server | None = None

    @property
    def first_byte(self) -> float | None:
        """Seconds from the start to the first data of the response; None without data."""
        return self.first_byte_at - self.started_at if self.first_byte_at else None


class Recorder(Protocol):
    """Receives the ends of attempts and exchanges. Called on the event loop: must be quick."""

    def attempt_ended(self, server: Server, outcome: Outcome) -> None: ...

    def exchange_ended(self, record: Record) -> None: ...


class Trace(Protocol):
    """The trace of one exchange. Called on the event loop.

    `replaced`: the fields of the request that are not forwarded.
    """

    replaced: frozenset[bytes]

    @property
    def trace_id(self) -> str: ...

    def attempt_started(self, server: Server, now: float) -> bytes:
        """Returns the `traceparent` for the server."""
        ...

    def attempt_ended(self, outcome: Outcome | None, now: float) -> None:
        """`outcome` is None if the exchange was cancelled."""
        ...

    def answered(self, status: int) -> None:
        """The head of the server's response has arrived."""
        ...

    def tail(self, tail: bytes) -> None:
        """The last bytes of a complete response."""
        ...


class Tracer(Protocol):
    """Starts traces, or continues the client's."""

    def begin(self, scope: Scope) -> Trace: ...
