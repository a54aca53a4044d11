"""A truncated response to HTTP/1.0: all sent bytes arrive, then a reset shows the truncation.

Only a reset shows such a client (nginx with a plain proxy_pass, for one) that the body is cut.
"""

from __future__ import annotations

import socket

import pytest
import trio

from support.front_harness import HOST, QUICK, part, running, start
from vllm_router.http.server.limits import Limits

pytestmark = pytest.mark.usefixtures("socket_kind")

SIZE = 400_000
PIECE = b"x" * 8_000


def breaks_off_after(size: int):
    async def app(scope, receive, send) -> None:
        await receive()
        await start(send, 200, (b"content-type", b"text/event-stream"))
        for _ in range(size // len(PIECE)):
            await part(send, PIECE)

    return app


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
async def test_truncated_response_reaches_slow_http_1_0_client_before_reset(kind: str):
    limits = Limits(linger=30.0, max_linger=60.0)
    async with running(kind, app=breaks_off_after(SIZE), limits=limits) as front:
        client = trio.socket.socket()
        with client:
            # A small window, so that most of the response waits at the router.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await client.connect((HOST, front.port))
            await client.send(b"POST /v1/completions HTTP/1.0\r\ncontent-length: 0\r\n\r\n")
            received = b""
            with pytest.raises(ConnectionResetError):
                while data := await client.recv(4096):
                    received += data
                    await trio.sleep(0.001)
            assert len(received.partition(b"\r\n\r\n")[2]) == SIZE


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
async def test_truncated_response_reset_does_not_wait_for_stalled_client(kind: str):
    # As much as the kernel takes, so that the application is not blocked.
    async with running(kind, app=breaks_off_after(2 * len(PIECE)), limits=QUICK) as front:
        client = trio.socket.socket()
        with client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await client.connect((HOST, front.port))
            await client.send(b"POST /v1/completions HTTP/1.0\r\ncontent-length: 0\r\n\r\n")
            while front.front.statistics().accepted == 0:
                await trio.sleep(0.01)
            while front.front.connections:
                await trio.sleep(0.01)
