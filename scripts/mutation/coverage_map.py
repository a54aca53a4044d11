"""Maps tests to the lines of the decision modules that they run, and to their durations.

The map is kept in a file; a test file is mapped again when it has changed, and all of them when one
of the modules or of the shared test files has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import coverage
import pytest


@dataclass
class Mapped:
    """One test: whether it passed, its seconds, and the lines it runs, by module."""

    passed: bool = False
    seconds: float = 0.0
    lines: dict[str, list[int]] = field(default_factory=dict)


class CoverageMap:
    """`tests` maps the node ids of `items`."""

    def __init__(self, kept: Path, root: Path, modules: Iterable[Path]) -> None:
        self._kept = kept
        self._root = root
        self._modules = tuple(modules)
        self.tests: dict[str, Mapped] = {}

    def make(self, items: list[pytest.Item]) -> None:
        """Run the tests that are not mapped yet, in a process of their own."""
        common = _hash(
            [*self._modules, *(self._root / "tests/support").glob("*.py")],
            (self._root / "tests/conftest.py").read_bytes(),
        )
        stored = self._load(common)
        by_file: dict[Path, list[pytest.Item]] = defaultdict(list)
        for item in items:
            by_file[item.path].append(item)
        hashes = {str(path.relative_to(self._root)): _hash([path]) for path in by_file}
        fresh = {
            name for name, digest in hashes.items() if stored.get(name, {}).get("hash") == digest
        }
        for name in fresh:
            for nodeid, test in stored[name]["tests"].items():
                self.tests[nodeid] = Mapped(**test)
        self._kept.parent.mkdir(exist_ok=True)
        for path, tests in by_file.items():
            name = str(path.relative_to(self._root))
            if name in fresh:
                continue
            print(f"mapping {len(tests)} tests of {name}", flush=True)
            mapped = self._run(tests)
            self.tests |= mapped
            as_stored = {nodeid: vars(test) for nodeid, test in mapped.items()}
            stored[name] = {"hash": hashes[name], "tests": as_stored}
            self._kept.write_text(json.dumps({"common": common, "files": stored}))

    def _load(self, common: str) -> dict[str, dict[str, object]]:
        if not self._kept.exists():
            return {}
        stored = json.loads(self._kept.read_text())
        return stored["files"] if stored["common"] == common else {}

    def _run(self, items: list[pytest.Item]) -> dict[str, Mapped]:
        result = self._kept.with_suffix(".part")
        pid = os.fork()
        if pid == 0:
            status = 1
            silence()
            try:
                mapped = {nodeid: vars(test) for nodeid, test in self._traced(items).items()}
                result.write_text(json.dumps(mapped))
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        if status:
            raise SystemExit("scripts/mutants: the process that mapped the tests died")
        loaded = json.loads(result.read_text())
        result.unlink()
        return {nodeid: Mapped(**test) for nodeid, test in loaded.items()}

    def _traced(self, items: list[pytest.Item]) -> dict[str, Mapped]:
        tracer = coverage.Coverage(
            data_file=None, include=[str(path) for path in self._modules], config_file=False
        )
        # Warnings are errors in the tests, and a file may run no line of the modules.
        tracer.set_option("run:disable_warnings", ["no-data-collected"])
        mapped: dict[str, Mapped] = {}
        tracer.start()
        for place, item in enumerate(items):
            tracer.switch_context(item.nodeid)
            began = time.perf_counter()
            passed = run_test(item, items[place + 1] if place + 1 < len(items) else None)
            mapped[item.nodeid] = Mapped(passed, round(time.perf_counter() - began, 4))
        tracer.stop()
        data = tracer.get_data()
        for path in self._modules:
            by_test: dict[str, list[int]] = defaultdict(list)
            for line, tests in data.contexts_by_lineno(str(path)).items():
                for nodeid in tests:
                    by_test[nodeid].append(line)
            for nodeid, lines in by_test.items():
                if nodeid in mapped:
                    mapped[nodeid].lines[str(path.relative_to(self._root))] = sorted(lines)
        return mapped


def run_test(item: pytest.Item, following: pytest.Item | None) -> bool:
    """Run one test with its fixtures; whether it passed (or was skipped)."""
    failures = Failures()
    item.config.pluginmanager.register(failures)
    try:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    finally:
        item.config.pluginmanager.unregister(failures)
    return not failures.found


def silence() -> None:
    """Let this process print nothing."""
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)


class Failures:
    """The parts of a test that failed: set-up, call, tear-down."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.found.append(report.when or "")


def _hash(paths: Iterable[Path], more: bytes = b"") -> str:
    total = hashlib.sha256(more)
    for path in sorted(paths):
        total.update(path.read_bytes())
    return total.hexdigest()
