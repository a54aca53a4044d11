"""Counters shared by several processes: memory with one row per process, no locks.

Only the owner writes its row; after its death, the parent clears it. All processes read all rows.
Each counted thing has a column, found by its key (such as a server's URL) in the header row, which
only the leader writes. A cell is one aligned word: a reader sees the value before or after a write,
never a mix. Sums over the rows may lag by microseconds.

Performs no I/O besides the mapping.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Iterable
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_router.runtime.workers.queue_board import Page

COLUMNS = 1024
"""Minimum number of columns. Unused memory is not allocated."""

HEADROOM = 4
"""Factor over the needs of the initial configuration, for later reloads."""

CONNECTIONS = 0
"""The column with the number of connections of a worker; it has no key."""

_WORD = 8
_UNASSIGNED = 0


def columns_for(counted: int) -> int:
    """The number of columns for a configuration with this many counter keys."""
    return max(COLUMNS, HEADROOM * (counted + 1))


class SharedCounters:
    """The shared memory of one router: a header row, then `rows` rows of counters.

    Row 0 belongs to the leader, row n to worker n.
    """

    def __init__(self, fileno: int, rows: int, columns: int = COLUMNS) -> None:
        """Map the memory of a descriptor, which the caller owns."""
        self.rows = rows
        self.columns = columns
        self._memory = mmap.mmap(fileno, (rows + 1) * columns * _WORD)
        words = memoryview(self._memory).cast("q")
        self._owners = words[:columns]
        self._cells = [words[columns * n : columns * (n + 1)] for n in range(1, rows + 1)]

    @staticmethod
    def create(rows: int, columns: int = COLUMNS) -> int:
        """Create a descriptor of zeroed memory; the caller closes it."""
        fileno = os.memfd_create("vllm-router board")
        os.ftruncate(fileno, (rows + 1) * columns * _WORD)
        return fileno

    def row(self, number: int) -> memoryview:
        """The row of one process."""
        return self._cells[number]

    def clear(self, number: int) -> None:
        """Reset the row of a process that has died."""
        self._cells[number][:] = memoryview(bytes(self.columns * _WORD)).cast("q")

    # -- columns ------------------------------------------------------------------------------

    def find(self, key: str) -> int | None:
        """The column of a key, or None."""
        return self.columns_of([key])[key]

    def columns_of(self, keys: Iterable[str]) -> dict[str, int | None]:
        """The columns of several keys; None for keys without one."""
        owned = {mark: column for column, mark in enumerate(self._owners.tolist()) if mark}
        return {key: owned.get(_mark(key)) for key in keys}

    def assign(self, key: str) -> int | None:
        """The column of a key, assigned if necessary; None if all are taken. Leader only."""
        return self.assign_all([key])[key]

    def assign_all(self, keys: Collection[str]) -> dict[str, int | None]:
        """The columns of keys, assigned if necessary; None where all are taken. Leader only."""
        found = self.columns_of(keys)
        free = iter(self._free())
        for key, column in found.items():
            if column is None:
                found[key] = column = next(free, None)
                if column is not None:
                    self._owners[column] = _mark(key)
        return found

    def room_for(self, keys: Collection[str]) -> int:
        """Number of these keys that could have columns if all other keys released theirs."""
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
            if mark == _UNASSIGNED and column != CONNECTIONS and column not in counted
        ]

    def _counted(self) -> set[int]:
        """The columns with a value other than zero in any row."""
        return {
            column for cells in self._cells for column, count in enumerate(cells.tolist()) if count
        }

    def keep(self, keys: set[str]) -> None:
        """Release the columns of all other keys. Leader only.

        A column that is not zero everywhere is not assigned again until it is.
        """
        kept = {_mark(key) for key in keys}
        for column, owner in enumerate(self._owners):
            if owner != _UNASSIGNED and owner not in kept:
                self._owners[column] = _UNASSIGNED


@lru_cache(maxsize=1 << 16)
def _mark(key: str) -> int:
    """A key as a word; a collision among 100 000 keys has probability 10^-9."""
    digest = blake2b(key.encode(), digest_size=_WORD).digest()
    return int.from_bytes(digest, "big", signed=True) or 1


class CounterView:
    """One process's view: its own row, and the sums of the others.

    `elsewhere[column]` is the sum over the other rows at the last `read_changes`. `queue_page` is
    where the releases of servers are noted for requests that wait in other processes, if they may.
    """

    queue_page: Page | None = None

    def __init__(self, board: SharedCounters, mine: int) -> None:
        """Clears this process's row."""
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
        """Read this column, too; columns right of the last watched one cost nothing."""
        if column >= self._width:
            more = bytes((column + 1 - self._width) * _WORD)
            self._width = column + 1
            self._others = [cells[: self._width] for cells in self._rows]
            self._seen = [seen + more for seen in self._seen or [b""] * len(self._rows)]

    def fewest(self, column: int) -> int:
        """The smallest current value of the other workers."""
        return min([cells[column] for cells in self._workers], default=0)

    def put(self, column: int, count: int) -> None:
        """Set this process's value."""
        self._own[column] = count

    def read_changes(self) -> list[tuple[int, int]]:
        """The columns whose sum over the other rows has changed, with the differences.

        Costs 0.5 µs per process for a thousand unchanged columns, and 30 ns per column otherwise.
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
