"""The terminal while the monitor has it: raw input, the alternate screen, the mouse."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import IO, Self

from rich.console import Console, RenderableType
from rich.live import Live

from vllm_router.cli.monitor.keys import raw_input

_MOUSE_ON, _MOUSE_OFF = "\x1b[?1000h\x1b[?1006h", "\x1b[?1006l\x1b[?1000l"
"""xterm's modes: report buttons and the wheel, in SGR form."""

RESET = f"{_MOUSE_OFF}\x1b[?1049l\x1b[?25h"
"""Undoes the modes of a monitor that was killed."""


def stop_job() -> None:
    """Stop this process and the others of its job, as Ctrl-Z does, until the shell continues it."""
    before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    try:
        os.kill(0, signal.SIGTSTP)
    finally:
        signal.signal(signal.SIGTSTP, before)


class FullScreen:
    """A context manager; the terminal is as before at its end, whatever ends it."""

    def __init__(
        self,
        descriptor: int,
        stop: Callable[[], None] = stop_job,
        file: IO[str] | None = None,
    ) -> None:
        """`descriptor` is the terminal's input, `file` its output, stdout by default.

        `stop` stops the process in `suspend`.
        """
        # A size in the environment would hide that the window changes, and TTY_COMPATIBLE=0 that
        # this is a terminal: nothing would be drawn.
        environ = {name: value for name, value in os.environ.items() if name not in _SIZES}
        self.console = Console(file=file, force_terminal=True, _environ=environ)
        self._descriptor = descriptor
        self._stop = stop
        self._stack = contextlib.ExitStack()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(raw_input(self._descriptor))
            live = Live(
                console=self.console,
                screen=True,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            stack.enter_context(_shown(live))
            self._live = live
            stack.enter_context(self._mouse())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live = None
        self._stack.__exit__(kind, error, trace)

    def show(self, frame: RenderableType) -> None:
        """Raises OSError if the terminal has been closed."""
        if self._live is not None:
            self._live.update(frame, refresh=True)

    def suspend(self) -> None:
        """Give the terminal back, stop until the shell continues this job, and take it again."""
        self.__exit__(None, None, None)
        self._stop()
        self.__enter__()

    @contextlib.contextmanager
    def _mouse(self) -> Iterator[None]:
        self._write(_MOUSE_ON)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the terminal has been closed
                self._write(_MOUSE_OFF)

    def _write(self, sequence: str) -> None:
        self.console.file.write(sequence)
        self.console.file.flush()


@contextlib.contextmanager
def _shown(live: Live) -> Iterator[None]:
    live.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the terminal has been closed
            live.stop()


_SIZES = ("COLUMNS", "LINES")
