"""A router with its own full-screen monitor: two processes on one terminal.

The started process is the router: it handles signals and sets the exit code. The monitor is its
child and has the keyboard. Meanwhile the router logs to a file, and to the terminal again once the
monitor has ended. A failing monitor does not affect the router.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import termios
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import trio

from vllm_router.cli.monitor.command import LAST_LINES
from vllm_router.cli.monitor.fullscreen import RESET
from vllm_router.cli.monitor.log_file import last_lines
from vllm_router.cli.monitor.screen import End
from vllm_router.observability.formatting import TextFormatter
from vllm_router.runtime.serve import LocalMonitorAccess, ServeOptions

logger = logging.getLogger(__name__)

REPLAY_SECONDS = 2.0
"""Seconds of log records that are shown after the monitor has ended, to explain its end."""


async def serve_with_view(
    serve: Callable[[ServeOptions, Callable[[str], None]], Awaitable[None]],
    options: ServeOptions,
    listening: Callable[[str], None],
    log: Path,
) -> None:
    """Like `serve`, for one process or several, with a monitor on this terminal.

    The log already goes to `log`.
    """
    url = ""
    own = LocalMonitorAccess()
    options = replace(options, view=own)
    failure: Exception | None = None
    up = trio.Event()

    def announce(where: str) -> None:
        nonlocal url
        listening(where)
        url = where
        up.set()

    async with trio.open_nursery() as nursery:

        async def router() -> None:
            nonlocal failure
            try:
                await serve(options, announce)
            except Exception as error:  # noqa: BLE001  not swallowed
                # Raised again below, outside of the nursery, which would wrap it.
                failure = error
            nursery.cancel_scope.cancel(reason="router ended")

        nursery.start_soon(router)
        await up.wait()
        with _aside(log) as aside:
            end = await _view(own.url or url, own.key, log, aside)
            # A user who ended the monitor needs no explanation.
            aside.replay = end != End.USER
        if end == End.USER:
            click.echo("stopping; Ctrl-C stops at once")
        if end in (End.USER, End.HANGUP):
            os.kill(os.getpid(), signal.SIGTERM)
        elif end != End.ROUTER_STOPS:
            logger.warning(
                "the monitor has exited (code %s); the router is still running, Ctrl-C stops it",
                end,
            )
    if failure is not None:
        if up.is_set():
            if options.output is not None:
                options.output.flush()
            click.echo(f"the router has failed; the last lines of its log {log}:", err=True)
            for line in last_lines(log, LAST_LINES):
                click.echo(line, err=True)
        raise failure


@dataclass(slots=True)
class _Aside:
    """`terminal` and `errors` are duplicates of the original stdout and stderr."""

    terminal: int
    errors: int
    replay: bool = True


async def _view(url: str, key: str, log: Path, aside: _Aside) -> int:
    """Run the monitor; returns its exit code, see End."""
    near = url.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")
    command = [sys.executable, "-m", "vllm_router", "monitor", near, "--of-router", str(log)]
    before = _modes(aside.terminal)
    process = await trio.run_process(
        command,
        stdin=None,
        stdout=aside.terminal,
        stderr=aside.errors,
        check=False,
        env=os.environ | {"VLLM_ROUTER_KEY": key},
    )
    if process.returncode < 0 and before is not None:
        _restore(aside.terminal, before)
    return process.returncode


def _modes(terminal: int) -> list[Any] | None:
    """The terminal's modes; None if it is none."""
    try:
        return termios.tcgetattr(terminal)
    except termios.error:
        return None


def _restore(terminal: int, modes: list[Any]) -> None:
    """Undo what a monitor has set that a signal ended before it could do so."""
    with contextlib.suppress(OSError, termios.error):  # the terminal may have been closed
        os.write(terminal, RESET.encode())
        termios.tcsetattr(terminal, termios.TCSAFLUSH, modes)


@contextlib.contextmanager
def _aside(log: Path) -> Iterator[_Aside]:
    """Redirect stdout and stderr to the log file while the monitor runs.

    Log records go to the file anyway; this is for other output, such as Python's own.
    """
    sys.stdout.flush()
    kept = _Aside(os.dup(1), os.dup(2))
    recent = Recent()
    logging.getLogger().addHandler(recent)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    try:
        yield kept
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept.terminal, 1)
        os.dup2(kept.errors, 2)
        os.close(kept.terminal)
        os.close(kept.errors)
        logging.getLogger().removeHandler(recent)
        shown = logging.StreamHandler(sys.stderr)
        shown.setFormatter(TextFormatter())
        for record in recent.since(time.time() - REPLAY_SECONDS) if kept.replay else ():
            shown.handle(record)
        logging.getLogger().addHandler(shown)


class Recent(logging.Handler):
    """Keeps the last records."""

    def __init__(self) -> None:
        super().__init__()
        self._records: deque[logging.LogRecord] = deque(maxlen=20)

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    def since(self, moment: float) -> list[logging.LogRecord]:
        """The records not older than a Unix time."""
        return [record for record in self._records if record.created >= moment]
