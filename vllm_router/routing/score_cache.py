"""Scores of the candidates for one model, recomputed only for servers that have changed.

A request changes the load of one or two servers. Servers note changes in the fleet's change log,
and a ScoreCache reads what is new in it.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_router.routing.adapters import WAIT_PENALTY
from vllm_router.routing.hashing import draw
from vllm_router.routing.score_order import ScoreOrder
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

FULL_SHARE = 1.25
"""The same for a server whose engine has requests waiting: others have room, and it has not."""

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


LARGE = 128
"""From so many candidates on, a pick does not score all of them, see `lowest_of_few`."""

SHORTLIST = 16
"""Candidates with the lowest base scores that are scored in a large fleet."""

HOLDERS = 8
"""Servers that are scored because they have blocks of a prompt, for each number of blocks."""

SEARCHED = 32
"""Candidates with the lowest base scores among which servers with a prompt's blocks are sought."""

FEW_BITS = (1 << 60) - 1
"""As many bits as Python computes with quickly."""

RING = 32
"""Servers of a large fleet among which a key's affinity server is sought."""

_PER_CANDIDATE = (
    "_arrivals", "_crowdings", "_footprints", "_growths", "_loads", "_overflows",
    "_prompt_growths", "_rooms", "bases", "factors", "kv_tokens", "slow",
)  # fmt: skip
_OF_ALL = (
    "_log", "_overflow_seen", "_read", "_turn_at", "_turn_of", "has_peers", "latency", "load",
    "mean_footprint", "peer_ratio",
)  # fmt: skip
"""Figures that a ScoreCache takes over from the one before it."""

_EXPLAINED = (
    "_arrivals", "_crowdings", "_overflows", "_rooms", "factors", "kv_tokens", "slow",
)  # fmt: skip
"""Figures of the candidates that explanations show."""


