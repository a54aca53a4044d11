"""`vllm-router` as real processes, for tests of the commands.

They are forked from a process with the libraries, unless a test asks for a start from nothing.
Everything here blocks, with a limit. The processes are gone when the block is left.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx

from support import fork_server

ROOT = Path(__file__).parents[2]
SECONDS = 120.0
"""For anything to happen; much longer than it takes, as the machine may be busy."""

T = TypeVar("T")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vllm_router", *arguments]


def call(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command and wait for its end."""
    with tempfile.TemporaryFile("w+") as errors:
        process = fork_server.start(
            *("vllm_router", *arguments),
            env=environment(),
            errors=errors.fileno(),
            cwd=cwd or Path.cwd(),
        )
        watchdog = threading.Timer(SECONDS, process.kill)
        watchdog.start()
        try:
            with process.stdout:
                output = process.stdout.read().decode()
            code = process.wait(SECONDS)
        finally:
            watchdog.cancel()
            process.kill()
        errors.seek(0)
        return subprocess.CompletedProcess(command(*arguments), code, output, errors.read())


class Running:
    """A running command; its stdout is read line by line, its stderr goes to a file."""

    def __init__(
        self, errors: Path, *arguments: str, cwd: Path | None = None, from_nothing: bool = False
    ) -> None:
        self.errors = errors
        self.url = ""
        self.process: subprocess.Popen[bytes] | fork_server.Forked
        with errors.open("w") as file:
            if from_nothing:
                self.process = subprocess.Popen(
                    command(*arguments),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    bufsize=0,  # the selector would not see a buffered line
                    stderr=file,
                    cwd=cwd,
                    env=environment(),
                )
            else:
                self.process = fork_server.start(
                    *("vllm_router", *arguments),
                    env=environment(),
                    errors=file.fileno(),
                    cwd=cwd or Path.cwd(),
                    buffering=0,
                )

    def line(self) -> str:
        """The next line of stdout; AssertionError if there is none in time."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(SECONDS) else b""
        assert line, f"no output; stderr: {self.errors.read_text()}"
        return line.decode().rstrip("\n")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=SECONDS)


@contextlib.contextmanager
def running(
    errors: Path, *arguments: str, cwd: Path | None = None, from_nothing: bool = False
) -> Iterator[Running]:
    started = Running(errors, *arguments, cwd=cwd, from_nothing=from_nothing)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()
        if started.process.stdout is not None:
            started.process.stdout.close()


@contextlib.contextmanager
def router(
    errors: Path, *arguments: str, cwd: Path | None = None, from_nothing: bool = False
) -> Iterator[Running]:
    """A router on a free port that has probed its servers, with its `url`."""
    arguments = ("run", "--host", "127.0.0.1", "--port", "0", *arguments)
    with running(errors, *arguments, cwd=cwd, from_nothing=from_nothing) as started:
        started.url = started.line().partition(" on ")[2].partition(",")[0]
        until(lambda: httpx.get(f"{started.url}/readyz", trust_env=False).status_code == 200)
        yield started


def until(holds: Callable[[], T]) -> T:
    """Call until the result is truthy; AssertionError after the time limit."""
    deadline = time.monotonic() + SECONDS
    while True:
        answer = holds()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"still not so after {SECONDS:g} s"
        time.sleep(0.02)
