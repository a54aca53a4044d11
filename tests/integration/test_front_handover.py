"""Handover from the lane to Hypercorn without losing a byte.

Also TLS and plain on one port, and listeners.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import ssl
from pathlib import Path

import pytest
import trio
import trio.testing

from support.front_harness import (
    CHAT,
    HOST,
    PATIENCE,
    Application,
    Client,
    connected,
    get,
    post,
    running,
    soon,
)
from vllm_router.http.server import listener
from vllm_router.http.server.limits import Limits
from vllm_router.http.server.listener import Listener
from vllm_router.routing.paths import is_inference

# A test key and certificate for localhost, valid for a hundred years.
PEM = Path(__file__).parents[1] / "data" / "localhost.pem"


async def test_handover_first_request_of_other_kind_moves_connection():
    async with running() as on, connected(on.port) as client:
        await client.send(get("/metrics"))
        assert (await client.reply("GET")).json()["path"] == "/metrics"
        seen = on.front.statistics()
        assert (seen.handed_over, seen.hypercorn, seen.lane) == (1, 1, 0)
        await client.send(post())
        assert (await client.reply()).status == 200
        assert on.front.statistics().lane_requests == 0


async def test_handover_later_request_moves_connection_with_rest():
    async with running() as on, connected(on.port) as client:
        bodies = [b"%d" % number * 1000 for number in range(6)]
        data = post(CHAT, bodies[0]) + post(CHAT, bodies[1])
        data += post("/elsewhere", bodies[2]) + post(CHAT, bodies[3])
        data += get("/page") + post(CHAT, bodies[4]) + post("/elsewhere", bodies[5])
        await client.send(data)
        sent = [(await client.reply()).json()["body"].encode() for _ in range(7)]
        assert sent == [*bodies[:4], b"", *bodies[4:]]
        assert on.front.statistics().lane_requests == 2


@pytest.mark.parametrize("cut", [1, 5, 40, 83, 84, 90, 500])
async def test_handover_during_body_loses_nothing(cut):
    body = bytes(range(256)) * 40
    data = post("/elsewhere", body)
    async with running() as on, connected(on.port) as client:
        await client.send(post(CHAT, b"x") + data[:cut])
        await trio.testing.wait_all_tasks_blocked()  # the front has read the first part
        await client.send(data[cut:] + post(CHAT, b"y"))
        replies = [(await client.reply()).json()["body"].encode("latin-1") for _ in range(3)]
        assert replies == [b"x", body, b"y"]


async def test_handover_waits_for_earlier_response():
    async with running() as on, connected(on.port) as client:
        await client.send(post("/v1/hang") + get("/page"))
        await soon(lambda: on.app.active)
        await trio.testing.wait_all_tasks_blocked()
        assert on.app.started == 1
        on.app.release.set()
        assert (await client.reply()).json()["path"] == "/v1/hang"
        assert (await client.reply()).json()["path"] == "/page"


@pytest.mark.parametrize(
    "path",
    ["/v1/../pause", "/v1/%2e%2e/pause", "//pause", "/v1/chat%2fcompletions", "/%70ause", "/v1//x"],
)
async def test_handover_disguised_path_is_not_served_by_lane(path):
    async with running() as on, connected(on.port) as client:
        await client.send(post(path))
        await client.reply()
        assert on.front.statistics().lane_requests == 0
        assert on.app.requests == [("POST", path.encode(), b"{}")]


async def test_front_websocket_shares_port():
    from trio_websocket import open_websocket_url

    async with running() as on, connected(on.port) as plain:
        await plain.send(post())
        assert (await plain.reply()).status == 200
        async with open_websocket_url(f"ws://{HOST}:{on.port}/ws") as ws:
            await ws.send_message("hello")
            assert await ws.get_message() == "hello"


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
async def test_front_tls_and_plain_http_share_port(kind):
    async with running(kind, ssl_context=server_tls()) as on:
        async with connected(on.port) as plain:
            await plain.send(post())
            assert (await plain.reply()).json()["scheme"] == "http"
        stream = await over_tls(on.port)
        client = Client(stream)
        bodies = [b"x" * size for size in (1, 100_000)]
        for body in bodies:
            await client.send(post(CHAT, body))
            reply = await client.reply()
            assert (reply.json()["scheme"], len(reply.json()["body"])) == ("https", len(body))
        await client.send(get("/page"))
        assert (await client.reply("GET")).json()["scheme"] == "https"
        assert on.front.statistics().lane_requests == (3 if kind == "lane" else 0)
        await trio.aclose_forcefully(stream)
        await soon(lambda: not on.front.connections)


async def test_front_tls_client_disconnect_cancels_request():
    async with running(ssl_context=server_tls()) as on:
        stream = await over_tls(on.port)
        await stream.send_all(post("/v1/hang"))
        await soon(lambda: on.app.active)
        await trio.aclose_forcefully(stream)
        with trio.fail_after(PATIENCE):
            await soon(lambda: not on.app.active and not on.front.connections)


async def test_front_http2_is_negotiated_over_tls():
    async with running(ssl_context=server_tls()) as on:
        stream = await over_tls(on.port, "h2")
        assert stream.selected_alpn_protocol() == "h2"
        await trio.aclose_forcefully(stream)


async def test_front_plain_http_on_tls_port_is_refused():
    async with running(ssl_context=server_tls(), tls_only=True) as on:
        async with connected(on.port) as plain:
            await plain.send(post())
            try:
                assert not (await plain.rest()).startswith(b"HTTP/")
            except trio.BrokenResourceError:
                pass
        assert on.app.started == 0


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
async def test_front_tls_silent_connections_do_not_delay_drain(kind):
    """The time limit of a head is longer than the test's, so that waiting for it would fail."""
    limits = Limits(header_timeout=1000.0)
    async with running(kind, ssl_context=server_tls(), limits=limits) as on:
        async with connected(on.port) as silent:
            await soon(lambda: on.front._dispatcher._silent)
            on.front.stop_accepting()
            on.front.begin_drain()
            assert await silent.closed()
            await on.front.drained()


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
async def test_front_tls_just_accepted_connection_gets_time_in_drain(kind):
    """Its request may be on the way: the client connected while the router still listened."""
    limits = Limits(header_timeout=500.0, keep_alive_timeout=1000.0)
    async with running(kind, ssl_context=server_tls(), limits=limits) as on:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        on.front.begin_drain()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(on.front._dispatcher._first_byte, theirs)
            await soon(lambda: on.front._dispatcher._silent)
            (patience,) = on.front._dispatcher._silent
            assert 0 < patience.deadline - trio.current_time() <= 500
            ours.close()
        theirs.close()


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
async def test_front_tls_first_bytes_before_drain_are_served(kind):
    async with running(kind, ssl_context=server_tls()) as on, connected(on.port) as client:
        await soon(lambda: on.front.connections)
        await trio.testing.wait_all_tasks_blocked()
        os.write(client.stream.socket.fileno(), post())  # without a checkpoint for the front
        on.front.stop_accepting()
        on.front.begin_drain()
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
async def test_front_tls_unfinished_http_1_0_response_is_reset(kind):
    async with running(kind, ssl_context=server_tls()) as on:
        stream = await over_tls(on.port)
        client = Client(stream)
        await client.send(post("/v1/truncated", version="1.0"))
        with pytest.raises(trio.BrokenResourceError) as caught:
            await client.rest()
        assert isinstance(caught.value.__cause__, ConnectionResetError)
        await trio.aclose_forcefully(stream)


