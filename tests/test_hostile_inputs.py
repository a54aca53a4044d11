"""No bytes from a client or a server hold up the others, fill the memory, or break anything.

To add an input: a row in one of the tables (see `hostile.Hostile`). `pytest -rP` shows the worst
stall of every row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from hostile import FRONTS, Hostile, Lab, lab
from hostile_bodies import BODIES
from hostile_servers import SERVERS
from mock_process import mock_processes


def head(method: str, path: str, *fields: str, version: str = "1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: a", *fields]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def post(path: str, body: bytes, *fields: str, kind: str = "application/json") -> bytes:
    length = f"Content-Length: {len(body)}"
    return head("POST", path, f"Content-Type: {kind}", length, *fields) + body


# -- HTTP/1.1 ----------------------------------------------------------------------------------

HTTP1 = [
    Hostile("nothing, and it leaves", b""),
    Hostile("half a head", b"POST / HTTP/1.1\r\nHost: a\r\n"),
    Hostile("a head without an end", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 50_000, b" 431 ", True),
    Hostile("a line without an end", b"GET /" + b"a" * 1_000_000, b" 431 ", True),
    Hostile("10 000 fields", head("GET", "/livez", *["a: b"] * 10_000), b" 200 .*alive"),
    Hostile("empty lines only", b"\r\n" * 200_000),
    Hostile("zeros", bytes(1_000_000), b" (400|431) ", True),
]


TABLES = {"http1": HTTP1, "bodies": BODIES, "servers": SERVERS}
ROWS = [
    pytest.param(front, row, id=f"{front}{'-tls' * row.tls}-{table}: {row.name}")
    for front in FRONTS
    for tls in (False, True)
    for table, rows in TABLES.items()
    for row in rows
    if front in row.fronts and row.tls == tls
]


class Labs:
    """One lab at a time: the rows are in the order of the labs."""

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
def test_hostile_input_hurts_nothing(labs: Labs, front: str, row: Hostile):
    there = labs.get(front, tls=row.tls)
    there.run(row)
    print(f"worst stall: {there.stalls[row.name]}")
