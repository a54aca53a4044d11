"""All tables of hostile inputs by name."""

from __future__ import annotations

from support.hostile_bodies import BODIES
from support.hostile_http1 import HTTP1
from support.hostile_http2 import HTTP2
from support.hostile_servers import SERVERS
from support.hostile_tls import TLS
from support.hostile_websocket import WEBSOCKET

TABLES = {
    "http1": HTTP1,
    "http2": HTTP2,
    "websocket": WEBSOCKET,
    "tls": TLS,
    "bodies": BODIES,
    "servers": SERVERS,
}