def server_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    return context


async def over_tls(port: int, *protocols: str) -> trio.SSLStream[trio.SocketStream]:
    context = ssl.create_default_context(cafile=PEM)
    context.set_alpn_protocols(list(protocols) or ["http/1.1"])
    stream = trio.SSLStream(
        await trio.open_tcp_stream(HOST, port),
        context,
        server_hostname="127.0.0.1",
        https_compatible=True,
    )
    await stream.do_handshake()
    return stream


# -- listeners ---------------------------------------------------------------------------------


def test_front_port_in_use_is_oserror_and_leaks_nothing():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        front = Listener(Application(), accepts=is_inference)
        with pytest.raises(OSError, match=r".") as caught:
            front.open("127.0.0.1", taken.getsockname()[1])
        assert caught.value.errno == errno.EADDRINUSE
        front.close()


def test_front_unknown_host_is_oserror():
    with pytest.raises(OSError, match=r"."):
        Listener(Application(), accepts=is_inference).open("no-such-host.invalid", 0)


async def test_front_adopted_socket_is_served():
    sock = socket.socket()
    sock.bind((HOST, 0))
    front = Listener(Application(), accepts=is_inference)
    _, port = front.adopt(sock.detach())
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(front.serve)
            async with connected(port) as client:
                await client.send(post())
                assert (await client.reply()).status == 200
            front.abort()


async def test_front_ipv6_is_served():
    front = Listener(Application(), accepts=is_inference)
    try:
        (host, port), *_ = front.open("::1", 0)
    except OSError as error:
        assert error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # noqa: PT017
        return
    assert host == "::1"
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(front.serve)
            stream = await trio.open_tcp_stream("::1", port)
            async with stream:
                client = Client(stream)
                await client.send(post())
                assert (await client.reply()).status == 200
            front.abort()


async def test_front_connections_beyond_limit_wait(caplog):
    async with running(max_connections=2) as on:
        async with connected(on.port), connected(on.port) as second, connected(on.port) as third:
            await soon(lambda: on.front.connections == 2)
            await third.send(post())
            await soon(
                lambda: "2 connections are open, the limit for file descriptors" in caplog.text
            )
            assert on.front.statistics().accepted == 2
            await second.stream.aclose()
            assert (await third.reply()).status == 200
            assert on.front.statistics().accepted == 3


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
async def test_front_idle_connections_are_closed_for_waiting_ones(kind, caplog):
    async with running(kind, max_connections=4) as on:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(connected(on.port)) for _ in range(12)]
            for client in clients:
                await client.send(post())
            for client in clients:
                assert (await client.reply()).status == 200
            busy = await stack.enter_async_context(connected(on.port))
            await busy.send(post("/v1/hang"))
            await soon(lambda: on.app.active)
            on.app.release.set()
            assert (await busy.reply()).status == 200
    assert caplog.text.count("the limit for file descriptors") == 1


async def test_front_out_of_descriptors_is_survived(caplog, monkeypatch):
    failures: list[OSError] = []
    take = Listener._take

    def counted(*given: object) -> None:
        try:
            take(*given)
        except BlockingIOError:
            raise
        except OSError as error:
            failures.append(error)
            raise

    monkeypatch.setattr(Listener, "_take", counted)
    monkeypatch.setattr(listener, "PAUSE_WHEN_EXHAUSTED", 0.001)
    async with running() as on:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        clients = [socket.socket() for _ in range(4)]
        lowest = min(sock.fileno() for sock in clients)
        highest = max(sock.fileno() for sock in clients)
        assert lowest < highest
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        try:
            for sock in clients:
                sock.connect((HOST, on.port))
            await soon(lambda: len(failures) > 3)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await soon(lambda: on.front.connections == 4)
        for sock in clients:
            sock.close()
        await soon(lambda: on.front.connections == 0)
    assert caplog.text.count("cannot accept") == 1
