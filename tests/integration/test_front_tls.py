"""TLS at the front: memory, fairness, and clean shutdown."""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import sys
from collections.abc import Iterator

import hypercorn.trio
import hypercorn.trio.run
import pytest
import trio
import trio.testing
from hypercorn.config import Config

from integration.test_front_handover import PEM, over_tls, server_tls
from support.front_harness import (
    CHAT,
    HOST,
    QUICK,
    Application,
    Client,
    Limits,
    Running,
    connected,
    get,
    post,
    running,
    soon,
)
from vllm_router.http.hypercorn.patch import install
from vllm_router.http.server import tls_stream
from vllm_router.http.server.tls_stream import Handshakes


def client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


HELLO = client_hello()


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """The server's TLS objects of the block are freed without the garbage collector."""
    gc.collect()
    before = server_ends()
    gc.disable()
    try:
        yield
        after = server_ends()
    finally:
        gc.enable()
    assert after == before


def server_ends() -> int:
    return sum(isinstance(one, ssl.SSLObject) and one.server_side for one in gc.get_objects())


# -- ends of TLS connections --------------------------------------------------------------------


async def hello_and_leave(port: int) -> None:
    async with connected(port) as client:
        await client.send(HELLO)


async def hello_and_reset(port: int) -> None:
    async with connected(port) as client:
        await client.send(HELLO)
        await client.stream.receive_some()
        linger = (1).to_bytes(4, "little") + bytes(4)
        client.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


async def half_a_hello(port: int) -> None:
    async with connected(port) as client:
        await client.send(HELLO[:50])


async def no_tls_at_all(port: int) -> None:
    async with connected(port) as client:
        await client.send(b"\x16" * 100)
        await client.rest()


async def hello_and_then_nothing(port: int) -> None:
    async with connected(port) as client:
        await client.send(HELLO)
        with contextlib.suppress(trio.BrokenResourceError):
            await client.rest()


async def handshake_and_leave(port: int) -> None:
    await trio.aclose_forcefully(await over_tls(port))


async def request_and_leave(port: int) -> None:
    stream = await over_tls(port)
    client = Client(stream)
    await client.send(post())
    assert (await client.reply()).status == 200
    await trio.aclose_forcefully(stream)


async def request_and_close(port: int) -> None:
    stream = await over_tls(port)
    client = Client(stream)
    await client.send(post(CHAT, b"{}", b"Connection: close"))
    assert (await client.reply()).status == 200
    await client.closed()
    await stream.aclose()


async def page_and_leave(port: int) -> None:
    stream = await over_tls(port)
    client = Client(stream)
    await client.send(get("/page"))
    assert (await client.reply("GET")).status == 200
    await trio.aclose_forcefully(stream)


async def half_a_body(port: int) -> None:
    stream = await over_tls(port)
    await stream.send_all(post(CHAT, b"{}" * 100)[:-50])
    await trio.aclose_forcefully(stream)


async def http2_and_leave(port: int) -> None:
    stream = await over_tls(port, "h2")
    await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
    await stream.receive_some()
    await trio.aclose_forcefully(stream)


ENDINGS = [
    hello_and_leave,
    hello_and_reset,
    half_a_hello,
    no_tls_at_all,
    hello_and_then_nothing,
    handshake_and_leave,
    request_and_leave,
    request_and_close,
    page_and_leave,
    half_a_body,
    http2_and_leave,
]


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
async def test_tls_ended_connection_leaves_no_garbage(kind, ending):
    if kind == "hypercorn" and ending is half_a_body and sys.version_info < (3, 11, 5):
        pytest.skip("before Python 3.11.5, a cancelled nursery's frame waits for the collector")
    limits = Limits(linger=0.3, max_linger=2.0, header_timeout=0.5)
    async with running(kind, ssl_context=server_tls(), tls_only=True, limits=limits) as on:
        await ending(on.port)  # objects that are made once
        await all_ended(on, accepted=1)
        with no_garbage():
            for _ in range(3):
                await ending(on.port)
            await all_ended(on, accepted=4)


