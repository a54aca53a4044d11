"""How one of several candidates is chosen.

A policy gets the servers that may be asked and returns one of them. It knows nothing of health,
retries or HTTP, keeps no clock, and decides without waiting, so that the lease can be taken in
the same step: that is what spreads a burst. To add one, write a class here; its `name` makes it
known to the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.facts import Facts


class Policy(Protocol):
    """Chooses among candidates."""

    name: ClassVar[str] = ""

    def __init__(self, rng: Random) -> None: ...

    def pick(self, candidates: Sequence[Server], facts: Facts) -> Server:
        """One of `candidates`, of which there is at least one. O(len(candidates))."""
        ...


class LeastLoad(Policy):
    """The lowest `(running + 0.5 waiting) / capacity`, corrected by our own leases.

    The ancestor's rule, without its random choice among everything below 0.5: the lowest load
    wins, equals at random.
    """

    name = "least_load"

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def pick(self, candidates: Sequence[Server], facts: Facts) -> Server:
        lowest = float("inf")
        best: list[Server] = []
        for server in candidates:
            load = server.load
            if load < lowest:
                lowest = load
                best = [server]
            elif load == lowest:
                best.append(server)
        return best[0] if len(best) == 1 else self._rng.choice(best)


class RoundRobin(Policy):
    """Each in turn, whatever its load: a reference, not a recommendation."""

    name = "round_robin"

    def __init__(self, rng: Random) -> None:
        self._turn = 0

    def pick(self, candidates: Sequence[Server], facts: Facts) -> Server:
        self._turn += 1
        return candidates[self._turn % len(candidates)]


class RandomChoice(Policy):
    """Any of them: the other reference."""

    name = "random"

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def pick(self, candidates: Sequence[Server], facts: Facts) -> Server:
        return self._rng.choice(candidates)


_ALL: tuple[type[Policy], ...] = (LeastLoad, RoundRobin, RandomChoice)

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in _ALL}
POLICY_NAMES: tuple[str, ...] = tuple(POLICIES)
