"""No bytes from a client or a server delay the others, fill the memory, or break anything.

To add an input, add a row to one of the tables (see `hostile.Hostile`). `pytest -rP` shows the
worst stall of every row, HOSTILE_INPUTS=all sends every row to every kind of front.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from support.hostile import FRONTS, Hostile, Lab, lab
from support.hostile_tables import TABLES
from support.mock_process import mock_processes

EVERYTHING = os.environ.get("HOSTILE_INPUTS") == "all"


def fronts_for(row: Hostile, number: int) -> set[str]:
    """The kinds of front for a row in this run."""
    if EVERYTHING:
        return set(FRONTS)
    if row.fronts:
        return set(row.fronts)
    return {"lane", "workers" if number % 2 else "hypercorn"}


ROWS = [
    pytest.param(front, row, id=f"{front}{'-tls' * row.tls}-{table}: {row.name}")
    for front in FRONTS
    for tls in (False, True)
    for table, rows in TABLES.items()
    for number, row in enumerate(rows)
    if front in fronts_for(row, number) and row.tls == tls
]


class Labs:
    """One lab at a time: rows are sorted by lab."""

    def __init__(self, directories: pytest.TempPathFactory) -> None:
        self._directories = directories
        self._servers = contextlib.ExitStack()
        self._stack = contextlib.ExitStack()
        self._urls: list[str] = []
        self._current: tuple[str, bool] | None = None
        self._lab: Lab | None = None

    def get(self, front: str, *, tls: bool) -> Lab:
        if not self._urls:
            mocks = mock_processes(2, "--model", "m", "--ttft", "0", "--token-delay", "0")
            self._urls = [mock.url for mock in self._servers.enter_context(mocks)]
        if self._lab is None or self._current != (front, tls):
            self._stack.close()
            directory = self._directories.mktemp(front)
            self._lab = self._stack.enter_context(lab(front, self._urls, directory, tls=tls))
            self._current = front, tls
        return self._lab

    def close(self) -> None:
        try:
            self._stack.close()
        finally:
            self._servers.close()


@pytest.fixture(scope="module")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Labs]:
    with contextlib.closing(Labs(tmp_path_factory)) as found:
        yield found


@pytest.mark.parametrize(("front", "row"), ROWS)
def test_hostile_input_is_harmless(labs: Labs, front: str, row: Hostile):
    there = labs.get(front, tls=row.tls)
    there.run(row)
    print(f"worst stall: {there.stalls[row.name]}")
