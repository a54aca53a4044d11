"""First and last bytes of a connection, and how long it stays open."""

from __future__ import annotations

import socket

import h2.errors
import h2.events
import pytest
import trio
import trio.testing

from integration.test_hypercorn_bridge import H2Client
from support.front_harness import (
    CHAT,
    PATIENCE,
    QUICK,
    Limits,
    chunked,
    connected,
    get,
    post,
    running,
    soon,
)
from vllm_router.http.chunked import MAX_PIECES, ChunkedBody
from vllm_router.http.server.listener import Listener
from vllm_router.routing.paths import is_inference

KINDS = ["lane", "hypercorn"]

# -- bytes behind the last request (RFC 9112 9.6) ------------------------------------------------

BEHIND = {
    "a request": get("/other"),
    "nonsense": b"\0\1nonsense" * 100,
    "empty lines": b"\r\n" * 100,
    "a megabyte": b"x" * 1_000_000,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize(
    "last",
    [
        get("/page", b"Connection: close"),
        b"GET /page HTTP/1.0\r\n\r\n",
        post(CHAT, b"{}", b"Connection: close"),
        post(CHAT, b"{}", version="1.0"),
        post("/page", b"{}", b"Connection: close"),
    ],
    ids=["close", "http/1.0", "chat close", "chat http/1.0", "body close"],
)
async def test_front_last_request_with_bytes_after_it_is_answered(kind, behind, last):
    async with running(kind) as on, connected(on.port) as client:
        await client.send(last)
        sent = trio.Event()

        async def send_more() -> None:
            with trio.move_on_after(PATIENCE):
                try:
                    await client.send(BEHIND[behind])
                except trio.BrokenResourceError:
                    pass
                sent.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_more)
            reply = await client.reply(last.partition(b" ")[0].decode())
            assert reply.status == 200
            assert reply.headers["connection"] == "close"
            await sent.wait()
        assert len(on.app.requests) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_front_last_request_and_bytes_in_one_segment_is_answered(kind):
    async with running(kind) as on, connected(on.port) as client:
        await client.send(get("/page", b"Connection: close") + get("/other"))
        assert (await client.reply("GET")).status == 200
        assert await client.closed()
        assert len(on.app.requests) == 1


# -- GOAWAY (RFC 9113 6.8) -----------------------------------------------------------------------


@pytest.mark.parametrize("code", [h2.errors.ErrorCodes.NO_ERROR, h2.errors.ErrorCodes.CANCEL])
async def test_goaway_lets_running_requests_finish_then_closes(code):
    async with running() as on, connected(on.port) as raw:
        client = H2Client(raw)
        waiting, streaming = client.request(b"/v1/hang"), client.request(b"/v1/stream")
        await client.flush()
        await soon(lambda: on.app.active == 2)
        await raw.send(goaway(client, code))
        # The client goes on with its running streams.
        client.h2.increment_flow_control_window(1000, streaming)
        client.h2.ping(b"12345678")
        on.app.release.set()
        assert await client.statuses(waiting, streaming) == {waiting: b"200", streaming: b"200"}
        rest = await client.ending()
        assert any(isinstance(event, h2.events.ConnectionTerminated) for event in rest)
        await soon(lambda: not on.front.connections)
        assert on.app.completed == 2


async def test_goaway_on_idle_connection_closes_it():
    async with running() as on, connected(on.port) as raw:
        client = H2Client(raw)
        one = client.request()
        assert await client.statuses(one) == {one: b"200"}
        await raw.send(goaway(client))
        await client.ending()
        await soon(lambda: not on.front.connections)


async def test_goaway_client_disconnect_cancels_requests():
    async with running() as on:
        async with connected(on.port) as raw:
            client = H2Client(raw)
            client.request(b"/v1/hang")
            await client.flush()
            await soon(lambda: on.app.active)
            await raw.send(goaway(client))
        await soon(lambda: not on.app.active and not on.front.connections)


async def test_goaway_flood_is_harmless():
    async with running() as on, connected(on.port) as raw:
        client = H2Client(raw)
        waiting = client.request(b"/v1/hang")
        await client.flush()
        await soon(lambda: on.app.active)
        await raw.send(goaway(client) * 5000)
        on.app.release.set()
        assert await client.statuses(waiting) == {waiting: b"200"}


def goaway(client: H2Client, code: int = 0) -> bytes:
    """A GOAWAY frame by hand: h2's own client would end all its streams with it."""
    return bytes([0, 0, 8, 7, 0, 0, 0, 0, 0]) + bytes(4) + int(code).to_bytes(4, "big")


# -- silence -------------------------------------------------------------------------------------


async def test_front_accepted_sockets_have_keepalive():
    front = Listener(None, accepts=is_inference)  # type: ignore[arg-type]
    (_, port), *_ = front.open("127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", port)):
        (listener,) = front.listeners
        with trio.fail_after(PATIENCE):
            await trio.lowlevel.wait_readable(listener)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 15
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 4
    front.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [CHAT, "/page"])
async def test_front_idle_connection_is_closed_after_configured_time(kind, path):
    limits = Limits(keep_alive_timeout=0.5, linger=0.3)
    async with running(kind, limits=limits) as on, connected(on.port) as client:
        await client.send(post(path))
        assert (await client.reply()).status == 200
        assert await client.closed()


@pytest.mark.parametrize("kind", KINDS)
async def test_front_new_limits_apply_to_new_connections(kind):
    async with running(kind, limits=QUICK) as on:
        on.front.use_limits(Limits(keep_alive_timeout=0.5, linger=0.3, write_stall_timeout=5))
        async with connected(on.port) as client:
            await client.send(post("/page"))
            assert (await client.reply()).status == 200
            assert await client.closed()
        (listener,) = on.front.listeners
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seconds", "milliseconds"), [(1e308, 2**31 - 1), (1e-300, 1)])
async def test_front_extreme_write_stall_timeout_is_cut_to_what_the_kernel_takes(
    kind, seconds, milliseconds
):
    async with running(kind, limits=Limits(write_stall_timeout=seconds)) as on:
        (listener,) = on.front.listeners
        found = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert found == milliseconds
        async with connected(on.port) as client:
            await client.send(post("/page"))
            assert (await client.reply()).status == 200


# -- bodies in very small pieces -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [CHAT, "/page"])
async def test_front_body_in_one_byte_chunks_lets_others_run(kind, path):
    body = bytes(range(256)) * 40
    async with running(kind) as on, connected(on.port) as client, connected(on.port) as other:
        await client.send(chunked(path, *(bytes([byte]) for byte in body)) + get("/next"))
        await other.send(post())
        assert (await other.reply()).status == 200
        assert (await client.reply()).status == 200
        assert (await client.reply("GET")).status == 200
        assert body in [received for _, _, received in on.app.requests]


def test_chunked_body_feed_stops_after_piece_limit():
    data = b"1\r\na\r\n" * (2 * MAX_PIECES) + b"0\r\n\r\nnext"
    chunks, found, calls = ChunkedBody(), b"", 0
    while not chunks.complete:
        pieces, used = chunks.feed(data)
        assert len(pieces) <= MAX_PIECES
        found += b"".join(pieces)
        data = data[used:]
        calls += 1
    assert (found, data, calls) == (b"a" * 2 * MAX_PIECES, b"next", 2)
