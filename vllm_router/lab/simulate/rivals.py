"""Other routers' policies, written from their public descriptions, for comparison only.

They see the same servers, the same health and the same metrics as ours; `scrape_interval` is how
old the metrics are where theirs are fresher. Sources: the defaults of vllm-router 0.1.17
(`router_args.py`), the llm-d scheduler's documented scorers and its guide's optimized baseline,
KubeAI's `PrefixHash`, LMetric (arXiv 2025), the ancestor's `load_balancer.py`, production-stack's
`routing_logic.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from vllm_router.routing.hashing import preference
from vllm_router.routing.policies.base import Knobs, Policy
from vllm_router.routing.prefix.book import BYTES_PER_TOKEN, PrefixBook
from vllm_router.routing.prompt.pieces import pieces_in

if TYPE_CHECKING:
    from vllm_router.fleet.server import Lease, Server
    from vllm_router.routing.prompt.facts import Facts


class _Remembering(Policy):
    """Keeps a record of what was sent where, as large as `room` bytes per server."""

    needs_prompt = True
    room = 1 << 25

    def __init__(self, rng: Random, knobs: Knobs = Knobs()) -> None:  # noqa: B008 (frozen)
        super().__init__(rng, knobs)
        self.book = PrefixBook(knobs)
        self.book.table.entries_per_server = 1 << 40

    def matches(self, candidates: Sequence[Server], facts: Facts) -> dict[Server, int]:
        return self.book.match(candidates, facts.prompt)

    def leased(self, lease: Lease, facts: Facts, now: float) -> None:
        bit = self.book.bit(lease.server)
        self.book.table.entries_per_server = 1 << 40
        self.book.table.insert(facts.prompt.chain, bit, self.room, now)

    def lowest(self, scores: Sequence[tuple[float, Server]]) -> Server:
        best = min(score for score, _ in scores)
        return self.rng.choice([server for score, server in scores if score == best])


class LeastInFlight(_Remembering):
    """Own requests in flight over capacity; no metrics, no cache."""

    name = "least-in-flight"
    needs_prompt = False

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        return self.lowest([(s.in_flight / s.capacity, s) for s in candidates])

    def leased(self, lease: Lease, facts: Facts, now: float) -> None:
        pass


class Ancestor(LeastInFlight):
    """Metrics as they were scraped; at random among all below 0.5, else the lowest."""

    name = "ancestor"

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        scored = []
        for server in candidates:
            metrics = server.metrics
            running, waiting = (
                (metrics.running or 0.0, metrics.waiting or 0.0) if metrics else (0.0, 0.0)
            )
            scored.append(((running + 0.5 * waiting) / server.capacity, server))
        idle = [server for score, server in scored if score < 0.5]
        return self.rng.choice(idle) if idle else self.lowest(scored)


class CacheAware(_Remembering):
    """vllm-router's default: the longest match above 0.3, else the smallest tree; the shortest
    queue while loads differ by more than 64 requests and 1.5 times."""

    name = "cache_aware"
    threshold, absolute, relative = 0.3, 64, 1.5

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        loads = [server.in_flight for server in candidates]
        if max(loads) - min(loads) > self.absolute and max(loads) > self.relative * min(loads):
            return self.lowest([(server.in_flight, server) for server in candidates])
        matches = self.matches(candidates, facts)
        if matches and facts.prompt.size:
            best = max(matches, key=lambda server: matches[server])
            if matches[best] > self.threshold * facts.prompt.size:
                return best
        held = self.book.table.held
        return self.lowest([(held(self.book.bit(server)), server) for server in candidates])


class LlmdBlend(_Remembering):
    """llm-d's default scorers: queue 2, KV use 2, prefix 3, each from 0 to 1; the highest sum."""

    name = "llm-d"
    scrape_interval = 0.05

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        queues = [s.metrics.waiting or 0.0 if s.metrics else 0.0 for s in candidates]
        least, most = min(queues), max(queues)
        pieces = max(1, pieces_in(facts.prompt.size))
        matches = self.matches(candidates, facts)
        scored = []
        for server, queue in zip(candidates, queues, strict=True):
            score = 2.0 * ((most - queue) / (most - least) if most > least else 1.0)
            score += 2.0 * (1.0 - (server.metrics.kv_usage or 0.0 if server.metrics else 0.0))
            score += 3.0 * pieces_in(matches.get(server, 0)) / pieces
            scored.append((-score, server))
        return self.lowest(scored)


