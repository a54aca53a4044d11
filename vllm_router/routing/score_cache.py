"""Scores of the candidates for one model, recomputed only for servers that have changed.

A request changes the load of one or two servers. Servers note changes in the fleet's change log,
and a ScoreCache reads what is new in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_router.routing.hashing import draw
from vllm_router.routing.server_estimate import ServerEstimate
from vllm_router.routing.working_sets import overflow

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.policies.base import PolicySettings

MAX_AFFINITIES = 4096
"""Keys whose affinity server is remembered."""

QUEUED_WEIGHT = 2.0
"""Weight of a queued prompt token: it delays the new request, and every generation on the server
by longer engine steps."""

HOT_SHARE, HOT_MARGIN, HOT_REQUESTS = 1.5, 0.25, 2.0
"""Cached blocks of a server do not count while its load exceeds HOT_SHARE times the candidates'
mean plus HOT_MARGIN of its capacity, unless it has at most HOT_REQUESTS requests."""

MAX_WASTE_LOAD = 32.0
"""Requests up to which a token to recompute weighs more. Without the limit, some thousand cached
tokens would hold traffic on a full server: a batch of 200 is not seven times as slow as one of 30.
"""

KV_ROOM = 0.85
KV_PENALTY = 20.0
"""Requests added to a server's load when its KV cache is full; the penalty begins at KV_ROOM. The
uncached tokens of the prompt count, too: beyond its room the engine preempts running requests."""

DELAYED = 0.5
"""A request that comes while a long prompt is computed waits for half of it on average."""

AFFINITY_BONUS = 2.0
"""Requests subtracted from the affinity server's load for a new conversation."""


