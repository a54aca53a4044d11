"""What the exchanges of one proxy share."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from vllm_router.config.schema import ServerConfig, Settings
from vllm_router.errors import Refused
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.http.addresses import Network
from vllm_router.http.client.pool import Pool
from vllm_router.proxy.admission import AdmissionQueue
from vllm_router.proxy.batched_recorder import BatchedRecorder
from vllm_router.proxy.body import Bodies
from vllm_router.proxy.failures import Failures
from vllm_router.proxy.headers import RequestHeads
from vllm_router.proxy.key_limits import KeyLimits
from vllm_router.proxy.quarantine import Quarantine
from vllm_router.proxy.record import Record, Tracer
from vllm_router.proxy.retry import RetryBudget
from vllm_router.routing.owners import Owners
from vllm_router.routing.policy_set import PolicySet
from vllm_router.routing.prompt.known_bodies import KnownBodies
from vllm_router.routing.prompt.routing_info import EarlierBodies

OWNERS_SOUGHT = 16
"""Requests that may ask all servers for a stored response at the same time."""


@dataclass(slots=True)
class Upstream:
    """What requests to one server need: connections, and the constant parts of their heads.

    `name` is the server's name as a header value.
    """

    pool: Pool
    heads: RequestHeads
    name: bytes
    tls: ssl.SSLContext | None
    config: ServerConfig


class RunningExchange(Protocol):
    """An exchange as seen from outside."""

    record: Record

    def interrupt(self, reason: str) -> bool: ...


@dataclass(slots=True, eq=False)
class ProxyContext:
    """The state that exchanges share. Exchanges read it; `Proxy` assigns the fields.

    `now` is `trio.current_time` without its two indirections.
    `settings` to `admission` follow the configuration, and change while exchanges run.
    `per_request_rules`: `[models]` or `policy_header` is set, so that a request may need another
    model name in its body, or another policy. `admission` is None without `[limits]`.
    `body_turns` makes long bodies that are read in slices take turns.
    `known_bodies` reads long bodies that repeat earlier ones.
    `owners` says which server has which stored response; `looking_for_owners` bounds the requests
    that ask all servers for one.
    `refresh_models` reads the servers' model lists again. It returns when that is done or the
    condition it was given holds. None where no task reads lists.
    `wants_prompt`: a recorder uses the prompts of records.
    """

    fleet: Fleet
    policies: PolicySet
    settings: Settings
    recorder: BatchedRecorder
    now: Callable[[], float]
    jitter: Callable[[], float]
    max_body: int = 0
    trusted: tuple[Network, ...] = ()
    per_request_rules: bool = False
    upstreams: dict[Server, Upstream] = field(default_factory=dict)
    admission: AdmissionQueue | None = None
    budget: RetryBudget = field(default_factory=RetryBudget)
    quarantine: Quarantine = field(default_factory=Quarantine)
    failures: Failures = field(default_factory=Failures)
    key_limits: KeyLimits = field(default_factory=KeyLimits)
    bodies: Bodies = field(default_factory=Bodies)
    body_turns: trio.Lock = field(default_factory=trio.Lock)
    known_bodies: EarlierBodies = field(default_factory=KnownBodies)
    owners: Owners = field(default_factory=Owners)
    looking_for_owners: trio.CapacityLimiter = field(
        default_factory=lambda: trio.CapacityLimiter(OWNERS_SOUGHT)
    )
    exchanges: set[RunningExchange] = field(default_factory=set)
    tracer: Tracer | None = None
    refresh_models: Callable[[Callable[[], bool]], Awaitable[None]] | None = None
    wants_prompt: bool = False
    stopping: bool = False


def router_stopping() -> Refused:
    """The refusal of requests that arrive, or still wait, while the router shuts down."""
    return Refused(503, "router_stopping", "The router is shutting down.", retry_after=1)
