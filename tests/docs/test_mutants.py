"""scripts/mutants: its modules exist, and a mutant is the module with one thing changed."""

from __future__ import annotations

import ast
import importlib
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]

SOURCE = '''
TABLE = {1: True}
SIZE = 5

def decide(a, b=1):
    """Decide."""
    if not a and b < 2:
        note(a)
        return a + 1
    return max(a, b)
'''


@pytest.fixture
def sites(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("mutation.sites")


def test_mutants_modules_exist(sites: ModuleType):
    modules = importlib.import_module("mutation.modules").DECIDING
    missing = [module for module in modules if not (ROOT / module).is_file()]
    assert missing == [], "moved or renamed: change scripts/mutation/modules.py too"


def test_mutants_equivalents_are_mutants_of_the_present_code(sites: ModuleType):
    listed = tomllib.loads((ROOT / "scripts/mutation/equivalents.toml").read_text())["mutant"]
    functions = {entry["function"] for entry in listed}
    found: set[tuple[str, ...]] = set()
    for name in {function.partition(":")[0] for function in functions}:
        for mutant in sites.mutants_of(ROOT / f"{name.replace('.', '/')}.py"):
            key = (f"{name}:{mutant.function or mutant.name}", mutant.before)
            found |= {(*key, mutant.after), (*key, "any")}
    outdated = [
        entry
        for entry in listed
        if (entry["function"], entry["before"], entry["after"]) not in found
    ]
    assert outdated == [], "changed or removed: change scripts/mutation/equivalents.toml too"


def test_mutants_of_module_change_one_line_each(sites: ModuleType, tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    whole = ast.unparse(ast.parse(SOURCE)).splitlines()
    found = sites.mutants_of(path)
    changes = {(mutant.before, mutant.after) for mutant in found}
    assert changes == {
        ("TABLE = {1: True}", "TABLE = {1: False}"),
        ("if not a and b < 2:", "if False:"),
        ("if not a and b < 2:", "if True:"),
        ("if not a and b < 2:", "if not a or b < 2:"),
        ("if not a and b < 2:", "if b < 2:"),
        ("if not a and b < 2:", "if not a:"),
        ("if not a and b < 2:", "if a and b < 2:"),
        ("if not a and b < 2:", "if not a and b <= 2:"),
        ("if not a and b < 2:", "if not a and b >= 2:"),
        ("if not a and b < 2:", "if not a and b < 3:"),
        ("if not a and b < 2:", "if not a and b < 1:"),
        ("note(a)", "pass"),
        ("return a + 1", "return None"),
        ("return a + 1", "return a - 1"),
        ("return a + 1", "return a + 2"),
        ("return a + 1", "return a + 0"),
        ("return max(a, b)", "return None"),
        ("return max(a, b)", "return min(a, b)"),
    }
    for mutant in found:
        changed = ast.unparse(mutant.tree).splitlines()
        differing = [pair for pair in zip(whole, changed, strict=True) if pair[0] != pair[1]]
        assert [(old.strip(), new.strip()) for old, new in differing] == [
            (mutant.before, mutant.after)
        ]
        compile(mutant.tree, str(path), "exec")


def test_mutants_results_hold_while_module_and_killing_test_stay_the_same(
    sites: ModuleType, tmp_path: Path
):
    results = importlib.import_module("mutation.results")
    verdict = importlib.import_module("mutation.trial").Verdict
    for name in ("module.py", "test_a.py", "test_b.py"):
        (tmp_path / name).write_text(SOURCE)
    files = ["test_a.py", "test_b.py"]
    first, second, third = sites.mutants_of(tmp_path / "module.py")[:3]
    kept = results.Results(tmp_path / "kept" / "verdicts.jsonl", tmp_path)
    kept.keep(first, files, verdict("killed", "test_a.py::test_x", "failed"))
    kept.keep(second, files, verdict("survived"))
    kept.keep(third, [], verdict("survived"))  # no test was tried

    def found() -> list[str | None]:
        again = results.Results(tmp_path / "kept" / "verdicts.jsonl", tmp_path)
        verdicts = [again.find(mutant, files) for mutant in (first, second, third)]
        return [one and one.result for one in verdicts]

    assert found() == ["killed", "survived", None]
    (tmp_path / "test_b.py").write_text("changed")
    assert found() == ["killed", None, None]
    (tmp_path / "test_a.py").write_text("changed")
    assert found() == [None, None, None]
