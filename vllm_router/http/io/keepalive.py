"""Probes that the kernel sends on a silent connection."""

from __future__ import annotations

import socket

IDLE, INTERVAL, PROBES = 60, 15, 4
"""Seconds of silence before the first probe, seconds between two, unanswered ones that end it.

Load balancers and NAT gateways forget connections that are silent for 60 s (nginx), 240 s (Azure)
or 350 s (AWS) and tell neither side.
"""


def enable_keepalive(sock: socket.socket) -> None:
    """Have silent connections probed; of a listening socket, all that it accepts (Linux)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
