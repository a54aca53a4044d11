"""ruff and mypy have nothing to say: their findings are in pytest's summary, like all others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "ruff check": ["ruff", "check", "--quiet", "."],
    "ruff format": ["ruff", "format", "--check", "--quiet", "."],
    "mypy": ["mypy"],
}


@pytest.mark.timeout(1500)  # mypy without its cache needs a minute of a whole core
@pytest.mark.parametrize("name", COMMANDS)
def test_linter_finds_nothing(name: str):
    program, *arguments = COMMANDS[name]
    done = subprocess.run(
        [Path(sys.executable).parent / program, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
