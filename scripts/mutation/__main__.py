"""The command: choose mutants, try each, report; see scripts/mutants."""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from mutation.coverage_map import CoverageMap, Mapped
from mutation.modules import DECIDING
from mutation.results import Results
from mutation.sites import Mutant, dependents, mutants_of, name_of_constant
from mutation.trial import Originals, Verdict, passes, try_mutant

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".bench" / "mutants.json"
VERDICTS = ROOT / ".bench" / "mutants.jsonl"
EQUIVALENTS = Path(__file__).with_name("equivalents.toml")
TESTS = (
    "tests/unit/proxy",
    "tests/unit/fleet",
    "tests/unit/http",
    "tests/unit/config",
    "tests/unit/routing",
    "tests/unit/runtime/test_router_share.py",
    "tests/unit/runtime/test_sharing.py",
    "tests/unit/web/test_guard.py",
    "tests/unit/web/test_guard_query.py",
    "tests/unit/observability/test_telemetry.py",
    "tests/property/test_waiting_model.py",
)
"""Where the tests of the deciding modules are; the others run in process, too, but take long."""
ANY = "any"
"""Stands in equivalents.toml for all changes of a line."""

NEAR_TURNS = 10

SECONDS = 5.0
"""CPU time that a test may take with a mutant, beside ten times what it takes without."""

SLOW = 5.0
"""Seconds after which a test that failed runs once more: the machine may only have been busy."""


@dataclass(frozen=True)
class Options:
    modules: tuple[str, ...]
    count: int
    seed: int
    only: str
    tests: int
    within: tuple[str, ...]
    seconds: float
    fresh: bool