class ScoreCache:
    """The parts of the candidates' scores; every list has one item per candidate, in order.

    candidates: the tuple that the fleet returned; compared by identity.
    estimates: of the candidates.
    slow, factors: slowness, and slowness divided by the effective capacity.
    bases: scores without tokens to recompute.
    credited: bits of the servers whose cached blocks count.
    latency, load: the candidates' medians.
    has_peers: whether other routers use the same servers.
    peer_ratio: estimated requests of other routers since the scrape, per request of ours.
    is_adapter: whether the model is a LoRA adapter on any of the servers.
    unmeasured: positions of candidates without figures yet, see `adopt`.
    least_room: a prompt with at most so many tokens presses no server's KV cache.
    """

    __slots__ = (
        "_affinities",
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
        "_queueing",
        "_read",
        "_ring",
        "_rooms",
        "_suspects",
        "_turn_at",
        "_turn_of",
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

    def __init__(
        self,
        candidates: Sequence[Server],
        estimates: list[ServerEstimate],
        settings: PolicySettings,
    ) -> None:
        self.candidates = candidates
        self.estimates = estimates
        self.bases = [0.0] * len(estimates)
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
        self.unmeasured: set[int] = set()
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
        self._read = 0
        self._load_total = 0.0
        self._queueing = False
        large = len(estimates) >= LARGE
        self._order = ScoreOrder(self.bases) if large else None
        self._ring = sorted((estimate.seed, estimate.bit) for estimate in estimates if large)

    @property
    def is_large(self) -> bool:
        """Whether `lowest_of_few` can be used."""
        return self._order is not None

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

    def adopt(self, before: ScoreCache) -> None:
        """Take over the figures of an earlier set of candidates, if most are the same.

        In a fleet of a thousand a server comes or goes often. Measuring all candidates anew takes
        30 ms, and adopting them 3. The new candidates are updated with the next pick.
        """
        places = [before._positions.get(server) for server in self.candidates]
        new = {position for position, place in enumerate(places) if place is None}
        if not before._known or 2 * len(new) > len(places):
            return
        before.follow()
        for name in _PER_CANDIDATE:
            old = getattr(before, name)
            figures = zip(places, getattr(self, name), strict=True)
            setattr(self, name, [own if at is None else old[at] for at, own in figures])
        for name in _OF_ALL:
            setattr(self, name, getattr(before, name))
        self.credited = before.credited & before.everyone & self.everyone
        suspects = {before.candidates[position] for position in before._suspects}
        self.unmeasured = new
        self._suspects = new | {self._positions[s] for s in suspects if s in self._positions}
        self.fresh_until = -math.inf if self._suspects else before.fresh_until
        self._known = True
        self._turn_of %= len(places)
        self.least_room, self._load_total = min(self._rooms), sum(self._loads)
        if self._order is not None:
            self._order.rebuild(self.bases)

    def refresh_soon(self, estimate: ServerEstimate) -> None:
        """Update the server's terms with the next pick: it has failed a request."""
        self.fresh_until = -math.inf
        position = self._position_of_bit.get(estimate.bit)
        if position is not None:
            self._suspects.add(position)

    def next_positions(self, most: int, now: float, every: float) -> tuple[Sequence[int], bool]:
        """The candidates to update now, and whether a new round over all of them begins.

        At most `most` are updated `every` so many seconds, the first time all. The
        servers of `refresh_soon` are updated at once; if all fit into one turn, all are.
        """
        size, begin = len(self.estimates), self._turn_of
        suspects, self._suspects = self._suspects, set()
        self.fresh_until = now + every
        if not self._known or size <= most:
            self._known = True
            self._turn_at = now + every
            return range(size), True
        if now < self._turn_at:
            self.fresh_until = self._turn_at
            return sorted(suspects), False
        end = min(begin + most, size)
        self._turn_of, self._turn_at = end % size, now + every
        suspects.update(range(begin, end))
        return sorted(suspects), begin == 0

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
        self._queueing = order is None and any(
            estimate.server.load_estimate.waiting >= 1.0 for estimate in self.estimates
        )

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
        if self._ring and server.in_flight >= server.cap:  # `at_cap`, inlined
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

    def _excess(self, position: int, tokens: float, levels: list[tuple[float, int]]) -> float:
        """The penalty for the uncached tokens beyond the room of a server, in requests."""
        bit = self.estimates[position].bit
        cached = next((cached for cached, bits in levels if bits & bit), 0.0)
        return self._excess_beyond(position, tokens - cached)

    def _excess_beyond(self, position: int, uncached: float) -> float:
        over = max(0.0, uncached - self._rooms[position])
        return over * KV_PENALTY / ((1.0 - KV_ROOM) * self.kv_tokens[position])

    # -- large fleets -----------------------------------------------------------------------------

    def lowest_of_few(
        self,
        levels: list[tuple[float, int]],
        bonus: int,
        prompt: tuple[float, float, float, float],
        draw: float,
        waits: int = 0,
    ) -> list[int]:
        """The positions with the lowest score among the servers that have a chance.

        These are the ones with the lowest base scores, those with blocks of the prompt, and the
        affinity server: the others would need more requests, and compute as much. `prompt` has the
        tokens of the prompt and the arguments of `with_prompt`; `draw` is a random number in
        [0, 1); `waits` as for `with_waits`.
        """
        order = self._order
        assert order is not None
        tokens, uncached, turns, delay = prompt
        if not (levels or bonus or waits or uncached) and tokens <= self.least_room:
            return self._lowest_base(order.lowest(SHORTLIST), draw)
        front = order.lowest(SEARCHED)
        chosen = front[:SHORTLIST]
        if waits:
            free = self._some_of(self.everyone & ~waits, front, draw)
            chosen = list(dict.fromkeys((*chosen, *free)))
        cached: dict[int, float] = {}
        best = 0.0
        if levels:
            cached = self._cached_at(levels, front, draw)
            best = max(cached.values(), default=0.0)
            chosen = list(dict.fromkeys((*chosen, *cached)))
        at_home = self._position_of_bit[bonus] if bonus else -1
        if bonus and at_home not in chosen:
            chosen.append(at_home)
        bases, growths, have = self.bases, self._growths, cached.get
        lost, late = turns * uncached, DELAYED * uncached * delay if turns else 0.0
        overflows, arrivals = self._overflows, self._arrivals
        # One pass over the chosen, with the terms that this prompt and these servers have.
        if uncached and self._prompt_growth:
            prompt_growths = self._prompt_growths
            scores = [
                bases[at]
                + (best - have(at, 0.0)) * growths[at]
                + uncached * prompt_growths[at]
                + lost * overflows[at]
                + late * arrivals[at]
                for at in chosen
            ]
        elif lost and self._overflow_seen:
            scores = [
                bases[at]
                + (best - have(at, 0.0)) * growths[at]
                + lost * overflows[at]
                + late * arrivals[at]
                for at in chosen
            ]
        elif late:
            scores = [
                bases[at] + (best - have(at, 0.0)) * growths[at] + late * arrivals[at]
                for at in chosen
            ]
        elif best:
            scores = [bases[at] + (best - have(at, 0.0)) * growths[at] for at in chosen]
        else:
            scores = [bases[at] for at in chosen]
        if bonus:
            scores[chosen.index(at_home)] -= self.factors[at_home] * AFFINITY_BONUS
        if tokens > self.least_room:
            for number, position in enumerate(chosen):
                if tokens > self._rooms[position]:
                    excess = self._excess_beyond(position, tokens - cached.get(position, 0.0))
                    scores[number] += self.factors[position] * excess
        if waits:
            for number, position in enumerate(chosen):
                if self._bits[position] & waits:
                    scores[number] += self.factors[position] * WAIT_PENALTY
        lowest = min(scores)
        if scores.count(lowest) == 1:
            return [chosen[scores.index(lowest)]]
        return [at for at, score in zip(chosen, scores, strict=True) if score == lowest]

    def _lowest_base(self, front: list[int], draw: float) -> list[int]:
        """One of these positions with the lowest base score, by chance; they are in order."""
        bases = self.bases
        lowest, one = bases[front[0]], front[int(draw * len(front))]
        if bases[one] == lowest:
            return [one]
        return [position for position in front if bases[position] == lowest]

    def _cached_at(
        self, levels: list[tuple[float, int]], front: list[int], draw: float
    ) -> dict[int, float]:
        """Cached tokens by position, for some servers of each level.

        `front` are the SEARCHED positions with the lowest base scores. As in `not_overloaded`,
        servers with much more load than the mean do not count.
        """
        loads, servers = self._loads, self.candidates
        mean = self._load_total / len(loads)
        # No server with a load up to `usual` is overloaded, nor one up to `hot` with no queue.
        usual, hot = FULL_SHARE * mean, HOT_SHARE * mean + HOT_MARGIN
        cached: dict[int, float] = {}
        for tokens, bits in levels:
            for position in self._some_of(bits, front, draw):
                if position in cached:
                    continue
                load = loads[position]
                if (
                    load <= usual
                    or (load <= hot and servers[position].load_estimate.waiting < 1.0)
                    or not self._is_overloaded(position, mean)
                ):
                    cached[position] = tokens
        return cached

    def _some_of(self, bits: int, front: list[int], draw: float) -> list[int]:
        """Positions of some of these servers, of all if they are few.

        HOLDERS with the lowest base scores; if few are in front, some of the others, by chance.
        """
        if bits.bit_count() <= HOLDERS:
            return self._all_of(bits)
        bit_of = self._bits
        found = [position for position in front[:SHORTLIST] if bit_of[position] & bits]
        if len(found) < HOLDERS:
            found += [position for position in front[SHORTLIST:] if bit_of[position] & bits]
        if len(found) >= HOLDERS:
            return found[:HOLDERS]
        shift = int(draw * bits.bit_length())
        return found + self._first_of(bits >> shift << shift or bits)

    def _all_of(self, bits: int) -> list[int]:
        """Positions of these servers; from the highest bit on, which is found at once."""
        position_at, bit_of = self._position_at, self._bits
        found: list[int] = []
        while bits:
            position = position_at[bits.bit_length()]
            found.append(position)
            bits ^= bit_of[position]
        return found

    def _first_of(self, bits: int) -> list[int]:
        """Positions of the HOLDERS servers with the lowest bits, of all if they are fewer."""
        position_at, below = self._position_at, 0
        found: list[int] = []
        if bits > FEW_BITS:
            # Of a thousand bits some near ones suffice, and small numbers are computed faster.
            below = (bits & -bits).bit_length() - 1
            near = bits >> below & FEW_BITS
            if near.bit_count() < HOLDERS:
                below = 0
            else:
                bits = near
        while bits and len(found) < HOLDERS:
            bit = bits & -bits
            bits ^= bit
            found.append(position_at[below + bit.bit_length()])
        return found

    # -- for explanations -------------------------------------------------------------------------

    def frozen(self) -> ScoreCache:
        """A copy for `pressure` and `prompt_terms` whose figures do not change."""
        one = copy.copy(self)
        for figures in _EXPLAINED:
            setattr(one, figures, getattr(self, figures)[:])
        return one

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
        mean = sum(loads) / len(loads)
        # In a large fleet this explains a pick, which looks at the queues of few servers.
        queueing = self._queueing or self.is_large
        if not queueing and max(loads) <= HOT_SHARE * mean + HOT_MARGIN:
            return levels
        out = 0
        for position, estimate in enumerate(self.estimates):
            if self._is_overloaded(position, mean):
                out |= estimate.bit
        return [(tokens, holders & ~out) for tokens, holders in levels if holders & ~out]

    def _is_overloaded(self, position: int, mean: float) -> bool:
        load, server = self._loads[position], self.candidates[position]
        if load <= HOT_SHARE * mean + HOT_MARGIN and (
            load <= FULL_SHARE * mean or server.load_estimate.waiting < 1.0
        ):
            return False
        return load * server.weighted_capacity > HOT_REQUESTS

    def affinity_of(self, key: int) -> ServerEstimate:
        """The key's server by weighted rendezvous hashing. Cached: it costs 0.6 µs per server.

        In a large fleet, only the RING servers that follow the key in the order of their seeds
        take part: another server's coming or going moves few keys there, too.
        """
        affinity = self._affinities.get(key)
        if affinity is None:
            if len(self._affinities) >= MAX_AFFINITIES:
                self._affinities.clear()
            affinity = self._affinities[key] = min(
                self._contenders(key),
                key=lambda estimate: (
                    -math.log(draw(key, estimate.seed)) / estimate.server.key_share
                ),
            )
        return affinity

    def _contenders(self, key: int) -> list[ServerEstimate]:
        ring = self._ring
        if not ring:
            return self.estimates
        begin = bisect_left(ring, (key, 0))
        around = ring[begin : begin + RING]
        around += ring[: RING - len(around)]
        return [self.estimates[self._position_of_bit[bit]] for _, bit in around]
