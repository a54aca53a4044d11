"""Requests that wait for a server, and the interface to the queues of other processes.

`Peers` is implemented by `workers/`; a router of one process has none.
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
from vllm_router.routing.queue.entry import QueueEntry, Route, Verdict


class Ticket(Protocol):
    """A request that wants to be admitted.

    `deadline` is when the whole request must have ended, on trio's clock; `returning` says that
    it was admitted before and comes back after a failed attempt. `public_model` is the model that
    the client asked for if others may stand in for it, else None.
    """

    @property
    def policy(self) -> Policy: ...

    @property
    def facts(self) -> RoutingInfo: ...

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
    """A request that waits. It is woken with a grant, or with a refusal."""

    ticket: Ticket
    woken: trio.Event = field(default_factory=trio.Event)
    grant: Grant | None = None
    refused: Refused | None = None


class Peers(Protocol):
    """The requests that wait in the other processes of this router.

    Their places stand in the gate's own `WaitingQueue` beside ours; `look` brings them up to date.
    """

    @property
    def number(self) -> int:
        """Of this process: the owner of our places."""

    @property
    def promised(self) -> Mapping[Server, int]:
        """Units of servers that are free, but for requests of other processes; known during a
        pass."""

    def key(self, name: str) -> Hashable:
        """What stands for the name of an API key in all processes."""

    def look(self, now: float) -> None:
        """Take over what the others have published."""

    def where(self, place: QueueEntry) -> tuple[str | None, Route]:
        """The room and the route of another process's place, by what this process knows."""

    def is_full(self) -> bool:
        """Whether no further place of ours can be published."""

    def publish(self, waiter: Waiter, displaced: QueueEntry | None) -> None:
        """Show the others a place of ours, and which place it has taken."""

    def moved(self, waiter: Waiter) -> None:
        """A place of ours that may have been published has got another room or route."""

    def displaced(self, place: QueueEntry) -> None:
        """A place of another process has been taken; that process tells the client."""

    def withdraw(self, waiter: Waiter) -> None:
        """A place of ours is gone; published or not."""

    def begin(self, now: float) -> None:
        """A pass over all places begins."""

    def give(self, place: QueueEntry, now: float) -> Verdict:
        """Leave a server to a place of another process: HELD, or BLOCKED if none is for it."""

    def passed_over(self, waiter: Waiter, now: float) -> None:
        """It was the turn of a place of ours, and no server was for it."""

    def end(self, now: float) -> None:
        """The pass is over: wake the processes that have a server to take."""

    def freed(self, server: Server, now: float) -> None:
        """A lease of ours on a server has been released."""

    def changed(self, now: float) -> None:
        """Which servers may be asked may have changed: no place has been considered since."""
