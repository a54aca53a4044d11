"""A request head, and what parsing it gives."""

from __future__ import annotations

from vllm_router.http.request_head import Head, read_head
from vllm_router.http.request_line import request_line

HEAD = b"POST /v1/score?q=1 HTTP/1.1\r\nHost: h\r\nContent-Length: %b\r\nX-Y:  z \r\n\r\n"


def parsed(data: bytes) -> Head:
    return read_head(data, request_line(data[: data.find(b"\r\n")]))


def seen(head: Head) -> tuple[object, ...]:
    return (
        head.method,
        head.path,
        head.query,
        head.http_version,
        head.headers,
        head.content_length,
        head.chunked,
        head.keep_alive,
        head.expects_continue,
    )
