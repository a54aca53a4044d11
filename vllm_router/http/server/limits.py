"""`Limits`: the resources and the time that one client may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Times in seconds. A violated limit ends the connection, with the named status if any."""

    max_head_bytes: int = 61440
    """Size of request line and fields together; 431 beyond."""
    header_timeout: float = 9.0
    """From the first byte of a head to its last; 408 after."""
    keep_alive_timeout: float = 75.0
    """Silence between requests, or before the first."""
    body_read_timeout: float = 60.0
    """Silence within a body; 408 after."""
    min_body_rate: float = 500.0
    """Bytes per second a body must average once `body_read_timeout` has passed; 408 below."""
    write_stall_timeout: float = 60.0
    """Sent bytes may stay unacknowledged so long (TCP_USER_TIMEOUT), then the connection ends."""
    websocket_stall_timeout: float = 20.0
    """The same for websockets, which send all the time."""
    max_read_ahead: int = 65536
    """Bytes of a TLS connection that wait for the application before reading pauses. On plain
    sockets the kernel buffers unread input."""
    linger: float = 2.0
    """Silence, while closing on a client that still sends, after which the connection is cut."""
    max_linger: float = 30.0
    """The longest time spent on such a client."""

    def check_interval(self) -> float:
        """Seconds between two checks of all deadlines."""
        shortest = min(self.header_timeout, self.keep_alive_timeout, self.body_read_timeout)
        return min(0.5, shortest / 4)
