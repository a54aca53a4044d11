"""The messages between the processes of one router, encoded as MessagePack.

Times are on the clock that all processes share (`clock.py`). URLs identify servers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import msgspec

from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.reason import Reason
from vllm_router.fleet.refusals import Refusal, RequestKind
from vllm_router.routing.owners import Entry
from vllm_router.routing.server_estimate import PrefixStatistics
from vllm_router.routing.sharing.messages import Batch

# -- worker to leader -------------------------------------------------------------------------


Addresses = dict[str, list[tuple[int, str, int, int]]]
"""Resolved server names: a process may start while the resolver fails."""


class Hello(msgspec.Struct, tag=True, array_like=True):
    """A worker has started, or answers the `Welcome` of a new leader.

    `draining` are the servers that an operator drains, which a new leader learns from the workers.
    So are `addresses`, of the first hundred names.
    """

    pid: int
    draining: list[str]
    addresses: Addresses = {}


class Verdict(msgspec.Struct, array_like=True):
    """A call of a method of Fleet or Server that the leader repeats on its own server.

    `what` is answered, failed, refused, answered_elsewhere, accepted_elsewhere, refused_again,
    accepted, unlist, timed_out or request_starved. `name` is the refused feature or the model.
    """

    what: str
    url: str
    at: float
    trial: bool = False
    jitter: float = 1.0
    body: int | None = None
    retry_after: float | None = None
    odd: bool = False
    name: str = ""
    size: int = 0
    words: str = ""
    sure: bool = False
    asked: RequestKind | None = None
    since: float = 0.0


Ended = tuple[Any, ...]
"""A finished exchange, see `reporter.py`."""


class Report(msgspec.Struct, tag=True, array_like=True):
    """The events since the last report.

    `attempts` are pairs of URL and outcome; `stored` are the servers of stored responses.
    """

    verdicts: list[Verdict]
    attempts: list[tuple[str, str]]
    ended: list[Ended]
    refusals: list[str]
    stored: list[Entry] = []


class WorkerStats(msgspec.Struct, tag=True, array_like=True):
    """Gauges and counters of one worker, sent periodically; the leader sums them by name.

    `chunks` counts the chunks of running exchanges, `prefixes` the expected prefix cache hits, both
    by server. `heard` is the time of a server's last byte: a streaming server is alive, even if its
    health checks are slow. `outputs` is the time of its last response output.
    """

    serving: bool
    values: dict[str, float]
    chunks: dict[str, int]
    prefixes: dict[str, PrefixStatistics] = {}
    heard: dict[str, float] = {}
    outputs: dict[str, float] = {}


class Connection(msgspec.Struct, tag=True, array_like=True):
    """A connection that is not for inference; its descriptor is attached.

    `data` has been read from it already. `client` and `local` are its addresses if the descriptor
    is a relay of a TLS connection.
    """

    data: bytes
    client: tuple[str, int] | None = None
    local: tuple[str, int] | None = None
    alpn: str = ""


class RefreshModelLists(msgspec.Struct, tag=True, array_like=True):
    """Read the servers' model lists again, and answer with `ModelListsRefreshed`."""


class StoredResponses(msgspec.Struct, tag=True, array_like=True):
    """Servers of stored responses.

    The leader sends what it has received, a worker sends all that it knows to a new leader.
    """

    entries: list[Entry]


class PeerBatch(msgspec.Struct, tag=True, array_like=True):
    """A batch of another process: a worker sends its own, the leader passes it on.

    sibling: it is of a worker of this router, not of another router.
    age, past: see `Peers.hear`.
    """

    batch: Batch
    sibling: bool = True
    age: float = 0.0
    past: bool = False


class KeyShare(msgspec.Struct, tag=True, array_like=True):
    """The number of routers among which the limits of keys are divided, see `KeyLimits.routers`."""

    routers: int


FromWorker = (
    Hello | Report | WorkerStats | Connection | RefreshModelLists | StoredResponses | PeerBatch
)

# -- leader to worker -------------------------------------------------------------------------


class Welcome(msgspec.Struct, tag=True, array_like=True):
    """`first`: a new leader asks for a `Hello`.

    Otherwise the whole state has been sent, and the worker may serve.
    """

    first: bool


class Configured(msgspec.Struct, tag=True, array_like=True):
    """A new configuration is in force: read the snapshot."""

    generation: int


class ServerState(msgspec.Struct, array_like=True):
    """The leader's state of a server, as far as routing needs it.

    `lengths` is a number if all models have the same context length. `capacity` is what policies
    use, without the weight. The metrics count for `stale_after` seconds, as the leader scrapes
    some servers of a large fleet seldom.
    """

    url: str
    up: bool | None
    reason: Reason
    damped: bool
    ejected: bool
    ejected_until: float
    ejected_for: Reason
    backoff_until: float
    recovered_at: float
    went_down_at: float
    restarts: int
    metrics: EngineMetrics | None
    scraped_at: float | None
    leases_at_scrape: int
    models: tuple[str, ...] | None
    draining: bool
    lengths: dict[str, int] | int
    refusals: tuple[Refusal, ...]
    silent_since: float | None
    silent_until: float
    silent_for: Reason
    stuck: float
    paused_at: float | None
    capacity: float
    stale_after: float


class ServerStates(msgspec.Struct, tag=True, array_like=True):
    """The servers whose state has changed."""

    servers: list[ServerState]


class ResolvedNames(msgspec.Struct, tag=True, array_like=True):
    """Addresses that the leader has resolved."""

    addresses: Addresses


class ModelListsRefreshed(msgspec.Struct, tag=True, array_like=True):
    """The model lists have been read; the changes were sent before."""


FromLeader = (
    Welcome
    | Configured
    | ServerStates
    | ResolvedNames
    | ModelListsRefreshed
    | StoredResponses
    | PeerBatch
    | KeyShare
)

NAMES = 100
"""Names per message; with eight addresses each, a message takes 30 KB."""


def parts_of(addresses: Addresses) -> Iterator[Addresses]:
    """Split the addresses into parts that fit into a message."""
    names = list(addresses)
    for start in range(0, len(names), NAMES):
        yield {name: addresses[name] for name in names[start : start + NAMES]}


STORED_AT_ONCE = 500
"""Stored responses per message: about 100 bytes each."""


def stored_in_parts(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Split the entries into parts that fit into a message."""
    rest = iter(entries)
    while part := list(islice(rest, STORED_AT_ONCE)):
        yield part


encode = msgspec.msgpack.Encoder().encode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
decode_from_leader = msgspec.msgpack.Decoder(FromLeader).decode
