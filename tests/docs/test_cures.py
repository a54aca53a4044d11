"""The table of Hypercorn's cures names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import vllm_router.http.hypercorn

TESTS = Path(__file__).parents[1]


def test_cures_table_names_existing_tests_and_modules() -> None:
    table = vllm_router.http.hypercorn.__doc__ or ""
    named = set(re.findall(r"\btest_\w+", table))
    sources = "\n".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)", sources))
    assert len(named) > 20
    assert named - defined == set()
    package = Path(vllm_router.http.hypercorn.__file__).parent
    modules = {path.stem for path in package.glob("*.py")}
    cures = re.findall(r"\(([a-z0-9_, ]+)\)\n    \|", table)
    assert {name for cure in cures for name in cure.split(", ")} <= modules
