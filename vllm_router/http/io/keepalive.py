"""TCP keepalive: the kernel probes silent connections."""

from __future__ import annotations

import socket

IDLE, INTERVAL, PROBES = 60, 15, 4
"""Seconds of silence before the first probe, seconds between probes, and unanswered probes after
which the connection fails: 120 s together.

Load balancers and NAT gateways drop connections that are silent for 60 s (nginx), 240 s (Azure) or
350 s (AWS) without notice to either side.
"""


def enable_keepalive(sock: socket.socket) -> None:
    """Probe silent connections. Sockets accepted from a listening socket inherit it (Linux)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
