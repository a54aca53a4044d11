"""The longest cached prefix among the servers that are not busier than the rest."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from vllm_router.routing.policies.base import Explained, Knobs, Policy
from vllm_router.routing.prefix.book import PrefixBook

if TYPE_CHECKING:
    from vllm_router.fleet.server import Lease, Server
    from vllm_router.routing.prompt.facts import Facts

BOUND = 1.25
"""Servers with more than this times the mean load, plus one request, are left out."""


class Prefix(Policy):
    """Simple and predictable: a load gate, then the longest match, then the lowest load.

    `adaptive` weighs the two against each other instead, and is better on every workload tried.
    """

    name = "prefix"
    needs_prompt = True

    def __init__(self, rng: Random, knobs: Knobs = Knobs()) -> None:  # noqa: B008 (frozen)
        super().__init__(rng, knobs)
        self._book = PrefixBook(knobs)

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        self._book.follow(candidates, now)
        matched = self._book.match(candidates, facts.prompt)
        limit = self._limit(candidates)
        best: list[Server] = []
        best_key = (float("inf"), float("inf"))
        for server in candidates:
            if server.burden > limit:
                continue
            key = (-float(matched.get(server, 0)), server.burden)
            if key < best_key:
                best, best_key = [server], key
            elif key == best_key:
                best.append(server)
        return best[0] if len(best) == 1 else self.rng.choice(best)

    @staticmethod
    def _limit(candidates: Sequence[Server]) -> float:
        mean = sum(server.burden for server in candidates) / len(candidates)
        # Never below the lowest load: somebody is always left.
        return BOUND * mean + 1 / max(server.share for server in candidates)

    def leased(self, lease: Lease, facts: Facts, now: float) -> None:
        prompt = facts.prompt
        lease.booking = prompt, self._book.known_pieces(lease.server, prompt)
        self._book.insert(lease.server, prompt, now)

    def ended(self, lease: Lease, now: float, *, failed: bool, refused: bool = False) -> None:
        booking, lease.booking = lease.booking, None
        if refused and isinstance(booking, tuple):
            prompt, known = booking
            self._book.unlearn(lease.server, prompt, known)

    def forget(self, server: Server) -> None:
        self._book.forget(server)

    def formula(self) -> str:
        return "score = -cached bytes while load ≤ limit, else load; equals by load"

    def explain(self, candidates: Sequence[Server], facts: Facts, now: float) -> list[Explained]:
        matched = self._book.match(candidates, facts.prompt)
        limit = self._limit(candidates)
        rows = [
            Explained(
                server,
                server.burden if server.burden > limit else -float(matched.get(server, 0)),
                {"cached_bytes": matched.get(server, 0), "load": server.burden, "limit": limit},
            )
            for server in candidates
        ]
        return sorted(rows, key=lambda row: (row.score, row.parts["load"]))
