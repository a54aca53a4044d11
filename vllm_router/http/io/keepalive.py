"""Ends of silent and stalled connections by the kernel: TCP keepalive and TCP_USER_TIMEOUT."""

from __future__ import annotations

import socket

IDLE, INTERVAL, PROBES = 60, 15, 4
"""Seconds of silence before the first probe, seconds between probes, and unanswered probes after
which the connection fails: 120 s together.

Load balancers and NAT gateways drop connections that are silent for 60 s (nginx), 240 s (Azure) or
350 s (AWS) without notice to either side.
"""

_MAX_STALL_MS = 2**31 - 1
"""Largest TCP_USER_TIMEOUT of the kernel: 24 days."""


def enable_keepalive(sock: socket.socket) -> None:
    """Probe silent connections. Sockets accepted from a listening socket inherit it (Linux)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)


def end_when_stalled_for(sock: socket.socket, seconds: float) -> None:
    """Sent bytes may stay unacknowledged so long; accepted sockets inherit it (Linux)."""
    # Not below 1 ms: 0 stands for the system's default, which is 15 minutes.
    milliseconds = max(1, int(min(seconds * 1000, _MAX_STALL_MS)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
