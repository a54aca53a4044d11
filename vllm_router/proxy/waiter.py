"""Requests that wait for a server, and the interface to the queues of other processes.

`Peers` is implemented by `runtime/workers/queue_peers.py`; a router of one process has none.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from vllm_router.errors import Refused
from vllm_router.fleet.server import Lease, Server
from vllm_router.routing.policies import Policy
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.routing.queue.entry import OfferResult, QueueEntry, Route


class Ticket(Protocol):
    """A request that wants to be admitted.

    `deadline` is when the whole request must have ended, on trio's clock; `returning` says that
    it was admitted before and comes back after a failed attempt. `public_model` is the model that
    the client asked for if others may stand in for it, else None.
    """

    @property
    def policy(self) -> Policy: ...

    @property
    def info(self) -> RoutingInfo: ...

    @property
    def priority(self) -> int:
        """Lower is earlier."""

    @property
    def key(self) -> str:
        """The name of the client's API key, or an empty text."""

    @property
    def public_model(self) -> str | None: ...

    @property
    def deadline(self) -> float: ...

    @property
    def returning(self) -> bool: ...

    def candidates(self, now: float) -> Sequence[Server]:
        """The servers to choose from; none if the request must wait for one to come up."""

    def route(self, serving: Callable[[str | None], frozenset[Server]], now: float) -> Route:
        """Everything about the request that `candidates` depends on."""

    def rejection(self, now: float) -> Refused | None:
        """Why the request must not be sent to any server, if so."""

    def no_server(self) -> Refused:
        """The refusal if there is no candidate."""

    def waited(self, seconds: float) -> None:
        """Account for a wait."""


Grant = tuple[Policy, Lease]
"""A server that was leased, and the policy that chose it."""


@dataclass(slots=True, eq=False, kw_only=True)
class Waiter(QueueEntry):
    """A request that waits. It is woken with a grant, or with an error.

    `refused` is the error to raise: a Refused, or the exception of a policy.
    """

    ticket: Ticket
    woken: trio.Event = field(default_factory=trio.Event)
    grant: Grant | None = None
    refused: Exception | None = None

    def take_refusal(self) -> Exception:
        """The error to raise; there must be one.

        The frame that raises it must not hold it in any other way: a cycle of error, traceback and
        frame would keep the request and its body until the garbage collector runs.
        """
        refused, self.refused = self.refused, None
        assert refused is not None
        return refused


class Peers(Protocol):
    """The queues of the router's other processes.

    Their entries are in the same `WaitingQueue` as this process's own; `read_entries` updates them.
    """

    @property
    def number(self) -> int:
        """The number of this process, the owner of its entries."""

    @property
    def promised(self) -> Mapping[Server, int]:
        """Free slots of servers that are reserved for requests of other processes.

        Valid during a pass.
        """

    def key(self, name: str) -> Hashable:
        """The value that identifies an API key in all processes."""

    def read_entries(self, now: float) -> None:
        """Take over the published entries of the other processes."""

    def model_and_route(self, entry: QueueEntry) -> tuple[str | None, Route]:
        """The model and route of another process's entry, as this process sees them."""

    def is_full(self) -> bool:
        """Whether this process can publish no further entry."""

    def publish(self, waiter: Waiter, displaced: QueueEntry | None) -> None:
        """Publish an entry of this process, and the entry that it displaces."""

    def moved(self, waiter: Waiter) -> None:
        """An entry of this process has another model or route now."""

    def displaced(self, entry: QueueEntry) -> None:
        """An entry of another process is displaced; that process refuses the request."""

    def withdraw(self, waiter: Waiter) -> None:
        """An entry of this process is gone, published or not."""

    def begin(self, now: float) -> None:
        """A pass over all entries begins."""

    def reserve(self, entry: QueueEntry, now: float) -> OfferResult:
        """Reserve a server for an entry of another process: HELD, or BLOCKED without one."""

    def passed_over(self, waiter: Waiter, now: float) -> None:
        """It was the turn of an entry of this process, but no server was free."""

    def end(self, now: float) -> None:
        """The pass is over: wake the processes for which servers are reserved."""

    def freed(self, server: Server, now: float) -> None:
        """A lease on a server has been released in this process."""

    def changed(self, now: float) -> None:
        """The candidates may have changed, and no entry has been considered since."""