async def all_ended(on: Running, accepted: int) -> None:
    """Wait for the connections' end; a client may have left before its own was accepted."""
    await soon(lambda: on.front.statistics().accepted == accepted and not on.front.connections)


# -- handshakes in progress ---------------------------------------------------------------------


async def test_handshakes_beyond_limit_end_the_oldest(monkeypatch):
    monkeypatch.setattr("vllm_router.http.server.dispatcher.Handshakes", lambda: Handshakes(3))
    async with running(ssl_context=server_tls(), tls_only=True) as on:
        async with contextlib.AsyncExitStack() as stack:
            clients = []
            for number in range(5):
                clients.append(await stack.enter_async_context(connected(on.port)))
                await clients[-1].send(HELLO)
                await clients[-1].stream.receive_some()  # its handshake is in progress
                await soon(lambda n=number: on.front.connections == min(n + 1, 3))
            for client in clients[:2]:
                assert await client.closed()
            await request_and_leave(on.port)


async def computed_per_turn(count: int, *, begun: bool) -> list[int]:
    """The number of handshakes computed in each turn of the loop."""
    computed: list[int] = []
    turns: list[int] = []
    handshakes = Handshakes()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handshakes.run)

            async def one(number: int) -> None:
                assert await handshakes.step(ours.fileno(), begun=begun)
                computed.append(number)

            for number in range(count):
                nursery.start_soon(one, number)
            while len(computed) < count:
                before = len(computed)
                await trio.lowlevel.checkpoint()
                turns.append(len(computed) - before)
            nursery.cancel_scope.cancel()
    return turns


@pytest.mark.parametrize(
    ("begun", "most"), [(False, tls_stream.NEW_PER_TURN), (True, tls_stream.BEGUN_PER_TURN)]
)
async def test_handshakes_many_at_once_compute_a_few_per_turn(begun, most):
    turns = await computed_per_turn(100, begun=begun)
    assert max(turns) <= 2 * most  # the order within a turn is random
    assert sum(turns) == 100


async def test_handshakes_of_disconnected_clients_take_no_turn():
    handshakes = Handshakes()
    ours, theirs = socket.socketpair()
    theirs.close()
    seen = []
    with ours:
        async with trio.open_nursery() as nursery:

            async def one() -> None:
                seen.append(await handshakes.step(ours.fileno(), begun=False))

            for _ in range(tls_stream.SKIPPED_PER_TURN):
                nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(handshakes.run)
            for _ in range(4):
                await trio.lowlevel.checkpoint()
            assert seen == [False] * tls_stream.SKIPPED_PER_TURN
            nursery.cancel_scope.cancel()


async def test_handshake_of_disconnected_client_is_not_computed(monkeypatch):
    async with running(ssl_context=server_tls(), tls_only=True) as on:
        answered = []
        real = trio.SocketStream.send_all

        async def counted(stream, data):
            answered.append(data)
            await real(stream, data)

        sock = socket.create_connection((HOST, on.port))
        sock.sendall(HELLO)
        sock.close()
        monkeypatch.setattr(trio.SocketStream, "send_all", counted)
        await soon(lambda: on.front.statistics().accepted == 1 and not on.front.connections)
        assert answered == []


# -- orderly ends (RFC 9112 9.8) ----------------------------------------------------------------


async def strictly(port: int, *protocols: str) -> trio.SSLStream[trio.SocketStream]:
    """A client that treats an end without close_notify as an attack."""
    context = ssl.create_default_context(cafile=PEM)
    context.set_alpn_protocols(list(protocols) or ["http/1.1"])
    transport = await trio.open_tcp_stream(HOST, port)
    stream = trio.SSLStream(transport, context, server_hostname="127.0.0.1")
    await stream.do_handshake()
    return stream


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
@pytest.mark.parametrize(
    "request_bytes",
    [
        post(CHAT, b"{}", b"Connection: close"),
        post(CHAT, b"{}", version="1.0"),
        get("/page", b"Connection: close"),
        b"nonsense\r\n\r\n",
        post("/v1/early", b"x" * 100_000, b"Expect: 100-continue")[:-90_000],
    ],
    ids=["close", "http/1.0", "page", "refused", "early answer"],
)
async def test_tls_end_sends_close_notify(kind, request_bytes):
    async with running(kind, ssl_context=server_tls(), limits=QUICK) as on:
        stream = await strictly(on.port)
        client = Client(stream)
        await client.send(request_bytes)
        answer = await client.rest()  # raises BrokenResourceError without close_notify
        assert answer.startswith(b"HTTP/1.1 ")
        await trio.aclose_forcefully(stream)


