"""`./scripts/stalls`: the longest turn of the event loop for each hostile input, in CPU time."""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
import time
from pathlib import Path

from support import hostile, router_process
from support.hostile import FRONTS, Hostile, Lab, lab
from support.hostile_tables import TABLES
from support.mock_process import mock_processes

HERE = Path(__file__).parents[2]
PATIENCE = 10.0
"""Seconds until an answer is given up: another tree may never give it."""

IDLE = "no input: the other client alone"

_SITE = '''
import os, time, trio

class Turns(trio.abc.Instrument):
    """Prints the CPU time of each turn of 2 ms and more."""

    last = None

    def after_io_wait(self, timeout):
        now = time.thread_time()
        if self.last is not None and now - self.last > 0.002:
            os.write(2, b"TURN %.4f\\n" % (now - self.last))
        self.last = now

def run(*arguments, run=trio.run, instruments=(), **options):
    return run(*arguments, instruments=[*instruments, Turns()], **options)

trio.run = run
'''
_TURN = re.compile(r"TURN ([\d.]+)")


class _Router(hostile.Router):
    """A router of the tree `hostile.Router.tree`, which prints its turns."""

    tree = HERE

    @property
    def environment(self) -> dict[str, str]:  # type: ignore[override]
        return {"PYTHONPATH": f"{hostile.Router.site}:{self.tree}"}


def turns(there: Lab, since: int) -> list[float]:
    """The long turns of all processes in the log from this line on, in seconds of CPU time."""
    return [float(found[1]) for line in there.router.log[since:] if (found := _TURN.search(line))]


def worst(there: Lab, row: Hostile | None) -> float:
    """The longest turn while a row is sent, in seconds; without a row for some idle seconds."""
    mark = len(there.router.log)
    there.bystander.begin(lambda: 0.0)
    # What another tree answers, and whether it survives, is not judged here.
    with contextlib.suppress(AssertionError, OSError, TimeoutError):
        if row is None:
            time.sleep(5)
        elif row.play is not None:
            row.play(there)
        else:
            pieces = row.sends if isinstance(row.sends, bytes) else row.sends()
            there.exchange(pieces, answer=row.answer, closed=row.closed)
    with contextlib.suppress(AssertionError, OSError):
        there.settle()
        there.bystander.end()
    return max(turns(there, mark), default=0.0)


def measure(tree: Path, front: str, tables: list[str]) -> dict[str, float]:
    """The longest turn of each row in seconds, by name."""
    hostile._SITE, hostile.PATIENCE = _SITE, PATIENCE
    router_process._ROOT = _Router.tree = tree
    hostile.Router, kept = _Router, hostile.Router  # type: ignore[misc]
    found: dict[str, float] = {}
    rows = {f"{table}: {row.name}": row for table in tables for row in TABLES[table]}
    try:
        with mock_processes(2, "--model", "m", "--ttft", "0", "--token-delay", "0") as mocks:
            for tls in (False, True):
                these = {name: row for name, row in rows.items() if row.tls == tls}
                if not these:
                    continue
                with (
                    tempfile.TemporaryDirectory() as directory,
                    contextlib.suppress(AssertionError),  # the log of another tree
                    lab(front, [mock.url for mock in mocks], Path(directory), tls=tls) as there,
                ):
                    if not tls:
                        found[IDLE] = worst(there, None)
                    for name, row in these.items():
                        found[name] = worst(there, row)
    finally:
        hostile.Router = kept  # type: ignore[misc]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/stalls", description=__doc__)
    parser.add_argument("tree", nargs="?", type=Path, help="another tree to measure first")
    parser.add_argument("--front", choices=FRONTS, default="lane")
    parser.add_argument("--table", nargs="*", choices=TABLES, default=list(TABLES))
    options = parser.parse_args()
    if options.tree is not None and not options.tree.is_dir():
        parser.error(f"expected the directory of another tree, got {options.tree}")
    trees = [*([options.tree.resolve()] if options.tree else []), HERE]
    columns = [measure(tree, options.front, options.table) for tree in trees]
    print("| Input | " + " | ".join(f"{tree.name}, ms" for tree in trees) + " |")
    print("|---|" + "--:|" * len(trees))
    for name in columns[-1]:
        cells = [f"{one[name] * 1000:.0f}" if name in one else "-" for one in columns]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
