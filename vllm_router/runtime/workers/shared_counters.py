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
from collections.abc import Collection, Iterable
from functools import lru_cache
from hashlib import blake2b

COLUMNS = 1024
"""Things that can be counted at a time, at least. Memory that is not used is not taken."""

HEADROOM = 4
"""So many times what the configuration at the start needs: reloads may add."""

CONNECTIONS = 0
"""The column of the connections that a worker has; it has no key."""

_WORD = 8
_NOBODY = 0


def columns_for(counted: int) -> int:
    """The columns of a board for a configuration with so many things to count."""
    return max(COLUMNS, HEADROOM * (counted + 1))


class SharedCounters:
    """The shared memory of one router: a row of owners, then `rows` rows of counts.

    Of row 0 the leader is the owner, of row n worker n.
    """

    def __init__(self, fileno: int, rows: int, columns: int = COLUMNS) -> None:
        """Map the memory behind a descriptor, which stays the caller's."""
        self.rows = rows
        self.columns = columns
        self._memory = mmap.mmap(fileno, (rows + 1) * columns * _WORD)
        words = memoryview(self._memory).cast("q")
        self._owners = words[:columns]
        self._cells = [words[columns * n : columns * (n + 1)] for n in range(1, rows + 1)]

    @staticmethod
    def create(rows: int, columns: int = COLUMNS) -> int:
        """A descriptor of fresh memory, all zero; the caller closes it."""
        fileno = os.memfd_create("vllm-router board")
        os.ftruncate(fileno, (rows + 1) * columns * _WORD)
        return fileno

    def row(self, number: int) -> memoryview:
        """The counts of one process."""
        return self._cells[number]

    def clear(self, number: int) -> None:
        """Whoever wrote the row has died: nothing is counted there any more."""
        self._cells[number][:] = memoryview(bytes(self.columns * _WORD)).cast("q")

    # -- columns ------------------------------------------------------------------------------

    def find(self, key: str) -> int | None:
        """The column of a key; None if it has none."""
        return self.places([key])[key]

    def places(self, keys: Iterable[str]) -> dict[str, int | None]:
        """The columns of keys, each None if it has none."""
        owned = {mark: column for column, mark in enumerate(self._owners.tolist()) if mark}
        return {key: owned.get(_mark(key)) for key in keys}

    def assign(self, key: str) -> int | None:
        """The column of a key, a new one if need be; None if all are taken. For the leader."""
        return self.assign_all([key])[key]

    def assign_all(self, keys: Collection[str]) -> dict[str, int | None]:
        """The columns of keys, new ones where need be, None where none is left. For the leader."""
        found = self.places(keys)
        free = iter(self._free())
        for key, column in found.items():
            if column is None:
                found[key] = column = next(free, None)
                if column is not None:
                    self._owners[column] = _mark(key)
        return found

    def room_for(self, keys: Collection[str]) -> int:
        """How many of these could have columns, once those of all other keys are given up."""
        kept = {_mark(key) for key in keys}
        counted = self._counted()
        return sum(
            column != CONNECTIONS and (mark in kept or column not in counted)
            for column, mark in enumerate(self._owners.tolist())
        )

    def _free(self) -> list[int]:
        counted = self._counted()
        return [
            column
            for column, mark in enumerate(self._owners.tolist())
            if mark == _NOBODY and column != CONNECTIONS and column not in counted
        ]

    def _counted(self) -> set[int]:
        """The columns in which a process counts something."""
        return {
            column for cells in self._cells for column, count in enumerate(cells.tolist()) if count
        }

    def keep(self, keys: set[str]) -> None:
        """Free the columns of all other keys. For the leader.

        One that is still counted in somewhere is not given to another key before it is zero.
        """
        kept = {_mark(key) for key in keys}
        for column, owner in enumerate(self._owners):
            if owner != _NOBODY and owner not in kept:
                self._owners[column] = _NOBODY


@lru_cache(maxsize=1 << 16)
def _mark(key: str) -> int:
    """A key as a word; the chance that two of 100 000 are the same is 1 in 10^9."""
    digest = blake2b(key.encode(), digest_size=_WORD).digest()
    return int.from_bytes(digest, "big", signed=True) or 1


class CounterView:
    """One process's view of the board: what it counts, and what the others do.

    `elsewhere[column]` is the sum over the others' rows at the last `look`.
    """

    def __init__(self, board: SharedCounters, mine: int) -> None:
        """Our row begins with zeros."""
        self.board = board
        self.elsewhere = [0] * board.columns
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

        For each other process 0.5 µs for a thousand columns where nothing has changed, else 30 ns
        more for each column.
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
