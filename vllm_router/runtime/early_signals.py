"""Signals that come while the router is still being imported.

SIGHUP, SIGUSR1 and SIGUSR2 kill a process that has no handler for them, and importing takes a
second on a busy machine. So `hold` is called before anything slow is imported; the tasks that
follow the signals later ask `came` for those that were early. Imports nothing slow itself.
"""

from __future__ import annotations

import signal
from types import FrameType

_HELD = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_early: set[int] = set()


def _note(number: int, _: FrameType | None) -> None:
    _early.add(number)


def hold() -> None:
    """From now on these signals kill no more; handlers that others have set stay.

    A handler rather than SIG_IGN, which the programs that we start would inherit. Outside of the
    main thread, where no handler can be set, it does nothing.
    """
    for number in _HELD:
        if signal.getsignal(number) is signal.SIG_DFL:
            try:
                signal.signal(number, _note)
            except ValueError:
                return


def came(number: signal.Signals) -> bool:
    """Whether the signal has come since `hold` and has not been asked for yet."""
    early = number in _early
    _early.discard(number)
    return early
