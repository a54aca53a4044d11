"""The candidates of a large fleet in the order of their scores, so that a pick looks at a few.

Scoring a thousand servers takes half a millisecond. The order changes with a request for one or
two servers, which takes some microseconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from random import Random

Key = tuple[float, float, int]
"""Score, a random number that orders equals, and the position of the candidate."""


class ScoreOrder:
    """Positions of candidates by score, the lowest first, equals in random order."""

    __slots__ = ("_keys", "_positions", "_rng", "_sorted")

    def __init__(self, scores: Sequence[float]) -> None:
        # Its own generator, seeded once: an order is random, but not what policies draw.
        self._rng = Random(len(scores))
        self._keys: list[Key] = []
        self._sorted: list[Key] = []
        self._positions: list[int] = []
        """The positions of `_sorted`, so that a pick copies the first ones at once."""
        self.rebuild(scores)

    def rebuild(self, scores: Sequence[float]) -> None:
        """Take new scores for all positions."""
        draw = self._rng.random
        self._keys = [(score, draw(), position) for position, score in enumerate(scores)]
        self._sorted = sorted(self._keys)
        self._positions = [position for _, _, position in self._sorted]

    def change(self, position: int, score: float) -> None:
        """Take a new score. O(log n), and a move of memory."""
        old = self._keys[position]
        if old[0] == score:
            return
        self._keys[position] = new = (score, self._rng.random(), position)
        place = bisect_left(self._sorted, old)
        del self._sorted[place], self._positions[place]
        place = bisect_left(self._sorted, new)
        self._sorted.insert(place, new)
        self._positions.insert(place, position)

    def lowest(self, count: int) -> list[int]:
        """The positions with the lowest scores."""
        return self._positions[:count]
