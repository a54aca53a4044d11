"""The lane's `Outlet` on a socket: bodies and pieces that pass without a wait."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from vllm_router.http.asgi_types import OUTLET
from vllm_router.http.server.asgi_connection import ClientDisconnected
from vllm_router.http.server.lane import Lane
from vllm_router.http.server.socket_connection import SocketConnection

pytestmark = pytest.mark.usefixtures("socket_kind")

HEAD = b"POST /v1/x HTTP/1.1\r\nhost: r\r\ncontent-length: 5\r\n\r\n"
START = {"type": "http.response.start", "status": 200, "headers": []}
PIECE = bytes(100_000)

Play = Callable[[SocketConnection, Any, Any], Awaitable[None]]


class Peer:
    """The client's end of the connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = trio.socket.from_stdlib_socket(sock)

    async def until(self, end: bytes) -> bytes:
        data = b""
        while not data.endswith(end):
            more = await self.socket.recv(1_000_000)
            assert more, data
            data += more
        return data


@asynccontextmanager
async def served(play: Play) -> AsyncIterator[Peer]:
    """A client of the lane whose application does this with its outlet."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await play(scope["extensions"][OUTLET], receive, send)

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    peer = Peer(theirs)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(SocketConnection(Lane(app), ours).run)
            yield peer
            peer.socket.close()


async def test_outlet_whole_body_and_response_pass_in_one_piece_each():
    async def play(outlet: SocketConnection, receive: Any, send: Any) -> None:
        body = outlet.whole_body()
        assert outlet.whole_body() is None, "received once"
        assert outlet.send_whole(START, {"type": "http.response.body", "body": body})
        assert (await receive())["type"] == "http.disconnect"

    async with served(play) as peer:
        for _ in range(2):
            await peer.socket.send(HEAD + b"hello")
            assert b"\r\ncontent-length: 5\r\n" in await peer.until(b"hello")


async def test_outlet_response_of_whole_body_wakes_a_waiting_receive():
    heard: list[str] = []

    async def play(outlet: SocketConnection, receive: Any, send: Any) -> None:
        async def wait() -> None:
            heard.append((await receive())["type"])

        outlet.whole_body()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            outlet.send_whole(START, {"type": "http.response.body", "body": b"yes"})

    async with served(play) as peer:
        await peer.socket.send(HEAD + b"hello")
        await peer.until(b"yes")
        await wait_all_tasks_blocked()
    assert heard == ["http.disconnect"]


async def test_outlet_has_no_body_before_all_of_it_has_arrived():
    async def play(outlet: SocketConnection, receive: Any, send: Any) -> None:
        assert outlet.whole_body() is None
        body = b""
        more = True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        assert outlet.whole_body() is None
        outlet.send_whole(START, {"type": "http.response.body", "body": body})

    async with served(play) as peer:
        await peer.socket.send(HEAD + b"he")
        await wait_all_tasks_blocked()
        await peer.socket.send(b"llo")
        assert (await peer.until(b"hello")).startswith(b"HTTP/1.1 200 ")


async def test_outlet_response_before_the_end_of_the_body_closes():
    async def play(outlet: SocketConnection, receive: Any, send: Any) -> None:
        outlet.send_whole(START, {"type": "http.response.body", "body": b"early"})

    async with served(play) as peer:
        await peer.socket.send(HEAD + b"he")
        assert b"\r\nconnection: close\r\n" in await peer.until(b"early")


async def test_outlet_parts_wait_for_a_slow_client():
    sent = 0

    async def play(outlet: SocketConnection, receive: Any, send: Any) -> None:
        nonlocal sent
        await send(START)
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        while outlet.send_part(PIECE):
            sent += 1
        sent += 1
        await outlet.caught_up()
        assert not outlet.has_output()
        await send({"type": "http.response.body", "body": b"last"})

    async with served(play) as peer:
        await peer.socket.send(HEAD + b"hello")
        await wait_all_tasks_blocked()
        assert sent > 0
        data = await peer.until(b"4\r\nlast\r\n0\r\n\r\n")
        assert data.count(b"186a0\r\n") == sent
        assert b"5\r\nfirst\r\n186a0\r\n" in data


async def test_outlet_of_client_that_left_sends_nothing():
    ended = trio.Event()

    async def play(outlet: SocketConnection, receive: Any, send: Any) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        with trio.CancelScope(shield=True):
            await left.wait()
            await wait_all_tasks_blocked()
            assert outlet.whole_body() is None
            assert not outlet.send_part(PIECE)
            assert not outlet.send_whole(START, {"type": "http.response.body", "body": b"x"})
            ended.set()
        with pytest.raises(ClientDisconnected):
            with trio.CancelScope(shield=True):
                await outlet.caught_up()
        await trio.sleep_forever()

    left = trio.Event()
    async with served(play) as peer:
        await peer.socket.send(HEAD + b"hello")
        await peer.until(b"first\r\n")
        peer.socket.close()
        left.set()
        await ended.wait()
