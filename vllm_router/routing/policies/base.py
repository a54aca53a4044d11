"""What a policy is.

A policy gets the servers that may be asked and returns one of them. It knows nothing of health
checks, retries or HTTP, keeps no clock, and decides without waiting, so that the lease can be
taken in the same step: that is what spreads a burst. `now` is the loop's clock, in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import msgspec

if TYPE_CHECKING:
    from vllm_router.config.schema import Settings
    from vllm_router.fleet.server import Lease, Server
    from vllm_router.routing.accounts import PrefixStatistics
    from vllm_router.routing.prompt.facts import Facts


class Knobs(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator may set about policies; docs/routing.md says what it does.

    tokens_per_request: so many prompt tokens to be computed weigh as much as one request.
    waste_growth: by how much of itself recomputing what another server has cached weighs more
        with each request on the server.
    prefix_memory_mb: memory for the record of who has cached what, in MB of 10^6 bytes, shared
        equally between the servers.
    prefix_expiry: seconds after which an unused entry of it is forgotten.
    """

    tokens_per_request: float = 1000.0
    waste_growth: float = 0.5
    prefix_memory_mb: float = 64.0
    prefix_expiry: float = 1800.0

    @classmethod
    def of(cls, settings: Settings) -> Knobs:
        """Those of a configuration; the keys have the same names."""
        return cls(**{name: getattr(settings, name) for name in cls.__struct_fields__})


class Explained(NamedTuple):
    """One candidate as a policy sees it: the lowest score wins; `parts` is what it is made of."""

    server: Server
    score: float
    parts: dict[str, float]


class Policy:
    """Chooses among candidates. Only `pick` must be written; the rest is for those who remember.

    `needs_prompt` and `needs_session` tell which facts it reads: they are not computed for others.
    """

    name: ClassVar[str] = ""
    needs_prompt: ClassVar[bool] = False
    needs_session: ClassVar[bool] = False

    def __init__(self, rng: Random, knobs: Knobs = Knobs()) -> None:  # noqa: B008 (frozen)
        self.rng = rng
        self.knobs = knobs

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        """One of `candidates`, of which there is at least one. O(len(candidates)).

        To be compared: `server.burden`, in which slow start and fast errors are. A policy that
        compares nothing asks `takes`.
        """
        raise NotImplementedError

    def takes(self, server: Server) -> bool:
        """Whether a server that the policy has come upon is to be taken: in slow start only as
        often as it may have a part of its share."""
        return server.ramp >= 1.0 or self.rng.random() < server.ramp

    def leased(self, lease: Lease, facts: Facts, now: float) -> None:
        """The server just picked for these facts was leased; called in the same step."""

    def first_byte(self, lease: Lease) -> None:
        """The first data of a streamed answer has come. Plain answers do not show it."""

    def learned(self, lease: Lease, prompt_tokens: int, cached_tokens: int | None) -> None:
        """What the answer's `usage` said; None for cached tokens if it did not say."""

    def ended(self, lease: Lease, now: float, *, failed: bool, refused: bool = False) -> None:
        """The attempt is over; `failed` if that is the server's fault. `refused` if the server has
        ended it without any output, whatever the reason: it has computed nothing.
        """

    def forget(self, server: Server) -> None:
        """The server has left the fleet."""

    def statistics(self, server: Server) -> PrefixStatistics | None:
        """What was expected of a server's prefix cache, whose own counters say what came true.

        None if nothing was sent there, or if the policy does not look at prompts.
        """
        return None

    def formula(self) -> str:
        """What the score is, in the words of its parts; empty if it is by no score."""
        return ""

    def explain(
        self, candidates: Sequence[Server], facts: Facts, now: float
    ) -> list[Explained] | None:
        """How it sees the candidates, the best first, changing nothing; None if by no score."""
        return None
