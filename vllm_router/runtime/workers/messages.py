"""What the processes of one router tell each other, as MessagePack.

Times are those of trio's clock, which all of them share (`clock.py`). Servers are named by URL.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.refusals import Asked, Refusal
from vllm_router.routing.server_estimate import PrefixStatistics

# -- worker to leader -------------------------------------------------------------------------


Addresses = dict[str, list[tuple[int, str, int, int]]]
"""What one process knows of names of servers: another may be started while the resolver fails."""


class Hello(msgspec.Struct, tag=True, array_like=True):
    """A worker is there: new, or answering a new leader's `Welcome`.

    `draining` are the servers that an operator has taken out of the rotation, which a new leader
    learns from those who have served under the one before; so it does `addresses`, of the first
    hundred names.
    """

    pid: int
    draining: list[str]
    addresses: Addresses = {}


class Verdict(msgspec.Struct, array_like=True):
    """What an attempt showed of its server: the method of Fleet or Server that is told here, and
    its arguments. `what` is answered, failed, refused, not_its_fault, others_take, refused_again,
    takes_again, unlist, timed_out or waited_in_vain; `name` is what it refuses, or the model.
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
    asked: Asked | None = None
    since: float = 0.0


Ended = tuple[Any, ...]
"""A finished exchange, see `reporter.py`."""


class Report(msgspec.Struct, tag=True, array_like=True):
    """What has happened since the last report. `attempts` are pairs of URL and outcome."""

    verdicts: list[Verdict]
    attempts: list[tuple[str, str]]
    ended: list[Ended]
    refusals: list[str]


class WorkerStats(msgspec.Struct, tag=True, array_like=True):
    """How much of what there is now: gauges and totals to be added up, by name.

    `chunks` are those that running exchanges have had so far, and `prefixes` what the policies
    have expected of prefix caches, both by server; `heard` when
    servers last sent a byte: a server that streams is alive, however slow its checks. `outputs` is
    when they last sent something of an answer.
    """

    serving: bool
    values: dict[str, float]
    chunks: dict[str, int]
    prefixes: dict[str, PrefixStatistics] = {}
    heard: dict[str, float] = {}
    outputs: dict[str, float] = {}


class Connection(msgspec.Struct, tag=True, array_like=True):
    """A connection that is not for the lane; its descriptor comes along.

    `data` has been read from it already. `client` and `local` are its addresses if the descriptor
    is not that of the client's socket but of a relay, which has TLS behind it.
    """

    data: bytes
    client: tuple[str, int] | None = None
    local: tuple[str, int] | None = None
    alpn: str = ""


class RefreshModelLists(msgspec.Struct, tag=True, array_like=True):
    """Read the servers' lists of models again, and say `ModelListsRefreshed`."""


FromWorker = Hello | Report | WorkerStats | Connection | RefreshModelLists

# -- leader to worker -------------------------------------------------------------------------


class Welcome(msgspec.Struct, tag=True, array_like=True):
    """`first` asks for a `Hello`: there is a new leader. Else the worker has been told everything
    that there is to know, and may serve.
    """

    first: bool


class Configured(msgspec.Struct, tag=True, array_like=True):
    """Another configuration is in force: read it."""

    generation: int


class ServerState(msgspec.Struct, array_like=True):
    """What the leader knows of a server, and routing needs to know. `lengths` is a number where all
    models have the same."""

    url: str
    up: bool | None
    reason: str
    held_back: bool
    ejected: bool
    ejected_until: float
    ejected_for: str
    full_until: float
    back_at: float
    fell_at: float
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
    silent_for: str
    stuck: float
    paused_at: float | None


class ServerStates(msgspec.Struct, tag=True, array_like=True):
    """The servers whose state has changed."""

    servers: list[ServerState]


class ResolvedNames(msgspec.Struct, tag=True, array_like=True):
    """Addresses that the leader knows."""

    addresses: Addresses


class ModelListsRefreshed(msgspec.Struct, tag=True, array_like=True):
    """The lists have been read; what changed was told before."""


FromLeader = Welcome | Configured | ServerStates | ResolvedNames | ModelListsRefreshed

NAMES = 100
"""Names in one message; one with eight addresses each takes 30 KB."""


def parts_of(addresses: Addresses) -> Iterator[Addresses]:
    """So many names at a time as fit into a message."""
    names = list(addresses)
    for start in range(0, len(names), NAMES):
        yield {name: addresses[name] for name in names[start : start + NAMES]}


encode = msgspec.msgpack.Encoder().encode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
decode_from_leader = msgspec.msgpack.Decoder(FromLeader).decode
