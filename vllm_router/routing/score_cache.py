"""Scores of the candidates for one model, recomputed only for servers that have changed.

A request changes the load of one or two servers. Servers note changes in the fleet's change log,
and a ScoreCache reads what is new in it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from vllm_router.routing.adapters import WAIT_PENALTY, Levels
from vllm_router.routing.affinity_servers import AffinityServers
from vllm_router.routing.score_order import ScoreOrder
from vllm_router.routing.server_estimate import ServerEstimate
from vllm_router.routing.working_sets import overflow

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.policies.base import PolicySettings

QUEUED_WEIGHT = 2.0
"""Weight of a queued prompt token: it delays the new request, and every generation on the server
by longer engine steps."""

HOT_SHARE, HOT_MARGIN, HOT_REQUESTS = 1.5, 0.25, 2.0
"""Cached blocks of a server do not count while its load exceeds HOT_SHARE times the candidates'
mean plus HOT_MARGIN of its capacity, unless it has at most HOT_REQUESTS requests."""

MAX_WASTE_LOAD = 32.0
"""Requests up to which a token to recompute weighs more; beyond, up to the load that the server has
if all are equally loaded. Without the limit, some thousand cached tokens would hold traffic on a
full server; with 32 alone, all servers of a busy fleet would compute the prompts of all others."""

KV_ROOM = 0.85
KV_PENALTY = 20.0
"""Requests added to a server's load when its KV cache is full; the penalty begins at KV_ROOM. The
uncached tokens of the prompt count, too: beyond its room the engine preempts running requests."""

DELAYED = 0.5
"""A request that comes while a long prompt is computed waits for half of it on average."""

AFFINITY_BONUS = 2.0
"""Requests subtracted from the affinity server's load for a new conversation."""

_EXPLAINED = (
    "_arrivals", "_crowdings", "_overflows", "_rooms", "factors", "kv_tokens", "slow",
)  # fmt: skip
"""Figures of the candidates that explanations show."""


