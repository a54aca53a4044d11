"""Other routers' policies, written from their public descriptions, for comparison only.

They see the same servers, the same health and the same metrics as ours; `scrape_interval` is how
old the metrics are where theirs are fresher. Sources: the defaults of vllm-router 0.1.17
(`router_args.py`) and its pull request 238 of 2026-09-04 (open), the llm-d scheduler's documented
scorers and its guide's optimized baseline, KubeAI's `PrefixHash`, LMetric (arXiv 2025), the
ancestor's `load_balancer.py`, production-stack's `routing_logic.py` and its pull request 1035 of
2026-08-09 (`loadaware`).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from vllm_router.routing.hashing import preference
from vllm_router.routing.policies.base import Choice, Policy, PolicySettings
from vllm_router.routing.prefix.index import BYTES_PER_TOKEN, PrefixIndex
from vllm_router.routing.prompt.blocks import blocks_in

if TYPE_CHECKING:
    from vllm_router.fleet.server import Lease, Server
    from vllm_router.routing.prompt.routing_info import RoutingInfo


class _Remembering(Policy):
    """Records the prompts sent to each server, up to `room` bytes per server."""

    needs_prompt = True
    room = 1 << 25

    def __init__(self, rng: Random, settings: PolicySettings = PolicySettings()) -> None:  # noqa: B008 (frozen)
        super().__init__(rng, settings)
        self.index = PrefixIndex(settings)
        self.index.table.entries_per_server = 1 << 40

    def matches(self, candidates: Sequence[Server], info: RoutingInfo) -> dict[Server, int]:
        return self.index.match(candidates, info.prompt)

    def pick(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Choice:
        return self.choose(candidates, info, now), None

    def choose(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Server:
        raise NotImplementedError

    def leased(self, lease: Lease, note: object, info: RoutingInfo, now: float) -> None:
        bit = self.index.bit(lease.server)
        self.index.table.entries_per_server = 1 << 40
        self.index.table.insert(info.prompt.block_hashes, bit, self.room, now)

    def lowest(self, scores: Sequence[tuple[float, Server]]) -> Server:
        best = min(score for score, _ in scores)
        return self.rng.choice([server for score, server in scores if score == best])


class LeastInFlight(_Remembering):
    """Own requests in flight over capacity; no metrics, no cache."""

    name = "least-in-flight"
    needs_prompt = False

    def choose(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Server:
        return self.lowest([(s.in_flight / s.capacity, s) for s in candidates])

    def leased(self, lease: Lease, note: object, info: RoutingInfo, now: float) -> None:
        pass


class Ancestor(LeastInFlight):
    """Metrics as they were scraped; at random among all below 0.5, else the lowest."""

    name = "ancestor"

    def choose(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Server:
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
    queue while loads differ by more than 64 requests and 1.5 times.
    """

    name = "cache_aware"
    threshold, absolute, relative = 0.3, 64, 1.5

    def choose(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Server:
        loads = [server.in_flight for server in candidates]
        if max(loads) - min(loads) > self.absolute and max(loads) > self.relative * min(loads):
            return self.lowest([(server.in_flight, server) for server in candidates])
        matches = self.matches(candidates, info)
        if matches and info.prompt.size:
            best = max(matches, key=lambda server: matches[server])
            if matches[best] > self.threshold * info.prompt.size:
                return best
        held = self.index.table.held
        return self.lowest([(held(self.index.bit(server)), server) for server in candidates])


class CacheAwarePerRequest(CacheAware):
    """vllm-router's pull request 238: only the load of the server with the match is compared with
    the least; other servers' load does not take the affinity away.
    """

    name = "cache_aware-238"

    def choose(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Server:
        loads = [(server.in_flight, server) for server in candidates]
        matches = self.matches(candidates, info)
        if matches and info.prompt.size:
            best = max(matches, key=lambda server: matches[server])
            least = min(load for load, _ in loads)
            hot = best.in_flight - least > self.absolute and best.in_flight > self.relative * least
            if matches[best] > self.threshold * info.prompt.size and not hot:
                return best
        return self.lowest(loads)


class LoadAware(_Remembering):
    """production-stack's `loadaware`: the cached part of the prompt, less `beta` times the load
    relative to the mean. Its caches come from LMCache's controller, here from the record.
    """

    name = "loadaware"
    beta = 1.0

    def choose(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Server:
        mean = sum(server.in_flight for server in candidates) / len(candidates)
        matches = self.matches(candidates, info)
        size = max(1, info.prompt.size)
        return self.lowest(
            [
                (
                    self.beta * (server.in_flight - mean) / max(1.0, mean)
                    - matches.get(server, 0) / size,
                    server,
                )
                for server in candidates
            ]
        )


class LlmdBlend(_Remembering):
    """llm-d's default scorers: queue 2, KV use 2, prefix 3, each from 0 to 1; the highest sum."""

    name = "llm-d"
    scrape_interval = 0.05

    def choose(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Server:
        queues = [s.metrics.waiting or 0.0 if s.metrics else 0.0 for s in candidates]
        least, most = min(queues), max(queues)
        pieces = max(1, blocks_in(info.prompt.size))
        matches = self.matches(candidates, info)
        scored = []
        for server, queue in zip(candidates, queues, strict=True):
            score = 2.0 * ((most - queue) / (most - least) if most > least else 1.0)
            score += 2.0 * (1.0 - (server.metrics.kv_usage or 0.0 if server.metrics else 0.0))
            score += 3.0 * blocks_in(matches.get(server, 0)) / pieces
            scored.append((-score, server))
        return self.lowest(scored)


class LoadAwarePrefix(_Remembering):
    """llm-d's filter: the longest match among servers whose queue is short; else the least load."""

    name = "prefix-threshold"
    scrape_interval = 0.05

    def choose(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Server:
        short = [s for s in candidates if not s.metrics or (s.metrics.waiting or 0.0) < 5]
        matches = self.matches(short, info) if short else {}
        longest = max(matches.values(), default=0)
        if longest > 0.5 * info.prompt.size:
            holders = [(s.load, s) for s in short if matches.get(s) == longest]
            return self.lowest(holders)
        return self.lowest([(server.load, server) for server in short or candidates])


class _Queueing(_Remembering):
    """Estimates the prompt bytes sent to each server that are not computed yet."""

    def __init__(self, rng: Random, settings: PolicySettings = PolicySettings()) -> None:  # noqa: B008 (frozen)
        super().__init__(rng, settings)
        self._queued: dict[Server, float] = {}

    def queued(self, server: Server) -> float:
        return self._queued.get(server, 0.0)

    def leased(self, lease: Lease, note: object, info: RoutingInfo, now: float) -> None:
        server = lease.server
        new = info.prompt.size - self.index.matched_bytes(server, info.prompt)
        self._queued[server] = self.queued(server) + new
        lease.reservation = float(new)
        super().leased(lease, note, info, now)

    def first_byte(self, lease: Lease) -> None:
        if isinstance(lease.reservation, float):
            self._queued[lease.server] -= lease.reservation
            lease.reservation = None

    def ended(self, lease: Lease, now: float, *, failed: bool, refused: bool = False) -> None:
        self.first_byte(lease)


class LMetric(_Queueing):
    """Tokens to be computed, queued ones included, times requests there: no weights to tune."""

    name = "lmetric"

    def choose(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Server:
        matches = self.matches(candidates, info)
        size = info.prompt.size
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
    rest, the fewest tokens to be computed.
    """

    name = "llm-d-sticky"
    sticky_from, penalty = 0.8, 18.0 * 15_928 * BYTES_PER_TOKEN

    def choose(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Server:
        matches = self.matches(candidates, info)
        pieces = max(1, blocks_in(info.prompt.size))
        sticky = [
            server
            for server in candidates
            if blocks_in(matches.get(server, 0)) / pieces >= self.sticky_from
        ]
        others = [self.queued(server) for server in candidates if server not in sticky]
        if sticky and others:
            late = min(map(self.queued, sticky)) - min(others)
            sticky = sticky if late <= self.penalty else []
        return self.lowest([(self.queued(s) - matches.get(s, 0), s) for s in sticky or candidates])


class Chwbl(_Remembering):
    """Consistent hashing with bounded loads as in KubeAI: by the beginning of the first question,
    which is the conversation here; the next server where this one has more than 1.25 times the
    mean of the requests in flight.
    """

    name = "chwbl"
    bound = 1.25

    def key(self, info: RoutingInfo) -> int:
        return info.prompt.conversation

    def choose(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Server:
        mean = (sum(server.in_flight for server in candidates) + 1) / len(candidates)
        order = preference(self.key(info), candidates)
        return next((s for s in order if s.in_flight <= self.bound * mean), order[0])

    def leased(self, lease: Lease, note: object, info: RoutingInfo, now: float) -> None:
        pass


class ChwblPrefix(Chwbl):
    """The same by the beginning of the prompt, so that requests with one system prompt meet."""

    name = "chwbl-prefix"

    def key(self, info: RoutingInfo) -> int:
        prompt = info.prompt
        return prompt.block_hashes[0] if prompt.block_hashes else prompt.conversation


class PrefixOnly(_Remembering):
    """production-stack's `prefixaware`: the longest match, whatever its load."""

    name = "prefix-only"

    def choose(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Server:
        matches = self.matches(candidates, info)
        longest = max(matches.values(), default=0)
        return self.rng.choice([s for s in candidates if matches.get(s, 0) == longest])


RIVALS: dict[str, type[Policy]] = {
    rival.name: rival
    for rival in (
        LeastInFlight, Ancestor, CacheAware, CacheAwarePerRequest, Chwbl, ChwblPrefix, LlmdBlend,
        LlmdSticky, LoadAware, LoadAwarePrefix, LMetric, PrefixOnly,
    )
}  # fmt: skip
