"""The state of the shared store and of the other routers, for display. Pure."""

from __future__ import annotations

import msgspec

from vllm_router.routing.sharing.messages import About
from vllm_router.routing.sharing.peers import RouterView


class SharedStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The state of `[shared]`.

    store: its address, without user and password.
    own: this router, as the others show it.
    up: whether this router and the others hear of each other.
    problem: why not; empty while all is well.
    age: seconds since the store has answered; None if it never has.
    routers: the other routers; silent ones are kept for a minute.
    in_flight: requests of the other routers, by the URL of the server.
    count: routers of the fleet, this one included; the last known number while not `up`.
    failures: turns that failed.
    dropped: batches that could not be read.
    unsent: placements that were dropped because too many waited.
    spared: servers whose figures other routers scrape for this one.
    """

    store: str
    fleet: str
    own: About
    up: bool
    problem: str
    age: float | None
    routers: list[RouterView]
    in_flight: dict[str, int]
    count: int
    failures: int
    dropped: int
    unsent: int
    spared: int

    @property
    def configurations(self) -> set[str]:
        """The digests of the configurations of all routers that are heard now."""
        return {self.own.configuration} | {
            view.about.configuration for view in self.routers if view.live
        }