class ScoreCache:
    """The parts of the candidates' scores; every list has one item per candidate, in order.

    affinity: the affinity servers among the candidates.
    candidates: the tuple that the fleet returned; compared by identity.
    estimates: of the candidates.
    slow, factors: slowness, and slowness divided by the effective capacity.
    bases: scores without tokens to recompute; infinite in a large fleet before the first update.
    credited: bits of the servers whose cached blocks count.
    latency, load: the candidates' medians.
    has_peers: whether other routers use the same servers.
    peer_ratio: estimated requests of other routers since the scrape, per request of ours.
    is_adapter: whether the model is a LoRA adapter on any of the servers.
    unmeasured: positions of candidates without figures yet, see `LargeScoreCache.adopt`.
    least_room: a prompt with at most so many tokens presses no server's KV cache.
    """

    __slots__ = (
        "_arrivals",
        "_bits",
        "_crowdings",
        "_footprints",
        "_growth",
        "_growths",
        "_known",
        "_load_total",
        "_loads",
        "_log",
        "_order",
        "_overflow_seen",
        "_overflows",
        "_per_queued",
        "_per_request",
        "_position_at",
        "_position_of_bit",
        "_positions",
        "_prompt_growth",
        "_prompt_growths",
        "_read",
        "_rooms",
        "_suspects",
        "_turn_at",
        "_turn_of",
        "affinity",
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
        "latency",
        "least_room",
        "load",
        "mean_footprint",
        "peer_ratio",
        "slow",
        "unmeasured",
    )  # fmt: skip

    is_large: ClassVar[bool] = False

    def __init__(
        self,
        candidates: Sequence[Server],
        estimates: list[ServerEstimate],
        settings: PolicySettings,
    ) -> None:
        self.candidates = candidates
        self.estimates = estimates
        self.bases = [math.inf if self.is_large else 0.0] * len(estimates)
        self.factors = [1.0] * len(estimates)
        self.slow = [1.0] * len(estimates)
        self.latency = self.load = 0.0
        self.credited = 0
        self.everyone = sum(estimate.bit for estimate in estimates)
        self.fresh_until = -math.inf
        self._known = False
        """Whether all candidates have been updated once."""
        self._turn_of = 0
        self._turn_at = -math.inf
        """The next candidate to be updated, and when."""
        self._suspects: set[int] = set()
        """Positions of the candidates to be updated out of turn."""
        self.unmeasured = set(range(len(estimates) if self.is_large else 0))
        self.peer_ratio = 0.0
        self.has_peers = False
        self._per_request = 1.0 / settings.tokens_per_request
        self._per_queued = QUEUED_WEIGHT * self._per_request
        self._growth = settings.waste_growth
        self._growths = [0.0] * len(estimates)
        """Increase of the scores per token to recompute."""
        self._loads = [0.0] * len(estimates)
        self._prompt_growth = settings.prompt_growth
        self._prompt_growths = [0.0] * len(estimates)
        self._overflows = [0.0] * len(estimates)
        self._overflow_seen = False
        """Whether a new conversation would find something evicted anywhere."""
        self._arrivals = [0.0] * len(estimates)
        self._footprints = [0.0] * len(estimates)
        self._crowdings = [0.0] * len(estimates)
        self._rooms = [math.inf] * len(estimates)
        self.least_room = math.inf
        self.kv_tokens = [math.inf] * len(estimates)
        """KV cache sizes of the servers as conversations find them; set before `measure`."""
        self.mean_footprint = 0.0
        self.is_adapter = False
        self._positions = {server: position for position, server in enumerate(candidates)}
        self._position_of_bit = {
            estimate.bit: position for position, estimate in enumerate(estimates)
        }
        self._bits = [estimate.bit for estimate in estimates]
        self._position_at = {bit.bit_length(): at for at, bit in enumerate(self._bits)}
        self._log = candidates[0].change_log.servers
        self._read = len(self._log)
        self._load_total = 0.0
        self._order = ScoreOrder(self.bases) if self.is_large else None
        self.affinity = AffinityServers(estimates, large=self.is_large)

    @property
    def is_complete(self) -> bool:
        """Whether all candidates have been updated once."""
        return self._known

    @property
    def offers_none(self) -> bool:
        """Whether none of the candidates updated so far may be picked."""
        return False

    def follow(self) -> None:
        """Update the scores of servers that have changed; the first step of a pick."""
        log = self.candidates[0].change_log
        servers, read = log.servers, self._read
        if servers is self._log:
            if read == len(servers):
                return
            changed = servers[read:]
        elif log.earlier is self._log:
            changed = log.earlier[read:] + servers
        else:
            self.measure_all()
            return
        self._log, self._read = servers, len(servers)
        positions = self._positions
        for server in set(changed):
            position = positions.get(server)
            if position is not None:
                self._measure(position)

    def refresh_soon(self, estimate: ServerEstimate) -> None:
        """Update the server's terms with the next pick: it has failed a request."""
        self.fresh_until = -math.inf
        position = self._position_of_bit.get(estimate.bit)
        if position is not None:
            self._suspects.add(position)

    def next_positions(self, most: int, now: float, every: float) -> tuple[Sequence[int], bool]:
        """The candidates to update now, and whether a new round over all of them begins.

        At most `most` are updated `every` so many seconds, the first time with each pick, so that
        no pick among a thousand new servers takes 15 ms. As many servers of `refresh_soon`, and
        new ones, are updated at once; if all fit into one turn, all are.
        """
        size, begin = len(self.estimates), self._turn_of
        if size <= most or not (self._known or self.is_large):
            self._suspects.clear()
            self._known = True
            self.fresh_until = self._turn_at = now + every
            return range(size), True
        suspects = sorted(self._suspects)[:most]
        self._suspects.difference_update(suspects)
        if self._known and now < self._turn_at:
            self.fresh_until = -math.inf if self._suspects else self._turn_at
            return suspects, False
        end = min(begin + most, size)
        self._turn_of = end % size
        if self._known:
            self._turn_at = now + every
            self.fresh_until = -math.inf if self._suspects else self._turn_at
        else:
            self._known = end == size
        return sorted({*suspects, *range(begin, end)}), begin == 0

    def measure_all(self) -> None:
        """Update all scores: changes have been missed, or all are new."""
        self._log = self.candidates[0].change_log.servers
        self._read = len(self._log)
        self._measure_at(range(len(self.estimates)))

    def measure(self, positions: Sequence[int]) -> None:
        """Update the scores: `factors` are new there, and all servers may have changed."""
        if len(positions) == len(self.estimates):
            self.measure_all()
        else:
            self.follow()
            self._measure_at(positions)

    def _measure_at(self, positions: Sequence[int]) -> None:
        order = self._order
        if order is not None and len(positions) == len(self.estimates):
            self._order = None  # sorting all at once is cheaper
        for position in positions:
            self._measure_room(position)
            self._measure(position)
            self._measure_working_set(position)
        if order is not None and self._order is None:
            self._order = order
            order.rebuild(self.bases)
        self.least_room = min(self._rooms)
        self._load_total = sum(self._loads)

    def _measure(self, position: int) -> None:
        estimate, factor = self.estimates[position], self.factors[position]
        server = estimate.server
        server_load = server.load_estimate
        load = server_load.active + estimate.extra
        waste_load = load
        if load > MAX_WASTE_LOAD:
            even = self._load_total / len(self._loads) * server.weighted_capacity
            waste_load = min(load, max(even, MAX_WASTE_LOAD))
        base = 1.0 + load + estimate.queued * self._per_queued + self._crowdings[position]
        if self.is_large and server.in_flight >= server.cap:  # `at_cap`, inlined
            base = math.inf  # see `Policy.skips_full`
        self.bases[position] = factor * base
        if self._order is not None:
            self._order.change(position, factor * base)
        per_token = factor * self._per_request
        self._growths[position] = per_token * (1.0 + self._growth * waste_load)
        self._loads[position] = server_load.relative
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
        lost = overflow(tokens, self.kv_tokens[position])
        self._overflows[position] = per_token * lost
        if lost:
            self._overflow_seen = True
        self._arrivals[position] = per_token * estimate.arrivals

    def _measure_room(self, position: int) -> None:
        """Update what the last scrape says of the KV cache; our requests do not change it."""
        load = self.estimates[position].server.load_estimate
        usage = load.metrics.kv_usage if load.metrics is not None and load.fresh else None
        room = math.inf
        if usage is not None:
            room = max(0.0, KV_ROOM - usage) * self.kv_tokens[position]
        self._rooms[position] = room
        self._crowdings[position] = (
            KV_PENALTY * max(0.0, (usage or 0.0) - KV_ROOM) / (1.0 - KV_ROOM)
        )

    def scores(self, levels: Levels, bonus: int) -> list[float]:
        """The candidates' scores for a prompt.

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

    def with_pressure(self, scores: list[float], tokens: float, levels: Levels) -> list[float]:
        """The scores with a penalty where the uncached tokens of the prompt exceed the room."""
        found = scores.copy()
        for position, room in enumerate(self._rooms):
            if tokens > room:
                found[position] += self.factors[position] * self._excess(position, tokens, levels)
        return found

    def with_waits(self, scores: list[float], waits: int) -> list[float]:
        """The scores with a penalty for the servers on which the adapter would wait for a slot."""
        factors = self.factors
        waits &= self.everyone
        free = self.everyone & ~waits
        if free.bit_count() < waits.bit_count():
            found = [s + f * WAIT_PENALTY for s, f in zip(scores, factors, strict=True)]
            for position in self._all_of(free):
                found[position] = scores[position]
        else:
            found = scores.copy()
            for position in self._all_of(waits):
                found[position] += factors[position] * WAIT_PENALTY
        return found

    def _all_of(self, bits: int) -> list[int]:
        """Positions of these servers; from the highest bit on, which is found at once."""
        position_at, bit_of = self._position_at, self._bits
        found: list[int] = []
        while bits:
            position = position_at[bits.bit_length()]
            found.append(position)
            bits ^= bit_of[position]
        return found

    def _excess(self, position: int, tokens: float, levels: Levels) -> float:
        """The penalty for the uncached tokens beyond the room of a server, in requests."""
        bit = self.estimates[position].bit
        cached = next((cached for cached, bits in levels if bits & bit), 0.0)
        return self._excess_beyond(position, tokens - cached)

    def _excess_beyond(self, position: int, uncached: float) -> float:
        over = max(0.0, uncached - self._rooms[position])
        return over * KV_PENALTY / ((1.0 - KV_ROOM) * self.kv_tokens[position])

    # -- for explanations -------------------------------------------------------------------------

    def frozen(self) -> Self:
        """A copy for `pressure` and `prompt_terms` whose figures do not change."""
        one = copy.copy(self)
        for figures in _EXPLAINED:
            setattr(one, figures, getattr(self, figures)[:])
        return one

    def pressure(self, position: int, tokens: float, levels: Levels) -> float:
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

    def not_overloaded(self, levels: Levels) -> Levels:
        """Drop servers with much more load than the mean, so that a hot prefix spreads."""
        loads = self._loads
        hot = HOT_SHARE * (sum(loads) / len(loads)) + HOT_MARGIN
        if max(loads) <= hot:
            return levels
        out = 0
        for position, estimate in enumerate(self.estimates):
            if self._is_overloaded(position, hot):
                out |= estimate.bit
        return [(tokens, holders & ~out) for tokens, holders in levels if holders & ~out]

    def _is_overloaded(self, position: int, hot: float) -> bool:
        load = self._loads[position]
        return load > hot and load * self.candidates[position].weighted_capacity > HOT_REQUESTS
