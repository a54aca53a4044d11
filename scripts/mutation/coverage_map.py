"""Maps tests to the lines of the decision modules that they run, and to their durations.

The map is kept in a file; a test file is mapped again when it has changed. When a module has
changed, its lines are carried over: a changed or new line counts as run by the tests that ran the
lines in its place or beside it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coverage
import pytest


@dataclass
class Mapped:
    """One test: whether it passed, its seconds of CPU, and the lines it runs, by module."""

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
        stored = self._load()
        by_file: dict[Path, list[pytest.Item]] = defaultdict(list)
        for item in items:
            by_file[item.path].append(item)
        hashes = {self._name(path): digest(path) for path in by_file}
        fresh = {name for name, now in hashes.items() if stored.get(name, {}).get("hash") == now}
        for name in fresh:
            for nodeid, test in stored[name]["tests"].items():
                self.tests[nodeid] = Mapped(**test)
        self._kept.parent.mkdir(exist_ok=True)
        for path, tests in by_file.items():
            name = self._name(path)
            if name in fresh:
                continue
            print(f"mapping {len(tests)} tests of {name}", flush=True)
            mapped = self._run(tests)
            self.tests |= mapped
            as_stored = {nodeid: vars(test) for nodeid, test in mapped.items()}
            stored[name] = {"hash": hashes[name], "tests": as_stored}
            self._save(stored)
        self._save(stored)

    def _save(self, stored: dict[str, Any]) -> None:
        texts = {self._name(path): path.read_text() for path in self._modules if path.exists()}
        self._kept.write_text(json.dumps({"texts": texts, "files": stored}))

    def _load(self) -> dict[str, Any]:
        if not self._kept.exists():
            return {}
        kept = json.loads(self._kept.read_text())
        if not {self._name(path) for path in self._modules} <= kept.get("texts", {}).keys():
            return {}  # of another version, or a module is new
        files: dict[str, Any] = kept["files"]
        for path in self._modules:
            name = self._name(path)
            if kept["texts"][name] == path.read_text():
                continue
            moved = carried_over(kept["texts"][name], path.read_text())
            for file in files.values():
                for test in file["tests"].values():
                    if name in test["lines"]:
                        lines = {new for old in test["lines"][name] for new in moved.get(old, ())}
                        test["lines"][name] = sorted(lines)
        return files

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._root))

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
            began = time.process_time()
            passed = run_test(item, items[place + 1] if place + 1 < len(items) else None)
            mapped[item.nodeid] = Mapped(passed, round(time.process_time() - began, 4))
        tracer.stop()
        data = tracer.get_data()
        for path in self._modules:
            by_test: dict[str, list[int]] = defaultdict(list)
            for line, tests in data.contexts_by_lineno(str(path)).items():
                for nodeid in tests:
                    by_test[nodeid].append(line)
            for nodeid, lines in by_test.items():
                if nodeid in mapped:
                    mapped[nodeid].lines[self._name(path)] = sorted(lines)
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


def carried_over(old: str, new: str) -> dict[int, list[int]]:
    """The lines of the new text that stand for each line of the old one."""
    before, after = old.splitlines(), new.splitlines()
    lines: dict[int, list[int]] = defaultdict(list)
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, start, end, new_start, new_end in matcher.get_opcodes():
        if kind == "equal":
            for place in range(end - start):
                lines[start + place + 1].append(new_start + place + 1)
        elif kind != "delete":
            beside = range(max(start - 1, 0), end + 1)
            for place in beside if kind == "insert" else range(start, end):
                lines[place + 1] += range(new_start + 1, new_end + 1)
    return lines


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
