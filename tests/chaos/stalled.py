"""Clients that request a long response and then read none of it."""

from __future__ import annotations

import json
import socket

from support.router_process import chat


def stalled_reader(port: int, tokens: int, **more: object) -> socket.socket:
    """A connection with a stream of `tokens` tokens and the smallest possible receive buffer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", port))
    body = json.dumps(chat(stream=True, max_tokens=tokens, **more)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return sock
