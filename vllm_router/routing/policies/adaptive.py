"""Load, uncached prompt tokens, and cached blocks, in one score.

    score = slow × (1 + load + (2 × queued + recompute × (1 + K × load)) / T) / share

with `recompute` including an adapter to be loaded and what a new conversation would find evicted.
The lowest score wins, ties at random. docs/routing.md explains every term with an example. With
nothing cached, nothing queued and equal speed the order equals `least_load`. Scores change
with every request, for the servers it concerns; terms that change with time (slowness, error
penalty, slow start) are refreshed at most every REFRESH seconds, in a large fleet for a part of the
servers each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, TypeAlias

from vllm_router.routing.adapters import AdapterServers, Levels, SwapCost, with_adapters
from vllm_router.routing.hashing import seed_of
from vllm_router.routing.large_score_cache import LARGE, LargeScoreCache
from vllm_router.routing.policies.base import Choice, Explained, Policy, PolicySettings
from vllm_router.routing.prefix.index import PrefixIndex
from vllm_router.routing.prompt.blocks import BLOCK_ENDS, blocks_in
from vllm_router.routing.score_cache import MAX_WASTE_LOAD, QUEUED_WEIGHT, ScoreCache
from vllm_router.routing.score_parts import ScoredRequest, ScoreTable, ScoreTerms
from vllm_router.routing.server_estimate import (
    ERROR_PENALTY,
    PrefixStatistics,
    Reservation,
    ServerEstimate,
    keep_queued,
    median_latency,
    median_load,
    slowness,
)
from vllm_router.routing.working_sets import WorkingSets
from vllm_router.steps import Steps, finish

if TYPE_CHECKING:
    from vllm_router.fleet.server import Lease, Server
    from vllm_router.routing.prompt.routing_info import RoutingInfo

REFRESH = 0.1
"""Seconds between two updates of the terms that change with time."""

REFRESHED_AT_ONCE = 100
"""Candidates that are updated at once, in 1 ms; in a larger fleet the others follow in turn."""

Slots: TypeAlias = tuple[int, int, int]
"""The bits `loaded`, `spare` and `waits` of `score_parts.ScoredRequest`."""

_NO_SLOTS: Slots = (0, 0, 0)
"""Of requests for base models."""

EXPLAINED_AT_ONCE = 200
"""Candidates of an explanation that are listed in one slice."""

MAX_CACHES = 256
"""Models with a ScoreCache."""

EWMA_WEIGHT = 0.05
"""Weight of a new sample in the mean time to the first token."""

CREDIT_MAX_PENALTY = 2.0
CREDIT_MAX_SLOWNESS = 2.0
"""Cached blocks of a server do not count while its error penalty or slowness is higher."""

PEERS_RATIO = 1.3
"""Gauges that exceed our own leases by this factor mean that other routers use the servers."""

NEW_BYTES = 1024
"""A conversation is new to the fleet if no server has more of it than the leading tools and system
messages, which conversations have in common, and so many bytes."""

MIN_AFFINITY_TOKENS = 256.0
"""A shared prefix needs at least so many tokens to have an affinity server."""

Matches = list[tuple[int, int]]
"""Pairs (leading blocks, bits of the servers that have them), the most first."""


class Adaptive(Policy):
    """The recommended policy, see the module's docstring."""

    name = "adaptive"
    needs_prompt = True
    needs_session = True

    def __init__(self, rng: Random, settings: PolicySettings = PolicySettings()) -> None:  # noqa: B008 (frozen)
        super().__init__(rng, settings)
        self.index = PrefixIndex(settings)
        self._estimates: dict[Server, ServerEstimate] = {}
        self._caches: dict[str | None, ScoreCache] = {}
        self._working_sets = WorkingSets(settings.working_set_window)
        self._swap_cost = SwapCost(settings.adapter_swap_tokens)
        self._slots = AdapterServers()
        self._first_token = 0.0
        """Mean seconds to the first token of a stream, over all servers."""

    # -- the decision -----------------------------------------------------------------------------

    def skips_full(self, candidates: Sequence[Server]) -> bool:
        return len(candidates) >= LARGE

    def pick(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Choice:
        cache = self._cache(candidates, info.model, now)
        if isinstance(cache, LargeScoreCache):
            return self._pick_of_many(cache, info)
        scores = cache.bases
        hashes = info.prompt.block_hashes
        matches: Matches | None = None
        if hashes or cache.has_peers or cache.is_adapter:
            matches = self.index.table.match(hashes, cache.everyone)
            levels, bonus, (_, _, waits) = self._credit(cache, info, matches)
            scores = self._weigh(cache, info, matches, levels, bonus, waits)
        lowest = min(scores)
        if scores.count(lowest) == 1:
            return candidates[scores.index(lowest)], matches
        best = [server for server, score in zip(candidates, scores, strict=True) if score == lowest]
        return self.rng.choice(best), matches

    def _pick_of_many(self, cache: LargeScoreCache, info: RoutingInfo) -> Choice:
        """As `pick`, but only the candidates with a chance are scored."""
        hashes = info.prompt.block_hashes
        matches: Matches | None = None
        levels: Levels = []
        bonus = waits = 0
        if hashes or cache.has_peers or cache.is_adapter:
            matches = self.index.table.match(hashes, cache.everyone)
            levels, bonus, (_, _, waits) = self._levels(cache, info, matches)
        tokens, uncached, turns = self._prompt(info, matches or [])
        if not hashes:
            uncached = turns = 0.0
        delay = uncached * self._swap_cost.per_token
        prompt = (tokens, uncached, turns, delay)
        best = cache.lowest_of_few(levels, bonus, prompt, self.rng.random(), waits)
        position = best[0] if len(best) == 1 else self.rng.choice(best)
        return cache.candidates[position], matches

    def _credit(
        self, cache: ScoreCache, info: RoutingInfo, matches: Matches
    ) -> tuple[Levels, int, Slots]:
        """The cached tokens that count.

        Also the bit of the affinity server if a conversation begins here, or 0, and the slots for
        the request's adapter.
        """
        levels, bonus, slots = self._levels(cache, info, matches)
        return cache.not_overloaded(levels) if levels else levels, bonus, slots

    def _levels(
        self, cache: ScoreCache, info: RoutingInfo, matches: Matches
    ) -> tuple[Levels, int, Slots]:
        """As `_credit`, with servers that have much more load than the mean."""
        levels: Levels = []
        if matches:
            per_byte = self.index.tokens_per_byte(info.model, info.prompt)
            credited = cache.credited
            levels = [
                (BLOCK_ENDS[count - 1] * per_byte, holders & credited)
                for count, holders in matches
                if holders & credited
            ]
        bonus = 0
        if cache.has_peers and info.prompt.conversation and not self.hears_routers:
            bonus = self._credit_affinity(cache, info, levels)
        slots = _NO_SLOTS
        if cache.is_adapter and info.model is not None:
            loaded, spare, _ = slots = self._slots_for(cache, info.model)
            cost = self._swap_cost.tokens
            if spare:
                levels = with_adapters(levels, spare & cache.credited, cost)
            levels = with_adapters(levels, loaded & cache.credited, cost)
        return levels, bonus, slots

    def _slots_for(self, cache: ScoreCache, adapter: str) -> Slots:
        """The servers' slots for an adapter.

        If the request would wait anywhere, a server that fails or is slow counts like one where it
        would: its free slots must not draw all requests.
        """
        loaded, waits = self._slots.slots_for(adapter, cache.everyone)
        if waits:
            waits |= cache.everyone & ~cache.credited
        return loaded, self._slots.spare_for(adapter, cache.everyone), waits

    def _weigh(
        self,
        cache: ScoreCache,
        info: RoutingInfo,
        matches: Matches,
        levels: Levels,
        bonus: int,
        waits: int,
    ) -> list[float]:
        """The candidates' scores for this prompt."""
        scores = cache.scores(levels, bonus) if levels or bonus else cache.bases
        tokens, uncached, turns = self._prompt(info, matches)
        if info.prompt.block_hashes:
            delay = uncached * self._swap_cost.per_token
            scores = cache.with_prompt(scores, uncached, turns, delay)
        if tokens > cache.least_room:
            scores = cache.with_pressure(scores, tokens, levels)
        return cache.with_waits(scores, waits) if waits else scores

    def _prompt(self, info: RoutingInfo, matches: Matches) -> tuple[float, float, float]:
        """Tokens of the prompt, of these cached nowhere, and further turns of a new conversation.

        The last is 0 for a conversation that a server has.
        """
        prompt = info.prompt
        tokens = prompt.size * self.index.tokens_per_byte(info.model, prompt)
        found = BLOCK_ENDS[matches[0][0] - 1] if matches else 0
        uncached = tokens * max(0.0, 1.0 - found / prompt.size) if prompt.size else 0.0
        is_new = found <= prompt.shared + NEW_BYTES and self._working_sets.window > 0.0
        return tokens, uncached, self._working_sets.turns if is_new else 0.0

    # -- several routers before the same servers --------------------------------------------------

    def _credit_affinity(self, cache: ScoreCache, info: RoutingInfo, levels: Levels) -> int:
        """Credit the servers to which other routers probably sent this conversation.

        Only if they do not tell: what they do tell is better than a guess, against which the
        servers' loads would count less.

        All routers agree on the affinity servers of a conversation and of a shared prefix. Extends
        `levels`; returns the bit of the server on which a new conversation should begin, or 0.
        """
        prompt = info.prompt
        per_byte = self.index.tokens_per_byte(info.model, prompt)
        known = levels[0][0] if levels else 0.0
        shared = prompt.shared * per_byte
        bonus = 0
        found: Levels = []
        if known <= shared:
            if info.session is not None:
                server = cache.affinity.of(seed_of(info.session))
            else:
                server = cache.affinity.of(prompt.conversation)
            if prompt.earlier:
                found.append((prompt.earlier * per_byte, server.bit))
            elif (
                server.bit & cache.credited and server.server.load_estimate.slow_start_factor >= 1.0
            ):
                # In slow start a score below 0 would fall with the slow start factor.
                bonus = server.bit
        blocks = blocks_in(prompt.shared)
        if shared >= MIN_AFFINITY_TOKENS and blocks:
            found.append((shared, cache.affinity.of(prompt.block_hashes[blocks - 1]).bit))
        levels += [credit for credit in found if credit[1] & cache.credited]
        levels.sort(reverse=True)
        return bonus

    # -- score caches and estimates ---------------------------------------------------------------

    def _cache(self, candidates: Sequence[Server], model: str | None, now: float) -> ScoreCache:
        cache = self._caches.get(model)
        whole = False
        if cache is None or cache.candidates is not candidates:
            # Only the first cache of a model may begin with a part of the candidates: where sets of
            # candidates alternate (owners of responses, long prompts), one lives for a pick.
            whole = cache is not None
            estimates = [self._estimate(server) for server in candidates]
            before = cache
            kind = LargeScoreCache if len(candidates) >= LARGE else ScoreCache
            cache = kind(candidates, estimates, self.settings)
            cache.is_adapter = any(model in server.catalog.adapters for server in candidates)
            if isinstance(cache, LargeScoreCache) and isinstance(before, LargeScoreCache):
                cache.adopt(before)
            if len(self._caches) >= MAX_CACHES:
                self._caches.clear()
            self._caches[model] = cache
        if now >= cache.fresh_until:
            self._refresh(cache, now)
            while (whole or cache.offers_none) and not cache.is_complete:
                self._refresh(cache, now)
        else:
            cache.follow()
        return cache

    def _estimate(self, server: Server) -> ServerEstimate:
        estimate = self._estimates.get(server)
        if estimate is None:
            bit = self.index.bit(server)
            estimate = self._estimates[server] = ServerEstimate(server, bit, self._slots)
        return estimate

    def _refresh(self, cache: ScoreCache, now: float) -> None:
        """Update the terms that change with time, of REFRESHED_AT_ONCE candidates at most.

        A new cache of a large fleet is complete after some picks. Servers that have just failed a
        request are updated at once.
        """
        estimates = cache.estimates
        positions, begins = cache.next_positions(REFRESHED_AT_ONCE, now, REFRESH)
        if len(positions) < len(estimates):
            positions = [
                position
                for position in positions
                if not estimates[position].is_quiet or position in cache.unmeasured
            ]
            cache.unmeasured.difference_update(positions)
        self.index.follow([cache.candidates[position] for position in positions], now)
        self._working_sets.expire(now)
        for position in positions:
            estimate = estimates[position]
            if estimate.restarts != estimate.server.restarts:
                estimate.restarts = estimate.server.restarts
                estimate.adapters.clear()
                self._working_sets.forget(estimate)
            estimate.count_arrival(now, 0.0)
            estimate.follow_scrape(self._swap_cost.per_token)
            if estimate.due:
                estimate.settle(now)
        if begins:
            self._detect_peers(cache)
            cache.mean_footprint = self._working_sets.mean
            cache.latency, cache.load = median_latency(estimates), median_load(estimates)
        for position in positions:
            estimate = estimates[position]
            server = estimate.server
            penalty = estimate.error_penalty_now(now)
            estimate.extra = penalty + cache.peer_ratio * estimate.sent
            slow = slowness(estimate, cache.latency, cache.load, now)
            # One long prefill makes a server slow for seconds, which is no reason to compute the
            # conversations of its agents elsewhere.
            lasting = estimate.lasting < CREDIT_MAX_SLOWNESS
            if penalty < CREDIT_MAX_PENALTY and lasting and estimate.trusted:
                cache.credited |= estimate.bit
            else:
                cache.credited &= ~estimate.bit
            share = server.weighted_capacity * server.load_estimate.slow_start_factor
            cache.slow[position] = slow
            cache.factors[position] = slow / share
            cache.kv_tokens[position] = self.index.kv_tokens(server)
        cache.measure(positions)

    @staticmethod
    def _detect_peers(cache: ScoreCache) -> None:
        """Detect other routers: the gauges show more requests than we have sent."""
        estimates = cache.estimates
        total = sum(estimate.gauge for estimate in estimates)
        own = sum(estimate.own for estimate in estimates)
        # At least one request per server: gauges lag, which matters with short requests.
        cache.has_peers = total > PEERS_RATIO * own and total - own >= len(estimates)
        cache.peer_ratio = 0.0
        if cache.has_peers:
            cache.peer_ratio = 0.5 * min(max(total / max(own, 0.1) - 1.0, 0.0), 8.0)

    # -- events of requests -----------------------------------------------------------------------

    def leased(self, lease: Lease, note: object, info: RoutingInfo, now: float) -> None:
        server, prompt = lease.server, info.prompt
        estimate = self._estimates.get(server) or self._estimate(server)
        per_byte = self.index.tokens_per_byte(info.model, prompt)
        cached, blocks = 0.0, 0
        hashes = prompt.block_hashes
        if hashes:
            matches: Matches
            if isinstance(note, list):
                matches = note
            else:
                matches = self.index.table.match(hashes, estimate.bit)
            for count, holders in matches:
                if holders & estimate.bit:
                    cached, blocks = BLOCK_ENDS[count - 1] * per_byte, count
                    break
        tokens = max(0.0, prompt.size * per_byte - cached)
        lease.reservation = reservation = Reservation(
            estimate, info.model, prompt, tokens, cached, blocks
        )
        if prompt.conversation and self._working_sets.window > 0.0:
            estimate.count_arrival(now)
            own = max(0.0, prompt.size - prompt.shared) * per_byte
            self._working_sets.note(prompt.conversation, estimate, own, now)
        estimate.expected_total += cached
        estimate.prompt_total += tokens + cached
        estimate.sent += 1
        cache = self._caches.get(info.model)
        if cache is not None and cache.peer_ratio:
            estimate.extra += cache.peer_ratio
        if info.model is not None and info.model in server.catalog.adapters:
            reservation.is_adapter = True
            reservation.swapped = info.model not in estimate.adapters
            reservation.slot_wait = not estimate.adapters.begin(info.model)
        if not info.stream:
            if estimate.due and estimate.due[0][0] <= now:
                estimate.settle(now)  # with a single candidate `pick` is not called
            estimate.due.append((now + estimate.first_token, reservation))
        if hashes:
            self.index.insert(server, prompt, now)
            if self.placements is not None:
                self.placements.placed(server, prompt, blocks, now)

    def first_byte(self, lease: Lease) -> None:
        reservation = lease.reservation
        if isinstance(reservation, Reservation):
            reservation.start()
            weight = EWMA_WEIGHT if self._first_token else 1.0
            took = lease.last_byte_at - lease.taken_at
            self._first_token += weight * (took - self._first_token)
            self._swap_cost.learn(
                took,
                reservation.ahead,
                adapter=reservation.is_adapter and not reservation.slot_wait,
                swapped=reservation.swapped,
            )

    def learned(self, lease: Lease, prompt_tokens: int, cached_tokens: int | None) -> None:
        reservation = lease.reservation
        if not isinstance(reservation, Reservation):
            return
        prompt = reservation.prompt
        if prompt.block_hashes:
            self.index.learn(reservation.model, prompt, prompt_tokens)
        if cached_tokens is None:
            return
        reservation.estimate.reported_total += cached_tokens
        if reservation.cached >= MIN_AFFINITY_TOKENS:
            self.index.judge(lease.server, reservation.cached, cached_tokens)

    def ended(self, lease: Lease, now: float, *, failed: bool, refused: bool = False) -> None:
        reservation = lease.reservation
        if not isinstance(reservation, Reservation):
            return
        if refused:
            reservation.cached = 0.0  # the engine has not looked it up
            self.index.unlearn(lease.server, reservation.prompt, reservation.known)
            if self.placements is not None:
                self.placements.withdrawn(lease.server, reservation.prompt, reservation.known)
            keep_queued(reservation, self._first_token, now, lease.taken_at)
        if reservation.waiting:
            reservation.start()
        lease.reservation = None
        if reservation.is_adapter and reservation.model is not None:
            reservation.estimate.adapters.end(reservation.model)
        if failed:
            estimate = reservation.estimate
            estimate.error_penalty = estimate.error_penalty_now(now) + ERROR_PENALTY
            estimate.error_at = now
            estimate.extra += ERROR_PENALTY
            for cache in self._caches.values():
                cache.refresh_soon(estimate)

    def forget(self, server: Server) -> None:
        estimate = self._estimates.pop(server, None)
        if estimate is not None:
            self._working_sets.forget(estimate)
            estimate.adapters.leave()
        # Large ones are adopted by the next ones.
        self._caches = {model: cache for model, cache in self._caches.items() if cache.is_large}
        self.index.forget(server)

    # -- other processes before the same servers --------------------------------------------------

    def placed_elsewhere(self, server: Server, hashes: Sequence[int], now: float) -> None:
        self.index.insert_blocks(server, hashes, now)

    def withdrawn_elsewhere(self, server: Server, hashes: Sequence[int]) -> None:
        self.index.remove_blocks(server, hashes)

    def blocks(self, most: int) -> Iterator[tuple[Server, Sequence[int]]]:
        return self.index.blocks(most)

    def queued_tokens(self) -> Mapping[Server, float]:
        return {
            server: own
            for server, estimate in self._estimates.items()
            if (own := estimate.queued - estimate.queued_elsewhere) > 0.5
        }

    def queued_elsewhere(self, server: Server, tokens: float) -> None:
        self._estimate(server).set_queued_elsewhere(tokens)

    def adapter_requests(self) -> Mapping[Server, Mapping[str, int]]:
        return {
            server: own
            for server, estimate in self._estimates.items()
            if (own := estimate.adapters.own)
        }

    def adapters_elsewhere(self, server: Server, requests: Mapping[str, int]) -> None:
        self._estimate(server).adapters.set_elsewhere(requests)

    # -- for operators ----------------------------------------------------------------------------

    def statistics(self, server: Server) -> PrefixStatistics | None:
        estimate = self._estimates.get(server)
        if estimate is None:
            return None
        return PrefixStatistics(
            round(estimate.prompt_total),
            round(estimate.expected_total),
            estimate.reported_total,
            self.index.table.held(estimate.bit),
        )

    def formula(self) -> str:
        settings = self.settings
        limit = f"max({MAX_WASTE_LOAD:g}, even load)"
        waste = f"waste tokens × (1 + {settings.waste_growth:g} × min(load, {limit}))"
        growth = f"{settings.prompt_growth:g} × load × uncached tokens"
        return (
            "score = slow × (1 + load - home + adapter wait + kv pressure + "
            f"({QUEUED_WEIGHT:g} × queued tokens + {waste} + lost tokens + delayed tokens + "
            f"{growth}) / {settings.tokens_per_request:g}) / (share × slow start); "
            "load = running + 0.5 × waiting + recent errors + others + fast errors; "
            "waste tokens = best server's (cached tokens + adapter tokens) - its own; "
            "lost tokens grow with footprint tokens / kv tokens"
        )

    def prepare(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Steps[None]:
        cache = self._cache(candidates, info.model, now) if candidates else None
        while cache is not None and not cache.is_complete:
            yield
            self._refresh(cache, now)

    def explain(
        self, candidates: Sequence[Server], info: RoutingInfo, now: float
    ) -> list[Explained]:
        return finish(self.explain_in_steps(candidates, info, now))

    def explain_in_steps(
        self, candidates: Sequence[Server], info: RoutingInfo, now: float
    ) -> Steps[list[Explained]]:
        cache = self._cache(candidates, info.model, now)
        while not cache.is_complete:
            self._refresh(cache, now)
        matches = self.index.table.match(info.prompt.block_hashes, cache.everyone)
        levels, bonus, (loaded, spare, waits) = self._credit(cache, info, matches)
        scores = self._weigh(cache, info, matches, levels, bonus, waits)
        tokens, uncached, turns = self._prompt(info, matches)
        if not info.prompt.block_hashes:
            uncached = turns = 0.0
        asked = ScoredRequest(
            levels,
            bonus,
            tokens,
            uncached,
            turns,
            delay=uncached * self._swap_cost.per_token,
            swap=self._swap_cost.tokens if cache.is_adapter else 0.0,
            loaded=loaded,
            spare=spare,
            waits=waits,
        )
        table = ScoreTable(cache, asked, now)
        scores = scores[:]
        yield
        order = sorted(range(len(scores)), key=scores.__getitem__)
        found: list[Explained] = []
        for begin in range(0, len(order), EXPLAINED_AT_ONCE):
            yield
            found += [
                Explained(candidates[position], scores[position], ScoreTerms(table, position))
                for position in order[begin : begin + EXPLAINED_AT_ONCE]
            ]
        return found
