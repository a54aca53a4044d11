"""Settings of Hypercorn for the router."""

from __future__ import annotations

import logging
from typing import Any

from hypercorn.config import Config

SERVER_LOG = logging.getLogger("vllm_router.hypercorn")

ALPN_PROTOCOLS = ["h2", "http/1.1"]

# Settings whose default breaks streams or bursts; keys are attributes of Hypercorn's Config.
TUNED: dict[str, Any] = {
    "alpn_protocols": ALPN_PROTOCOLS,
    "backlog": 2048,  # with 100, bursts waited for SYN retries
    "errorlog": SERVER_LOG,
    "graceful_timeout": 1.0,  # follows the router's own drain
    "h11_max_incomplete_size": 61440,
    "h2_max_concurrent_streams": 100,
    "include_server_header": False,
    "keep_alive_max_requests": 1_000_000,
    "keep_alive_timeout": 75.0,  # longer than the idle timeout of common load balancers
    "websocket_max_message_size": 65536,  # clients of the feed read and hardly write
    "websocket_ping_interval": 20.0,  # detects dashboards that have vanished
}


def tune(config: Config) -> None:
    """Replace Hypercorn's defaults; settings that the user has changed stay."""
    for name, value in TUNED.items():
        if name not in vars(config) and getattr(config, name) == getattr(Config, name):
            setattr(config, name, value)
