"""The longest cached prefix among the servers with an average load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING

from vllm_router.routing.policies.base import Choice, Explained, Policy, PolicySettings
from vllm_router.routing.prefix.index import PrefixIndex

if TYPE_CHECKING:
    from vllm_router.fleet.server import Lease, Server
    from vllm_router.routing.prompt.routing_info import RoutingInfo

BOUND = 1.25
"""Servers with more than BOUND times the mean load plus one request are excluded."""


class Prefix(Policy):
    """Simple and predictable: a load limit, then the longest match, then the lowest load.

    `adaptive` weighs both against each other and is better on every workload tried.
    """

    name = "prefix"
    needs_prompt = True

    def __init__(self, rng: Random, settings: PolicySettings = PolicySettings()) -> None:  # noqa: B008 (frozen)
        super().__init__(rng, settings)
        self._index = PrefixIndex(settings)

    def pick(self, candidates: Sequence[Server], info: RoutingInfo, now: float) -> Choice:
        self._index.follow(candidates, now)
        matched = self._index.match(candidates, info.prompt)
        limit = self._limit(candidates)
        best: list[Server] = []
        best_key = (float("inf"), float("inf"))
        for server in candidates:
            if server.load_estimate.effective > limit:
                continue
            key = (-float(matched.get(server, 0)), server.load_estimate.effective)
            if key < best_key:
                best, best_key = [server], key
            elif key == best_key:
                best.append(server)
        return (best[0] if len(best) == 1 else self.rng.choice(best)), None

    @staticmethod
    def _limit(candidates: Sequence[Server]) -> float:
        mean = sum(server.load_estimate.effective for server in candidates) / len(candidates)
        # Never below the lowest load: at least one server remains.
        return BOUND * mean + 1 / max(server.weighted_capacity for server in candidates)

    def leased(self, lease: Lease, note: object, info: RoutingInfo, now: float) -> None:
        prompt = info.prompt
        known = self._index.known_blocks(lease.server, prompt)
        lease.reservation = prompt, known
        self._index.insert(lease.server, prompt, now)
        if self.placements is not None and prompt.block_hashes:
            self.placements.placed(lease.server, prompt, known, now)

    def ended(self, lease: Lease, now: float, *, failed: bool, refused: bool = False) -> None:
        reservation, lease.reservation = lease.reservation, None
        if refused and isinstance(reservation, tuple):
            prompt, known = reservation
            self._index.unlearn(lease.server, prompt, known)
            if self.placements is not None:
                self.placements.withdrawn(lease.server, prompt, known)

    def placed_elsewhere(self, server: Server, hashes: Sequence[int], now: float) -> None:
        self._index.insert_blocks(server, hashes, now)

    def withdrawn_elsewhere(self, server: Server, hashes: Sequence[int]) -> None:
        self._index.remove_blocks(server, hashes)

    def blocks(self, most: int) -> Iterator[tuple[Server, Sequence[int]]]:
        return self._index.blocks(most)

    def forget(self, server: Server) -> None:
        self._index.forget(server)

    def formula(self) -> str:
        return "score = -cached bytes while load ≤ limit, else load; equals by load"

    def explain(
        self, candidates: Sequence[Server], info: RoutingInfo, now: float
    ) -> list[Explained]:
        self._index.follow(candidates, now)
        matched = self._index.match(candidates, info.prompt)
        limit = self._limit(candidates)
        rows = [
            Explained(
                server,
                server.load_estimate.effective
                if server.load_estimate.effective > limit
                else -float(matched.get(server, 0)),
                {
                    "cached_bytes": matched.get(server, 0),
                    "load": server.load_estimate.effective,
                    "limit": limit,
                },
            )
            for server in candidates
        ]
        return sorted(rows, key=lambda row: (row.score, row.parts["load"]))
