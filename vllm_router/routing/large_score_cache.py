"""A ScoreCache for a large fleet, where a pick scores a few of the candidates. Pure."""

from __future__ import annotations

import math
from typing import TypeAlias

from vllm_router.routing.adapters import WAIT_PENALTY, Levels
from vllm_router.routing.score_cache import (
    AFFINITY_BONUS,
    DELAYED,
    HOT_MARGIN,
    HOT_SHARE,
    ScoreCache,
)

LARGE = 128
"""From so many candidates on, a pick does not score all of them, see `lowest_of_few`."""

SHORTLIST = 16
"""Candidates with the lowest base scores that are scored."""

HOLDERS = 8
"""Servers that are scored because they have blocks of a prompt, for each number of blocks."""

SEARCHED = 32
"""Candidates with the lowest base scores among which servers with a prompt's blocks are sought."""

FEW_BITS = (1 << 60) - 1
"""As many bits as Python computes with quickly."""

PromptTerms: TypeAlias = tuple[float, float, float, float]
"""The tokens of a prompt, then the arguments of `with_prompt`: uncached, turns, delay. A plain
tuple, for the reason given at `Choice`."""

_PER_CANDIDATE = (
    "_arrivals", "_crowdings", "_footprints", "_growths", "_loads", "_overflows",
    "_prompt_growths", "_rooms", "bases", "factors", "kv_tokens", "slow",
)  # fmt: skip
_OF_ALL = (
    "_log", "_overflow_seen", "_read", "_turn_at", "_turn_of", "has_peers", "latency", "load",
    "mean_footprint", "peer_ratio",
)  # fmt: skip
"""Figures that a cache takes over from the one before it."""


class LargeScoreCache(ScoreCache):
    """Keeps the candidates in the order of their base scores, and survives changes of the fleet."""

    __slots__ = ()

    is_large = True

    def adopt(self, before: LargeScoreCache) -> None:
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
        left = {before.candidates[position] for position in before.unmeasured}
        self.unmeasured = new | {self._positions[s] for s in left if s in self._positions}
        self._suspects = new | {self._positions[s] for s in suspects if s in self._positions}
        self.fresh_until = -math.inf if self._suspects else before.fresh_until
        self._known = True
        self._turn_of %= len(places)
        self.least_room, self._load_total = min(self._rooms), sum(self._loads)
        if self._order is not None:
            self._order.rebuild(self.bases)

    @property
    def offers_none(self) -> bool:
        assert self._order is not None
        return self.bases[self._order.lowest(1)[0]] == math.inf

    # -- a pick ----------------------------------------------------------------------------------

    def lowest_of_few(
        self,
        levels: Levels,
        bonus: int,
        prompt: PromptTerms,
        draw: float,
        waits: int = 0,
    ) -> list[int]:
        """The positions with the lowest score among the servers that have a chance.

        These are the ones with the lowest base scores, those with blocks of the prompt, and the
        affinity server: the others would need more requests, and compute as much. `draw` is a
        random number in [0, 1); `waits` as for `with_waits`.
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

    def _cached_at(self, levels: Levels, front: list[int], draw: float) -> dict[int, float]:
        """Cached tokens by position, for some servers of each level.

        `front` are the SEARCHED positions with the lowest base scores. As in `not_overloaded`,
        servers with much more load than the mean do not count.
        """
        hot = HOT_SHARE * (self._load_total / len(self._loads)) + HOT_MARGIN
        cached: dict[int, float] = {}
        for tokens, bits in levels:
            for position in self._some_of(bits, front, draw):
                if position not in cached and not self._is_overloaded(position, hot):
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
