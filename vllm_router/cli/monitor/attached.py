"""A router with its own full-screen view: two processes on one terminal.

The router is the process that was started: signals and the exit code are its own. The view is its
child; it has the keyboard. What the router says goes to its log meanwhile, and to the terminal
again once the view has gone. A view that fails takes nothing with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import trio

from vllm_router.cli.monitor.command import LAST_LINES, last_lines
from vllm_router.cli.monitor.screen import End
from vllm_router.observability.formatting import TextFormatter
from vllm_router.runtime.serve import LocalMonitorAccess, ServeOptions

logger = logging.getLogger(__name__)

REPLAY_SECONDS = 2.0
"""What was logged so shortly before the view went is shown: why it went is among it."""


async def serve_with_view(
    serve: Callable[[ServeOptions, Callable[[str], None]], Awaitable[None]],
    options: ServeOptions,
    listening: Callable[[str], None],
    log: Path,
) -> None:
    """Like `serve`, of one process or several, with a view of the router on this terminal.

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
                # Raised again below, outside the nursery, which would wrap it.
                failure = error
            nursery.cancel_scope.cancel(reason="router ended")

        nursery.start_soon(router)
        await up.wait()
        with _aside(log) as aside:
            end = await _view(own.url or url, own.key, log, aside)
            # Who asked for the end needs not be told why it came.
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
            click.echo(f"the router has failed; the end of its log, {log}:", err=True)
            for line in last_lines(log, LAST_LINES):
                click.echo(line, err=True)
        raise failure


@dataclass(slots=True)
class _Aside:
    """`terminal` and `errors` are stdout and stderr as they were."""

    terminal: int
    errors: int
    replay: bool = True


async def _view(url: str, key: str, log: Path, aside: _Aside) -> int:
    """Run the view to its end; its exit code, see End."""
    near = url.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")
    command = [sys.executable, "-m", "vllm_router", "monitor", near, "--of-router", str(log)]
    process = await trio.run_process(
        command,
        stdin=None,
        stdout=aside.terminal,
        stderr=aside.errors,
        check=False,
        env=os.environ | {"VLLM_ROUTER_KEY": key},
    )
    return process.returncode


@contextlib.contextmanager
def _aside(log: Path) -> Iterator[_Aside]:
    """Keep the terminal clear of what this process writes, and log to it again at the end.

    Log records already go to the file. This is for everything else, of Python itself for one.
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
        """Those not older than a Unix time."""
        return [record for record in self._records if record.created >= moment]
