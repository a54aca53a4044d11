"""The interface of policies.

A policy chooses one of the servers that may take a request. It knows nothing of health checks,
retries or HTTP, has no clock, and decides synchronously, so that the lease is taken in the same
step: that spreads a burst. `now` is the event loop's clock, in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, TypeAlias

import msgspec

from vllm_router.fleet.server import Server

if TYPE_CHECKING:
    from vllm_router.config.schema import Settings
    from vllm_router.fleet.server import Lease
    from vllm_router.routing.prompt.blocks import Prompt
    from vllm_router.routing.prompt.routing_info import RoutingInfo
    from vllm_router.routing.server_estimate import PrefixStatistics
    from vllm_router.steps import Steps

Choice: TypeAlias = tuple[Server, object]
"""The chosen server, and a note that the policy gets back in `leased`. A plain tuple: a pick takes
3 µs, and a class costs a tenth of that."""


class PolicySettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of policies, see docs/routing.md.

    tokens_per_request: uncached prompt tokens that weigh as much as one request.
    waste_growth: how much more a token that another server has cached weighs per request on the
        server that would recompute it.
    prompt_growth: how much more a token that no server has cached weighs per request on the server.
    adapter_swap_tokens: prompt tokens that loading a LoRA adapter is assumed to cost at first.
    working_set_window: seconds for which a conversation counts as one that will come back; 0 to
        ignore working sets.
    prefix_memory_mb: memory of the prefix index in MB of 10^6 bytes, shared equally by the servers.
    prefix_expiry: seconds after which an unused entry of the index is dropped.
    """

    tokens_per_request: float = 1000.0
    waste_growth: float = 0.5
    prompt_growth: float = 0.0
    adapter_swap_tokens: float = 5000.0
    working_set_window: float = 300.0
    prefix_memory_mb: float = 64.0
    prefix_expiry: float = 1800.0

    @classmethod
    def of(cls, settings: Settings) -> PolicySettings:
        """The policy settings of a configuration; the keys have the same names."""
        return cls(**{name: getattr(settings, name) for name in cls.__struct_fields__})


class Explained(NamedTuple):
    """One candidate in an explanation: the lowest score wins; `parts` are its terms by name.

    The terms belong to the moment of the explanation, but may be computed when they are read.
    """

    server: Server
    score: float
    parts: Mapping[str, float]


class Placements(Protocol):
    """Notified of the prompts that a policy places, to tell other processes."""

    def placed(self, server: Server, prompt: Prompt, known: int, now: float) -> None:
        """A prompt with blocks was sent to a server, which had its first `known` blocks."""

    def withdrawn(self, server: Server, prompt: Prompt, known: int) -> None:
        """The server has refused it, and computed nothing beyond the first `known` blocks."""


class Policy:
    """Chooses among candidates. Only `pick` must be written; the hooks are for stateful policies.

    name: in the configuration.
    needs_prompt, needs_session: whether the policy reads these of a request; they are computed
        only for policies that need them.
    placements: where a policy with a prefix index announces its prompts; None if no other process
        needs to know.
    """

    name: ClassVar[str] = ""
    needs_prompt: ClassVar[bool] = False
    needs_session: ClassVar[bool] = False

    def __init__(
        self,
        rng: Random,
        settings: PolicySettings = PolicySettings(),  # noqa: B008 (frozen)
    ) -> None:
        self.rng = rng
        self.settings = settings
        self.placements: Placements | None = None

    def pick(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Choice:
        """Choose one of at least one candidates. O(len(candidates)).

        Compare servers by `server.load_estimate.effective`, which includes slow start and fast
        errors; a policy that does not compare calls `accepts`.
        """
        raise NotImplementedError

    def skips_full(self, candidates: Sequence[Server]) -> bool:
        """Whether `pick` passes over servers at their cap itself.

        It is called with all candidates then, as long as one is below its cap: policies recognise
        unchanged candidates by the identity of the tuple.
        """
        return False

    def accepts(self, server: Server) -> bool:
        """Whether to take a server found without comparing.

        A server in slow start is taken with the probability of its slow start factor.
        """
        return (
            server.load_estimate.slow_start_factor >= 1.0
            or self.rng.random() < server.load_estimate.slow_start_factor
        )

    def leased(self, lease: Lease, note: object, info: RoutingInfo, now: float) -> None:
        """A server was leased for a request, in the same step as `pick`.

        `note` is the second part of the Choice; None if there was a single candidate and `pick`
        was not called.
        """

    def first_byte(self, lease: Lease) -> None:
        """The first data of a stream has come. Not called for plain responses."""

    def learned(self, lease: Lease, prompt_tokens: int, cached_tokens: int | None) -> None:
        """The response's `usage` was read; `cached_tokens` is None if it was not reported."""

    def ended(self, lease: Lease, now: float, *, failed: bool, refused: bool = False) -> None:
        """The attempt has ended.

        `failed` if that is the server's fault; `refused` if it ended without any output for any
        reason, so that the server has computed nothing.
        """

    def forget(self, server: Server) -> None:
        """The server has left the fleet."""

    # -- other processes before the same servers ----------------------------------------------

    hears_routers = False

    def hear_routers(self, hears: bool) -> None:
        """Other routers tell where they have sent prompts, or no longer do."""
        self.hears_routers = hears

    def placed_elsewhere(self, server: Server, hashes: Sequence[int], now: float) -> None:
        """Another process has sent a prompt with these blocks to the server."""

    def withdrawn_elsewhere(self, server: Server, hashes: Sequence[int]) -> None:
        """The server has refused a prompt of another process, and has not computed these blocks."""

    def blocks(self, most: int) -> Iterator[tuple[Server, Sequence[int]]]:
        """All blocks in the prefix index for `placed_elsewhere` of another process.

        At most `most` at a time.
        """
        return iter(())

    def queued_tokens(self) -> Mapping[Server, float]:
        """Uncached prompt tokens of this process that wait for a first token, where there are any.

        Without the tokens of other processes.
        """
        return {}

    def queued_elsewhere(self, server: Server, tokens: float) -> None:
        """Uncached prompt tokens of other processes that wait on this server now."""

    def adapter_requests(self) -> Mapping[Server, Mapping[str, int]]:
        """Running requests of this process by LoRA adapter, where there are any."""
        return {}

    def adapters_elsewhere(self, server: Server, requests: Mapping[str, int]) -> None:
        """Running requests of other processes by LoRA adapter on this server now."""

    # -- for operators ------------------------------------------------------------------------

    def statistics(self, server: Server) -> PrefixStatistics | None:
        """Estimates of the server's prefix cache, for comparison with its own counters.

        None if no request was sent there, or if the policy does not look at prompts.
        """
        return None

    def formula(self) -> str:
        """The score as a formula of its parts; empty for policies without scores."""
        return ""

    def prepare(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Steps[None]:
        """Compute in slices what the first explanation of a model would compute at once."""
        yield from ()

    def explain(
        self, candidates: Sequence[Server], info: RoutingInfo, now: float
    ) -> list[Explained] | None:
        """The candidates with their scores, the best first, without side effects.

        None for policies without scores.
        """
        return None

    def explain_in_steps(
        self, candidates: Sequence[Server], info: RoutingInfo, now: float
    ) -> Steps[list[Explained] | None]:
        """The same in slices. The first one reads all that may change meanwhile."""
        yield from ()
        return self.explain(candidates, info, now)
