"""A test that hangs fails, cleans up, and the next one runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

limited = pytest.mark.timeout(0.5)


@asynccontextmanager
async def cleaned_up(path):
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(0)
        path.touch()


@limited
async def test_waits_for_ever():
    async with cleaned_up(Path("waits")):
        await trio.sleep_forever()


@limited
async def test_blocks_the_loop():
    async with cleaned_up(Path("blocks")):
        time.sleep(1000)


async def test_virtual_time_is_free(autojump_clock):
    await trio.sleep(1000)


@limited
def test_blocks_without_a_loop():
    try:
        time.sleep(1000)
    finally:
        Path("plain").touch()


def test_passes():
    pass
"""


def test_time_limit_hanging_test_fails_and_cleans_up(tmp_path: Path):
    (tmp_path / "test_hanging.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\ntimeout = 60\n")
    command = [sys.executable, "-m", "pytest", "-p", "support.time_limit", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    done = subprocess.run(
        [*command, "test_hanging.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "3 failed, 2 passed" in done.stdout, done.stdout
    assert "longer than 0.5 s" in done.stdout
    for name in ("waits", "blocks", "plain"):
        assert (tmp_path / name).exists(), done.stdout
