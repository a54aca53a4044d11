"""The candidates of a large fleet in the order of their scores, so that a pick looks at a few.

Scoring a thousand servers takes half a millisecond. The order changes with a request for one or
two servers, which takes some microseconds.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from random import Random

SPREAD = 1e-9
"""Scores that differ by less count as equal. They are in random order: a random part of this is
added to each."""


class ScoreOrder:
    """Positions of candidates by score, the lowest first, equals in random order.

    Arrays hold the numbers themselves: lists of a thousand objects, spread over the memory, take
    twice the time of a pick whose data the processor has to fetch.
    """

    __slots__ = ("_draw", "_keys", "_positions", "_sorted")

    def __init__(self, scores: Sequence[float]) -> None:
        # Its own generator, seeded once: an order is random, but not what policies draw.
        self._draw = Random(len(scores)).random
        self.rebuild(scores)

    def rebuild(self, scores: Sequence[float]) -> None:
        """Take new scores for all positions."""
        draw = self._draw
        self._keys = keys = array("d", [score + SPREAD * draw() for score in scores])
        positions = sorted(range(len(keys)), key=keys.__getitem__)
        self._sorted = array("d", [keys[position] for position in positions])
        self._positions = array("i", positions)

    def change(self, position: int, score: float) -> None:
        """Take a new score. O(log n), and a move of memory; O(n) among equal keys."""
        keys, ordered, positions = self._keys, self._sorted, self._positions
        key = keys[position]
        if score == key or score <= key < score + SPREAD:
            return
        place = bisect_left(ordered, key)
        if positions[place] != position:  # infinite scores have equal keys
            place = positions.index(position, place)
        del ordered[place], positions[place]
        keys[position] = key = score + SPREAD * self._draw()
        place = bisect_left(ordered, key)
        ordered.insert(place, key)
        positions.insert(place, position)

    def lowest(self, count: int) -> list[int]:
        """The positions with the lowest scores."""
        return self._positions[:count].tolist()
