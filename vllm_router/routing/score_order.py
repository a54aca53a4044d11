"""The candidates of a large fleet in the order of their scores, so that a pick looks at a few.

Scoring a thousand servers takes half a millisecond. The order changes with a request for one or
two servers, which takes some microseconds.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from random import Random

Key = tuple[float, float, int]
"""Score, a random number that orders equals, and the position of the candidate."""


class ScoreOrder:
    """Positions of candidates by score, the lowest first, equals in random order."""

    __slots__ = ("_keys", "_rng", "_sorted")

    def __init__(self, scores: Sequence[float]) -> None:
        # Its own generator, seeded once: an order is random, but not what policies draw.
        self._rng = Random(len(scores))
        self._keys: list[Key] = []
        self._sorted: list[Key] = []
        self.rebuild(scores)

    def rebuild(self, scores: Sequence[float]) -> None:
        """Take new scores for all positions."""
        draw = self._rng.random
        self._keys = [(score, draw(), position) for position, score in enumerate(scores)]
        self._sorted = sorted(self._keys)

    def change(self, position: int, score: float) -> None:
        """Take a new score. O(log n), and a move of memory."""
        old = self._keys[position]
        if old[0] == score:
            return
        self._keys[position] = new = (score, self._rng.random(), position)
        del self._sorted[bisect_left(self._sorted, old)]
        insort(self._sorted, new)

    def lowest(self, count: int) -> list[int]:
        """The positions with the lowest scores."""
        return [position for _, _, position in self._sorted[:count]]