class ScoreCache:
    """The parts of the candidates' scores; every list has one item per candidate, in order.

    candidates: the tuple that the fleet returned; compared by identity.
    estimates: of the candidates.
    slow, factors: slowness, and slowness divided by the effective capacity.
    bases: scores without tokens to recompute.
    credited: bits of the servers whose cached blocks count.
    has_peers: whether other routers use the same servers.
    peer_ratio: estimated requests of other routers since the scrape, per request of ours.
    is_adapter: whether the model is a LoRA adapter on any of the servers.
    least_room: a prompt with at most so many tokens presses no server's KV cache.
    """

    __slots__ = (
        "_affinities",
        "_arrivals",
        "_crowdings",
        "_footprints",
        "_growth",
        "_growths",
        "_loads",
        "_log",
        "_overflows",
        "_per_queued",
        "_per_request",
        "_position_of_bit",
        "_positions",
        "_prompt_growth",
        "_prompt_growths",
        "_read",
        "_rooms",
        "bases",
        "candidates",
        "credited",
        "estimates",
        "everyone",
        "factors",
        "fresh_until",
        "has_peers",
        "is_adapter",
        "kv_tokens",
        "least_room",
        "mean_footprint",
        "peer_ratio",
        "slow",
    )  # fmt: skip

    def __init__(
        self,
        candidates: Sequence[Server],
        estimates: list[ServerEstimate],
        settings: PolicySettings,
    ) -> None:
        self.candidates = candidates
        self.estimates = estimates
        self.bases = [0.0] * len(estimates)
        self.factors: list[float] = []
        self.slow: list[float] = []
        self.credited = 0
        self.everyone = sum(estimate.bit for estimate in estimates)
        self.fresh_until = -math.inf
        self.peer_ratio = 0.0
        self.has_peers = False
        self._affinities: dict[int, ServerEstimate] = {}
        self._per_request = 1.0 / settings.tokens_per_request
        self._per_queued = QUEUED_WEIGHT * self._per_request
        self._growth = settings.waste_growth
        self._growths = [0.0] * len(estimates)
        """Increase of the scores per token to recompute."""
        self._loads = [0.0] * len(estimates)
        self._prompt_growth = settings.prompt_growth
        self._prompt_growths = [0.0] * len(estimates)
        self._overflows = [0.0] * len(estimates)
        self._arrivals = [0.0] * len(estimates)
        self._footprints = [0.0] * len(estimates)
        self._crowdings = [0.0] * len(estimates)
        self._rooms = [math.inf] * len(estimates)
        self.least_room = math.inf
        self.kv_tokens = [math.inf] * len(estimates)
        """KV cache sizes of the servers as conversations find them; set before `measure_all`."""
        self.mean_footprint = 0.0
        self.is_adapter = False
        self._positions = {server: position for position, server in enumerate(candidates)}
        self._position_of_bit = {
            estimate.bit: position for position, estimate in enumerate(estimates)
        }
        self._log = candidates[0].change_log.servers
        self._read = 0

    def follow(self) -> None:
        """Update the scores of servers that have changed; the first step of a pick."""
        change_log = self.candidates[0].change_log.servers
        if change_log is not self._log:
            self.measure_all()
            return
        read = self._read
        if read != len(change_log):
            self._read = len(change_log)
            positions = self._positions
            for server in set(change_log[read:]):
                position = positions.get(server)
                if position is not None:
                    self._measure(position)

    def measure_all(self) -> None:
        """Update all scores: the change log was restarted, or `factors` are new."""
        self._log = self.candidates[0].change_log.servers
        self._read = len(self._log)
        self._measure_rooms()
        for position in range(len(self.estimates)):
            self._measure(position)
            self._measure_working_set(position)

    def _measure(self, position: int) -> None:
        estimate, factor = self.estimates[position], self.factors[position]
        server_load = estimate.server.load_estimate
        load = server_load.active + estimate.extra
        waste_load = min(load, MAX_WASTE_LOAD)
        base = 1.0 + load + estimate.queued * self._per_queued + self._crowdings[position]
        self.bases[position] = factor * base
        per_token = factor * self._per_request
        self._growths[position] = per_token * (1.0 + self._growth * waste_load)
        self._loads[position] = server_load.value
        if self._prompt_growth:
            self._prompt_growths[position] = per_token * self._prompt_growth * load
        if estimate.footprint != self._footprints[position]:
            self._measure_working_set(position)

    def _measure_working_set(self, position: int) -> None:
        """Update what a new conversation costs there; only prompts change it."""
        estimate = self.estimates[position]
        self._footprints[position] = estimate.footprint
        per_token = self.factors[position] * self._per_request
        tokens = (estimate.footprint + self.mean_footprint) * (1.0 + 2.0 * self.peer_ratio)
        self._overflows[position] = per_token * overflow(tokens, self.kv_tokens[position])
        self._arrivals[position] = per_token * estimate.arrivals

    def _measure_rooms(self) -> None:
        """Update what the scrapes say of the KV caches; our requests do not change it."""
        self.least_room = math.inf
        for position, estimate in enumerate(self.estimates):
            load = estimate.server.load_estimate
            usage = load.metrics.kv_usage if load.metrics is not None and load.fresh else None
            room = math.inf
            if usage is not None:
                room = max(0.0, KV_ROOM - usage) * self.kv_tokens[position]
            self._rooms[position] = room
            self._crowdings[position] = (
                KV_PENALTY * max(0.0, (usage or 0.0) - KV_ROOM) / (1.0 - KV_ROOM)
            )
            self.least_room = min(self.least_room, room)

    def scores(self, levels: list[tuple[float, int]], bonus: int) -> list[float]:
        """The candidates' scores for a prompt.

        `levels` are pairs (cached tokens, bits of the servers that have them), the most first;
        `bonus` is the bit of a new conversation's affinity server, or 0.
        """
        bases, growths, position_of = self.bases, self._growths, self._position_of_bit
        scores = bases
        if levels:
            best = levels[0][0]
            usual, rest = 0.0, levels
            tokens, holders = levels[-1]
            if 2 * holders.bit_count() > len(bases):
                usual, rest = tokens, levels[:-1]
                others = self.everyone
                for _, bits in levels:
                    others &= ~bits
                if others:
                    rest.append((0.0, others))
            # Score all candidates as the majority, then correct the others one by one.
            recompute = best - usual
            if recompute:
                scores = [b + recompute * g for b, g in zip(bases, growths, strict=True)]
            else:
                scores = bases.copy()
            for tokens, bits in reversed(rest):  # the most last, as a server may be in two levels
                recompute = best - tokens
                while bits:
                    bit = bits & -bits
                    bits ^= bit
                    position = position_of[bit]
                    scores[position] = bases[position] + recompute * growths[position]
        if bonus:
            scores = scores.copy()
            position = position_of[bonus]
            scores[position] -= self.factors[position] * AFFINITY_BONUS
        return scores

    def with_prompt(
        self, scores: list[float], uncached: float, turns: float, delay: float
    ) -> list[float]:
        """The scores with the terms for a prompt that no server has cached to a part.

        `uncached`: its tokens that no server has. `turns`: how often a new conversation will
        probably come back; 0 for a known one. `delay`: seconds in which they are computed.
        """
        if self._prompt_growth:
            growths = self._prompt_growths
            scores = [s + uncached * g for s, g in zip(scores, growths, strict=True)]
        if turns:
            lost, late = turns * uncached, DELAYED * uncached * delay
            scores = [
                s + lost * o + late * r
                for s, o, r in zip(scores, self._overflows, self._arrivals, strict=True)
            ]
        return scores

    def with_pressure(
        self, scores: list[float], tokens: float, levels: list[tuple[float, int]]
    ) -> list[float]:
        """The scores with a penalty where the uncached tokens of the prompt exceed the room."""
        found = scores.copy()
        for position, room in enumerate(self._rooms):
            if tokens > room:
                found[position] += self.factors[position] * self._excess(position, tokens, levels)
        return found

    def _excess(self, position: int, tokens: float, levels: list[tuple[float, int]]) -> float:
        """The penalty for the uncached tokens beyond the room of a server, in requests."""
        bit = self.estimates[position].bit
        cached = next((cached for cached, bits in levels if bits & bit), 0.0)
        over = max(0.0, tokens - cached - self._rooms[position])
        return over * KV_PENALTY / ((1.0 - KV_ROOM) * self.kv_tokens[position])

    # -- for explanations -------------------------------------------------------------------------

    def pressure(self, position: int, tokens: float, levels: list[tuple[float, int]]) -> float:
        """The whole penalty for a full KV cache, in requests."""
        if self._rooms[position] == math.inf:
            return 0.0
        return self._crowdings[position] + self._excess(position, tokens, levels)

    def prompt_terms(
        self, position: int, uncached: float, turns: float, delay: float
    ) -> dict[str, float]:
        """The terms of `with_prompt` in tokens."""
        per_token = self.factors[position] * self._per_request
        lost = turns * uncached * self._overflows[position] / per_token
        late = DELAYED * uncached * delay * self._arrivals[position] / per_token
        return {"lost_tokens": lost, "delayed_tokens": late if turns else 0.0}

    def not_overloaded(self, levels: list[tuple[float, int]]) -> list[tuple[float, int]]:
        """Drop servers with much more load than the mean, so that a hot prefix spreads."""
        loads = self._loads
        limit = HOT_SHARE * sum(loads) / len(loads) + HOT_MARGIN
        if max(loads) <= limit:
            return levels
        out = 0
        for estimate, load in zip(self.estimates, loads, strict=True):
            if load > limit and load * estimate.server.weighted_capacity > HOT_REQUESTS:
                out |= estimate.bit
        return [(tokens, holders & ~out) for tokens, holders in levels if holders & ~out]

    def affinity_of(self, key: int) -> ServerEstimate:
        """The key's server by weighted rendezvous hashing. Cached: it costs 0.6 µs per server."""
        affinity = self._affinities.get(key)
        if affinity is None:
            if len(self._affinities) >= MAX_AFFINITIES:
                self._affinities.clear()
            affinity = self._affinities[key] = min(
                self.estimates,
                key=lambda estimate: (
                    -math.log(draw(key, estimate.seed)) / estimate.server.weighted_capacity
                ),
            )
        return affinity