async def test_tls_end_on_closed_socket_is_silent():
    async with running(ssl_context=server_tls(), limits=QUICK) as on:
        stream = await strictly(on.port)
        stream.transport_stream.socket.shutdown(socket.SHUT_RDWR)
        transport = await tls_stream.end_tls(stream)
        await transport.aclose()


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
async def test_tls_early_response_reaches_client_still_sending(kind):
    async with running(kind, ssl_context=server_tls(), limits=QUICK) as on:
        stream = await strictly(on.port)
        client = Client(stream)
        head = b"POST /v1/early HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n"
        await client.send(head)
        async with trio.open_nursery() as nursery:

            async def go_on() -> None:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while True:
                        await stream.send_all(bytes(16384))

            nursery.start_soon(go_on)
            assert (await client.reply()).status == 413
            nursery.cancel_scope.cancel()
        await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
@pytest.mark.parametrize("shape", ["length", "chunks"])
async def test_tls_body_cut_without_close_notify_is_truncated(kind, shape):
    async with running(kind, ssl_context=server_tls(), limits=QUICK) as on:
        stream = await over_tls(on.port)
        if shape == "length":
            await stream.send_all(post(CHAT, b"{}" * 100)[:-10])
        else:
            head = b"POST %b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            await stream.send_all(head % CHAT.encode() + b"2\r\n{}\r\n")
        await soon(lambda: on.app.active)
        await stream.transport_stream.aclose()
        await soon(lambda: not on.app.active and not on.front.connections)
        assert on.app.requests == []


async def test_tls_drain_ends_idle_connections_with_close_notify():
    async with running(ssl_context=server_tls(), limits=QUICK) as on:
        stream = await strictly(on.port)
        client = Client(stream)
        await client.send(post())
        assert (await client.reply()).status == 200
        on.front.stop_accepting()
        on.front.begin_drain()
        assert await client.rest() == b""
        await trio.aclose_forcefully(stream)


# -- Hypercorn alone ----------------------------------------------------------------------------


async def test_handshakes_of_hypercorn_alone_take_turns(monkeypatch):
    """`hypercorn --certfile` with the router's application."""
    for module, name in [
        (hypercorn.trio.run, "TCPServer"),
        (hypercorn.trio.run, "worker_serve"),
        (hypercorn.trio, "worker_serve"),
    ]:
        monkeypatch.setattr(module, name, getattr(module, name))
    install()
    steps: list[bool] = []
    real = Handshakes.step

    async def counted(self: Handshakes, fileno: int, *, begun: bool) -> bool:
        steps.append(begun)
        return await real(self, fileno, begun=begun)

    monkeypatch.setattr(Handshakes, "step", counted)
    stop = trio.Event()
    config = Config()
    config.bind = [f"{HOST}:0"]
    config.certfile = config.keyfile = str(PEM)

    async def serve(task_status=trio.TASK_STATUS_IGNORED) -> None:
        await hypercorn.trio.serve(
            Application(), config, shutdown_trigger=stop.wait, mode="asgi", task_status=task_status
        )

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            binds = await nursery.start(serve)
            port = int(binds[0].rsplit(":", 1)[1])
            for _ in range(2):
                stream = await strictly(port)
                await stream.send_all(post("/v1/score", b"{}", b"Connection: close"))
                assert b" 200 " in await stream.receive_some()
                await trio.aclose_forcefully(stream)
            async with connected(port) as client:  # no TLS: its handshake fails alone
                await client.send(b"GET / HTTP/1.1\r\n\r\n")
                assert await client.closed()
            stop.set()
    assert steps.count(False) == 3
    assert True in steps
    gc.collect()  # a socket that was not closed is a warning, and so a failure