def options(arguments: list[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="scripts/mutants", description="Mutation test of the modules that decide."
    )
    parser.add_argument("modules", nargs="*", help="parts of paths, such as proxy/retry")
    parser.add_argument("--count", type=int, default=15, help="mutants of a module, 0 for all")
    parser.add_argument("--seed", type=int, default=20261129)
    parser.add_argument("--only", default="", metavar="FILE:LINE", help="mutants of one line")
    parser.add_argument(
        "--tests", type=int, default=120, help="tests tried first; all others follow"
    )
    parser.add_argument(
        "--within", action="append", metavar="PATH", help="use the tests of this folder or file"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="CPU time after which a test is a loop"
    )
    parser.add_argument("--fresh", action="store_true", help="use no verdict of an earlier run")
    parser.add_argument("--list", action="store_true", help="print the modules")
    found = parser.parse_args(arguments)
    if found.list:
        print(*DECIDING, sep="\n")
        raise SystemExit(0)
    chosen = [m for m in DECIDING if any(part in m for part in found.modules or [""])]
    if found.only:
        module, _, line = found.only.partition(":")
        if not ((ROOT / module).is_file() and line.isdecimal()):
            parser.error(f"--only: expected a file and a line of it, got {found.only}")
        chosen = [module]
    if found.count < 0:
        parser.error(f"--count: expected 0 or more, got {found.count}")
    if not chosen:
        parser.error(f"no module matches {found.modules}; --list prints them")
    within = tuple(found.within or TESTS)
    return Options(
        tuple(chosen),
        found.count,
        found.seed,
        found.only,
        found.tests,
        within,
        found.seconds,
        found.fresh,
    )


class Run:
    """The plugin whose test loop tries mutants instead of running the tests once."""

    def __init__(self, chosen: Options) -> None:
        self._options = chosen
        self._passes: dict[str, bool] = {}
        """Whether a test that has killed a mutant passes without one."""
        self._results = Results(VERDICTS, ROOT)
        self.survivors = 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._run(session)
        return True

    def _run(self, session: pytest.Session) -> None:
        paths = [ROOT / module for module in dict.fromkeys([*DECIDING, *self._options.modules])]
        mapping = CoverageMap(KEPT, ROOT, paths)
        mapping.make(session.items)
        items = {item.nodeid: item for item in session.items}
        print(f"{len(items)} tests are mapped", flush=True)
        failing = [nodeid for nodeid, test in mapping.tests.items() if not test.passed]
        for nodeid in failing:
            print(f"left out, because it fails without a mutant: {nodeid}")
            items.pop(nodeid, None)
        originals = Originals(paths)
        known = equivalents()
        totals: Counter[str] = Counter()
        for module in self._options.modules:
            totals += self._module(module, mapping.tests, items, originals, known)
            print(f"  so far: {summary('all', totals)}", flush=True)
        print(f"\n{summary(f'seed {self._options.seed}, all modules', totals)}")
        self.survivors = totals["survived"]

    def _module(
        self,
        module: str,
        mapped: dict[str, Mapped],
        items: dict[str, pytest.Item],
        originals: Originals,
        known: dict[tuple[str, str, str], str],
    ) -> Counter[str]:
        counts: Counter[str] = Counter()
        name = module.removesuffix(".py").replace("/", ".")
        for mutant in self._chosen(module):
            where = f"{module}:{mutant.line}"
            key = (name_of(mutant, name), mutant.before)
            if (*key, mutant.after) in known or (*key, ANY) in known:
                counts["equivalent"] += 1
                continue
            lines = self._lines(mutant, module, mapped)
            ordered = choose(mapped, items, lines, module)
            verdict = self._verdict(mutant, originals, name, ordered, mapped)
            counts[verdict.result] += 1
            counts[verdict.how] += verdict.how not in ("", "failed")
            if verdict.result == "survived":
                print(f"SURVIVED {where} {mutant.function or mutant.name} ({len(ordered)} tests)")
                print("  " + mutant.text.replace("\n", "\n  "), flush=True)
            elif os.environ.get("MUTANTS_VERBOSE") or verdict.how not in ("", "failed"):
                change = f"{where} {mutant.before} -> {mutant.after}"
                print(f"{verdict.result} {change} [{verdict.how} {verdict.killer}]", flush=True)
        print(summary(module, counts), flush=True)
        return counts

    def _verdict(
        self,
        mutant: Mutant,
        originals: Originals,
        name: str,
        ordered: list[pytest.Item],
        mapped: dict[str, Mapped],
    ) -> Verdict:
        """The verdict of an earlier run, or of the first tests, and then of all others."""
        files = {test.nodeid.partition("::")[0] for test in ordered}
        kept = None if self._options.fresh else self._results.find(mutant, files)
        if kept is not None:
            return kept
        most = self._options.tests
        verdict = self._try(mutant, originals, name, ordered[:most], mapped)
        if verdict.result == "survived" and ordered[most:]:
            verdict = self._try(mutant, originals, name, ordered[most:], mapped)
        self._results.keep(mutant, files, verdict)
        return verdict

    def _try(
        self,
        mutant: Mutant,
        originals: Originals,
        name: str,
        tests: list[pytest.Item],
        mapped: dict[str, Mapped],
    ) -> Verdict:
        """`try_mutant` with the tests that pass without a mutant, the quickest first."""
        tests = sorted(tests, key=lambda test: mapped[test.nodeid].seconds)
        limits = {
            test.nodeid: self._options.seconds + 10 * mapped[test.nodeid].seconds for test in tests
        }
        doubted: set[str] = set()
        while True:
            tests = [test for test in tests if self._passes.get(test.nodeid, True)]
            pairs = [(test, limits[test.nodeid]) for test in tests]
            verdict = try_mutant(mutant, originals, name, pairs)
            item = next((test for test in tests if test.nodeid == verdict.killer), None)
            if item is None:
                return verdict
            if item.nodeid not in self._passes:
                # The map may be older than the code.
                self._passes[item.nodeid] = passes(item)
            if not self._passes[item.nodeid]:
                print(f"left out, because it fails without a mutant: {item.nodeid}", flush=True)
                continue
            if verdict.seconds < SLOW or verdict.how == "endless loop" or item.nodeid in doubted:
                return verdict
            doubted.add(item.nodeid)
            tests = [item, *(test for test in tests if test is not item)]

    def _chosen(self, module: str) -> list[Mutant]:
        """The mutants to try, the same for the same seed and text."""
        found = mutants_of(ROOT / module)
        if self._options.only:
            line = int(self._options.only.partition(":")[2])
            return [mutant for mutant in found if mutant.line == line]
        count = self._options.count
        if not count or count >= len(found):
            return found
        picked = Random(f"{self._options.seed} {module}").sample(range(len(found)), count)
        return [found[place] for place in sorted(picked)]

    def _lines(
        self, mutant: Mutant, module: str, mapped: dict[str, Mapped]
    ) -> set[tuple[str, int]]:
        """The lines whose tests may see the mutant.

        Its own line, or uses of its constant and of those made from it; all lines of its module if
        none of the modules uses them.
        """
        if mutant.function:
            ran = {line for test in mapped.values() for line in test.lines.get(module, ())}
            # A part of a long statement may have no line of its own.
            return {(module, max((n for n in ran if n <= mutant.line), default=mutant.line))}
        names = set(map(name_of_constant, dependents(mutant.module, mutant.name)))
        lines_of: dict[str, set[int]] = {}
        for test in mapped.values():
            for other, lines in test.lines.items():
                lines_of.setdefault(other, set()).update(lines)
        places = {
            (other, number)
            for other, lines in lines_of.items()
            for number, text in enumerate((ROOT / other).read_text().splitlines(), 1)
            if number in lines and any(name in text for name in names)
        }
        return places or {(module, line) for line in lines_of.get(module, ())}


def choose(
    mapped: dict[str, Mapped],
    items: dict[str, pytest.Item],
    lines: set[tuple[str, int]],
    module: str,
) -> list[pytest.Item]:
    """The tests that run one of the lines: alternating between files, the narrowest tests first.

    Files of the module's part of the package, or with a word of its name in theirs, take
    NEAR_TURNS at a time.
    """
    by_file: dict[str, list[tuple[int, str]]] = {}
    for nodeid, test in mapped.items():
        if nodeid in items and any(
            number in test.lines.get(module, ()) for module, number in lines
        ):
            size = sum(map(len, test.lines.values()))
            by_file.setdefault(nodeid.partition("::")[0], []).append((size, nodeid))
    queues = [
        (sorted(tests), NEAR_TURNS if _is_near(file, module) else 1)
        for file, tests in sorted(by_file.items())
    ]
    turns: list[tuple[int, str]] = []
    place = 0
    while len(turns) < sum(len(queue) for queue, _ in queues):
        for queue, pace in queues:
            turns += queue[place * pace : (place + 1) * pace]
        place += 1
    return [items[nodeid] for _, nodeid in turns]


def _is_near(file: str, module: str) -> bool:
    words = set(Path(module).stem.split("_"))
    parts = ("fleet", "routing", "config", "http")  # the tests of the proxy are many and slow
    return Path(file).parts[2] == Path(module).parts[1] in parts or bool(
        words & set(Path(file).stem.split("_"))
    )


def name_of(mutant: Mutant, module: str) -> str:
    return f"{module}:{mutant.function or mutant.name}"


def equivalents() -> dict[tuple[str, str, str], str]:
    """The equivalent mutants, which no test could see, with the reason."""
    listed: Iterable[dict[str, str]] = tomllib.loads(EQUIVALENTS.read_text()).get("mutant", [])
    return {(one["function"], one["before"], one["after"]): one["reason"] for one in listed}


def summary(name: str, counts: Counter[str]) -> str:
    tried = counts["killed"] + counts["survived"]
    rate = 100 * counts["killed"] / tried if tried else 100.0
    kinds = ("endless loop", "waits for ever", "equivalent", "unclear")
    extra = "".join(f", {counts[kind]} {kind}" for kind in kinds if counts[kind])
    return f"{name}: {counts['killed']} of {tried} killed ({rate:.0f} %){extra}"


def main() -> int:
    chosen = options(sys.argv[1:])
    run = Run(chosen)
    # Without the tests' own time limit, which a busy machine may reach.
    arguments = ["-q", "-s", "--timeout=0", "-p", "no:cacheprovider", "--no-header"]
    code = pytest.main([*arguments, *chosen.within], plugins=[run])
    return int(code) or int(run.survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
