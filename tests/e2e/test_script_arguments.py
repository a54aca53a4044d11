"""The scripts name a wrong argument and do nothing, and an interrupted one cleans up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("script", "arguments", "problem"),
    [
        ("bench-decisions", ["nope"], "invalid choice: 'nope' (choose from 'adaptive'"),
        ("check-dist", ["--nope"], "unknown arguments --nope"),
        ("check-dist", ["--sbom"], "unknown arguments --sbom"),
        ("follow-readme", ["--nope"], "unrecognized arguments: --nope"),
        ("gen-docs", ["--nope"], "unrecognized arguments: --nope"),
        ("soak", ["nan"], "minutes: expected a number > 0, got nan"),
        ("soak", ["1", "--results", "/dev/null/x"], "--results: /dev/null/x: Not a directory"),
        ("bench", ["--repeat", "-1"], "argument --repeat: expected an integer > 0, got -1"),
        ("bench", ["--seconds", "nan"], "argument --seconds: expected a number > 0, got nan"),
        ("bench", ["--results", "/dev/null/x"], "--results: /dev/null/x: Not a directory"),
        ("bench", ["--report", "/nowhere"], "--report /nowhere: [Errno 2] No such file"),
        ("mutants", ["--only", "nowhere"], "--only: expected a file and a line of it, got nowhere"),
        ("mutants", ["--count", "-1"], "--count: expected 0 or more, got -1"),
        ("stalls", ["/nowhere"], "expected the directory of another tree, got /nowhere"),
    ],
)
def test_script_wrong_arguments_are_named_and_nothing_runs(
    script: str, arguments: list[str], problem: str
):
    beside = Path(sys.executable).parent
    done = subprocess.run(
        [ROOT / "scripts" / script, *arguments],
        env={**os.environ, "PYTHON": sys.executable, "PATH": f"{beside}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


def test_script_follow_readme_interrupted_leaves_nothing(tmp_path: Path):
    """Its installer wrote on into the clone that was being removed."""
    with subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "follow-readme", "--time"],
        env={**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as done:
        assert done.stdout is not None
        assert b"cloned" in done.stdout.readline()
        done.send_signal(signal.SIGINT)
        _, said = done.communicate(timeout=120)
    assert done.returncode == 130, said
    assert list(tmp_path.iterdir()) == []
