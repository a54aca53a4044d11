"""Counts that several processes keep together: shared memory, one row per process, no locks.

A row is written by its owner alone, or, when that has died, by the parent, who clears it. Everybody
reads all rows. What is counted has a column, found by a key (a server's URL, say) in the row of
owners, which only the leader writes. A cell is one aligned word, so a reader sees the count before
or the count after, never half of it; the sum over the rows may be some microseconds old.

Pure but for the memory itself.
"""

from __future__ import annotations

import mmap
import os
from hashlib import blake2b

COLUMNS = 1024
"""Things that can be counted at a time: four times the servers that a fleet is made for."""

CONNECTIONS = 0
"""The column of the connections that a worker has; it has no key."""

_WORD = 8
_ROW = COLUMNS * _WORD
_NOBODY = 0


class Board:
    """The shared memory of one router: a row of owners, then `rows` rows of counts.

    Of row 0 the leader is the owner, of row n worker n.
    """

    def __init__(self, fileno: int, rows: int) -> None:
        """Map the memory behind a descriptor, which stays the caller's."""
        self.rows = rows
        self._memory = mmap.mmap(fileno, (rows + 1) * _ROW)
        words = memoryview(self._memory).cast("q")
        self._owners = words[:COLUMNS]
        self._cells = [words[COLUMNS * n : COLUMNS * (n + 1)] for n in range(1, rows + 1)]

    @staticmethod
    def create(rows: int) -> int:
        """A descriptor of fresh memory, all zero; whoever calls closes it."""
        fileno = os.memfd_create("vllm-router board")
        os.ftruncate(fileno, (rows + 1) * _ROW)
        return fileno

    def row(self, number: int) -> memoryview:
        """The counts of one process."""
        return self._cells[number]

    def clear(self, number: int) -> None:
        """Whoever wrote the row has died: nothing is counted there any more."""
        self._cells[number][:] = memoryview(bytes(_ROW)).cast("q")

    # -- columns ------------------------------------------------------------------------------

    def find(self, key: str) -> int | None:
        """The column of a key; None if it has none."""
        try:
            return self._owners.tolist().index(_mark(key))
        except ValueError:
            return None

    def assign(self, key: str) -> int | None:
        """The column of a key, a new one if need be; None if all are taken. For the leader."""
        found = self.find(key)
        if found is not None:
            return found
        for column, owner in enumerate(self._owners):
            if column == CONNECTIONS:
                continue
            if owner == _NOBODY and not any(cells[column] for cells in self._cells):
                self._owners[column] = _mark(key)
                return column
        return None

    def keep(self, keys: set[str]) -> None:
        """Free the columns of all other keys. For the leader.

        One that is still counted in somewhere is not given to another key before it is zero.
        """
        kept = {_mark(key) for key in keys}
        for column, owner in enumerate(self._owners):
            if owner != _NOBODY and owner not in kept:
                self._owners[column] = _NOBODY


def _mark(key: str) -> int:
    """A key as a word; the chance that two of a thousand are the same is 1 in 10^13."""
    digest = blake2b(key.encode(), digest_size=_WORD).digest()
    return int.from_bytes(digest, "big", signed=True) or 1


class Sums:
    """One process's view of the board: what it counts, and what the others do.

    `elsewhere[column]` is the sum over the others' rows at the last `look`.
    """

    def __init__(self, board: Board, mine: int) -> None:
        """Our row begins with zeros."""
        self.board = board
        self.elsewhere = [0] * COLUMNS
        self._own = board.row(mine)
        self._rows = [board.row(number) for number in range(board.rows) if number != mine]
        self._workers = [board.row(number) for number in range(1, board.rows) if number != mine]
        self._others: list[memoryview] = []
        self._seen: list[bytes] = []
        self._width = 0
        board.clear(mine)
        self.watch(0)

    def watch(self, column: int) -> None:
        """Look at this column, too; those right of all that are watched cost nothing."""
        if column >= self._width:
            more = bytes((column + 1 - self._width) * _WORD)
            self._width = column + 1
            self._others = [cells[: self._width] for cells in self._rows]
            self._seen = [seen + more for seen in self._seen or [b""] * len(self._rows)]

    def fewest(self, column: int) -> int:
        """The smallest count of the others, the leader aside; as it is now."""
        return min([cells[column] for cells in self._workers], default=0)

    def put(self, column: int, count: int) -> None:
        """Show the others a count of ours."""
        self._own[column] = count

    def look(self) -> list[tuple[int, int]]:
        """The columns whose sum over the others' rows has changed, and by how much.

        0.5 µs for each other process where nothing has changed, else 30 ns more for each column.
        """
        changes: list[tuple[int, int]] = []
        seen = self._seen
        for number, cells in enumerate(self._others):
            now = cells.tobytes()
            before = seen[number]
            if now != before:
                seen[number] = now
                self._compare(before, now, changes)
        return changes

    def _compare(self, before: bytes, now: bytes, changes: list[tuple[int, int]]) -> None:
        elsewhere = self.elsewhere
        pairs = zip(memoryview(before).cast("q"), memoryview(now).cast("q"), strict=True)
        for column, (old, new) in enumerate(pairs):
            if old != new:
                elsewhere[column] += new - old
                changes.append((column, new - old))
