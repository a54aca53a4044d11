"""Messages to the service manager, by the protocol of sd_notify(3).

systemd sets NOTIFY_SOCKET for services of `Type=notify`, and WATCHDOG_USEC and WATCHDOG_PID with
`WatchdogSec=`. Without NOTIFY_SOCKET nothing is sent.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, MutableMapping

import trio

from vllm_router.http.server.socket_handover import notify

STATUS_INTERVAL = 5.0
"""Seconds between two looks at the status; a status that is unchanged is not sent."""


def watchdog_seconds(environ: MutableMapping[str, str]) -> float | None:
    """The time without a message after which systemd kills this process; None without a watchdog.

    A value that is no number is ignored, as sd_watchdog_enabled(3) has it.
    """
    given, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return None
    if not (given.isascii() and given.isdigit() and len(given) < 19 and int(given)):
        return None
    return int(given) / 1e6


class ServiceManager:
    """Reports the state of this process to systemd."""

    def __init__(
        self,
        environ: MutableMapping[str, str],
        send: Callable[[str, MutableMapping[str, str]], None] = notify,
    ) -> None:
        self._environ = environ
        self._notify = send
        self._watchdog = watchdog_seconds(environ)
        self._last_status = ""

    def _send(self, *lines: str) -> None:
        self._notify("\n".join(lines), self._environ)

    def _status(self, text: str) -> list[str]:
        """The line for a status that has changed. systemd reads one line."""
        if text == self._last_status:
            return []
        self._last_status = text
        return ["STATUS=" + " ".join(text.split())]

    def ready(self, status: str) -> None:
        """The router serves."""
        self._send("READY=1", *self._status(status))

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """A reload of the configuration on SIGHUP is in progress.

        `Type=notify-reload` compares MONOTONIC_USEC with the time of its signal.
        """
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}")
        try:
            yield
        finally:
            self._send("READY=1")

    def stopping(self) -> None:
        """The router drains."""
        self._send("STOPPING=1", *self._status("draining"))

    async def run(self, status: Callable[[], str]) -> None:
        """Send the watchdog's messages and the status until cancelled.

        The messages come from the event loop that serves the requests: none is sent while it hangs.
        """
        if not self._environ.get("NOTIFY_SOCKET"):
            return
        pause = STATUS_INTERVAL
        if self._watchdog is not None:
            pause = min(pause, self._watchdog / 2)
        while True:
            alive = ["WATCHDOG=1"] if self._watchdog is not None else []
            if lines := [*alive, *self._status(status())]:
                self._send(*lines)
            await trio.sleep(pause)
