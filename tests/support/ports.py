"""Free ports for programs that cannot choose one themselves."""

from __future__ import annotations

import random
import socket

_BELOW = 32768
"""Where Linux begins to give ports to clients: one of those could be taken before its use."""


def free_port() -> int:
    """A port of 127.0.0.1 without a listener."""
    while True:
        port = random.randrange(10_000, _BELOW)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
