"""Signals that arrive while the router is still being imported.

SIGHUP, SIGUSR1 and SIGUSR2 kill a process without a handler, and importing takes a second on a busy
machine. `hold` is called before the slow imports; the tasks that handle the signals later call
`came` to find out about earlier ones. This module imports nothing slow.
"""

from __future__ import annotations

import signal
from types import FrameType

_HELD = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_early: set[int] = set()
_quiet = False


def _note(number: int, _: FrameType | None) -> None:
    _early.add(number)


def hold() -> None:
    """Record these signals from now on instead of dying; existing handlers stay.

    Uses a handler instead of SIG_IGN, which child processes would inherit. Has no effect outside of
    the main thread, where no handler can be set.
    """
    for number in _HELD:
        if signal.getsignal(number) is signal.SIG_DFL:
            try:
                signal.signal(number, _note)
            except ValueError:
                return


def end_quietly_on_interrupt() -> None:
    """Let Ctrl-C end the process at once, until `raise_on_interrupt`.

    A KeyboardInterrupt in the middle of an import is a traceback, or is lost: Python ignores it in
    the callback that releases the lock of a module.
    """
    global _quiet
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        except ValueError:
            return
        _quiet = True


def raise_on_interrupt() -> None:
    """Undo `end_quietly_on_interrupt`, if it has changed anything, before work that has an end."""
    global _quiet
    if _quiet:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _quiet = False


def came(number: signal.Signals) -> bool:
    """Return True once if the signal has arrived since `hold`."""
    early = number in _early
    _early.discard(number)
    return early