class LoadAwarePrefix(_Remembering):
    """llm-d's filter: the longest match among servers whose queue is short; else the least load."""

    name = "prefix-threshold"
    scrape_interval = 0.05

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        short = [s for s in candidates if not s.metrics or (s.metrics.waiting or 0.0) < 5]
        matches = self.matches(short, facts) if short else {}
        longest = max(matches.values(), default=0)
        if longest > 0.5 * facts.prompt.size:
            holders = [(s.load, s) for s in short if matches.get(s) == longest]
            return self.lowest(holders)
        return self.lowest([(server.load, server) for server in short or candidates])


class _Queueing(_Remembering):
    """Knows how much of the prompts sent to each server has not been computed yet, in bytes."""

    def __init__(self, rng: Random, knobs: Knobs = Knobs()) -> None:  # noqa: B008 (frozen)
        super().__init__(rng, knobs)
        self._queued: dict[Server, float] = {}

    def queued(self, server: Server) -> float:
        return self._queued.get(server, 0.0)

    def leased(self, lease: Lease, facts: Facts, now: float) -> None:
        server = lease.server
        new = facts.prompt.size - self.book.matched_bytes(server, facts.prompt)
        self._queued[server] = self.queued(server) + new
        lease.booking = float(new)
        super().leased(lease, facts, now)

    def first_byte(self, lease: Lease) -> None:
        if isinstance(lease.booking, float):
            self._queued[lease.server] -= lease.booking
            lease.booking = None

    def ended(self, lease: Lease, now: float, *, failed: bool, refused: bool = False) -> None:
        self.first_byte(lease)


class LMetric(_Queueing):
    """Tokens to be computed, queued ones included, times requests there: no weights to tune."""

    name = "lmetric"

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        matches = self.matches(candidates, facts)
        size = facts.prompt.size
        return self.lowest(
            [
                (
                    (self.queued(server) + size - matches.get(server, 0) + 1.0)
                    * (server.running + server.waiting + 1.0),
                    server,
                )
                for server in candidates
            ]
        )


class LlmdSticky(_Queueing):
    """llm-d's optimized baseline: servers that have 80 % of the prompt, unless they need 18 s
    longer than the others for what they have to compute (its default, at 15928 tokens/s); of the
    rest, the fewest tokens to be computed."""

    name = "llm-d-sticky"
    sticky_from, penalty = 0.8, 18.0 * 15_928 * BYTES_PER_TOKEN

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        matches = self.matches(candidates, facts)
        pieces = max(1, pieces_in(facts.prompt.size))
        sticky = [
            server
            for server in candidates
            if pieces_in(matches.get(server, 0)) / pieces >= self.sticky_from
        ]
        others = [self.queued(server) for server in candidates if server not in sticky]
        if sticky and others:
            late = min(map(self.queued, sticky)) - min(others)
            sticky = sticky if late <= self.penalty else []
        return self.lowest([(self.queued(s) - matches.get(s, 0), s) for s in sticky or candidates])


class Chwbl(_Remembering):
    """Consistent hashing with bounded loads as in KubeAI: by the beginning of the first question,
    which is the conversation here; the next server where this one has more than 1.25 times the
    mean of the requests in flight."""

    name = "chwbl"
    bound = 1.25

    def key(self, facts: Facts) -> int:
        return facts.prompt.conversation

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        mean = (sum(server.in_flight for server in candidates) + 1) / len(candidates)
        order = preference(self.key(facts), candidates)
        return next((s for s in order if s.in_flight <= self.bound * mean), order[0])

    def leased(self, lease: Lease, facts: Facts, now: float) -> None:
        pass


class ChwblPrefix(Chwbl):
    """The same by the beginning of the prompt, so that whoever shares a system prompt meets."""

    name = "chwbl-prefix"

    def key(self, facts: Facts) -> int:
        prompt = facts.prompt
        return prompt.chain[0] if prompt.chain else prompt.conversation


class PrefixOnly(_Remembering):
    """production-stack's `prefixaware`: the longest match, whatever its load."""

    name = "prefix-only"

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        matches = self.matches(candidates, facts)
        longest = max(matches.values(), default=0)
        return self.rng.choice([s for s in candidates if matches.get(s, 0) == longest])


RIVALS: dict[str, type[Policy]] = {
    rival.name: rival
    for rival in (
        LeastInFlight, Ancestor, CacheAware, Chwbl, ChwblPrefix, LlmdBlend, LlmdSticky,
        LoadAwarePrefix, LMetric, PrefixOnly,
    )
}  # fmt: skip
