"""Connections that a worker hands over to the leader, and its turns to accept."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from vllm_router.runtime.workers.channel import Channel, pair
from vllm_router.runtime.workers.handover import HESITATION, LEAD, FairAccept, LeaderHandover
from vllm_router.runtime.workers.messages import Connection, Report, decode_from_worker
from vllm_router.runtime.workers.reporter import Reporter
from vllm_router.runtime.workers.shared_counters import CONNECTIONS, CounterView

PEM = Path(__file__).parents[2] / "data" / "localhost.pem"

ADDRESS = ("192.0.2.7", 4711)


def stream_of(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


@asynccontextmanager
async def handing_over() -> AsyncIterator[tuple[LeaderHandover, Reporter, Channel]]:
    """The worker's side, its reports, and the leader's end of the channel."""
    ours, theirs = map(Channel, pair())
    reporter = Reporter(ours)
    try:
        with trio.fail_after(60):
            yield LeaderHandover(ours, reporter), reporter, theirs
    finally:
        ours.close()
        theirs.close()


async def received(leader: Channel) -> tuple[Connection, trio.SocketStream]:
    data, fileno = await leader.receive()
    message = decode_from_worker(data)
    assert isinstance(message, Connection)
    assert fileno is not None
    return message, stream_of(socket.socket(fileno=fileno))


async def test_handover_plain_connection_is_passed_with_the_bytes_read():
    async with handing_over() as (handover, reporter, leader):
        client, accepted = socket.socketpair()
        with client:
            reporter.refused("seen_by_the_client")
            await handover.serve(stream_of(accepted), b"GET /met")
            assert accepted.fileno() == -1
            # The leader counts what the client has seen before it answers the client.
            report = decode_from_worker((await leader.receive())[0])
            assert isinstance(report, Report)
            assert report.refusals == ["seen_by_the_client"]
            message, stream = await received(leader)
            assert message == Connection(b"GET /met")
            async with stream:
                await stream.send_all(b"answer")
            assert client.recv(100) == b"answer"
            assert client.recv(100) == b""
        assert handover.connections == 0


async def test_handover_without_leader_closes_the_connection():
    async with handing_over() as (handover, _, leader):
        leader.close()
        client, accepted = socket.socketpair()
        with client:
            await handover.serve(stream_of(accepted), b"")
            assert client.recv(100) == b""


@asynccontextmanager
async def relayed() -> AsyncIterator[tuple[LeaderHandover, Any, Connection, trio.SocketStream]]:
    """A TLS client, the leader's message, and the leader's end of the relay."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    context.set_alpn_protocols(["http/1.1"])
    trusting = ssl.create_default_context(cafile=PEM)
    trusting.set_alpn_protocols(["http/1.1"])
    async with handing_over() as (handover, _, leader), trio.open_nursery() as nursery:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sock = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
        client = trio.SSLStream(stream_of(sock), trusting, server_hostname="localhost")
        server = trio.SSLStream(stream_of(accepted), context, server_side=True)
        nursery.start_soon(client.do_handshake)
        await server.do_handshake()
        nursery.start_soon(handover.serve, server, b"GET /met")
        message, stream = await received(leader)
        assert message.client == sock.getsockname()
        assert message.local == sock.getpeername()
        yield handover, client, message, stream
        nursery.cancel_scope.cancel()
        client.transport_stream.socket.close()
        stream.socket.close()


async def test_handover_tls_connection_is_relayed_both_ways_until_the_leader_ends_it():
    async with relayed() as (handover, client, message, leader):
        assert (message.data, message.alpn) == (b"GET /met", "http/1.1")
        assert handover.connections == 1
        await client.send_all(b"rics")
        assert await leader.receive_some() == b"rics"
        await leader.send_all(b"x" * 100_000)
        await leader.aclose()
        answer = b""
        while piece := await client.receive_some():  # to an orderly end of TLS
            answer += piece
        assert answer == b"x" * 100_000
        while handover.connections:
            await trio.sleep(0.001)


async def test_handover_tls_client_that_leaves_is_seen_by_the_leader():
    async with relayed() as (_, client, _, leader):
        await trio.aclose_forcefully(client)
        with pytest.raises(trio.BrokenResourceError):
            while await leader.receive_some():
                pass
            await leader.send_all(b"x" * 10_000_000)


async def test_handover_abort_ends_relays():
    async with relayed() as (handover, _, _, leader):
        handover.abort()
        assert await leader.receive_some() == b""
        assert handover.connections == 0


# -- turns to accept ------------------------------------------------------------------------------


class Counters:
    """Counts of connections; the other workers' smallest is `others`."""

    def __init__(self, others: int) -> None:
        self.others = others
        self.mine: dict[int, int] = {}

    def fewest(self, column: int) -> int:
        assert column == CONNECTIONS
        return self.others

    def put(self, column: int, count: int) -> None:
        self.mine[column] = count


@pytest.mark.parametrize(
    ("others", "mine", "turn", "waits"),
    [
        (0, 0, LEAD, False),
        (0, LEAD - 1, 1, False),
        (0, LEAD, 1, True),
        (80, 0, 80 + LEAD + 10, False),
        (80, 80 + LEAD + 9, 1, False),
        (80, 80 + LEAD + 10, 1, True),
        (80, 500, 1, True),
    ],
)
async def test_fair_accept_worker_ahead_of_the_others_hesitates(
    autojump_clock, others: int, mine: int, turn: int, waits: bool
):
    counters = Counters(others)
    accept = FairAccept(cast("CounterView", counters))
    accept.count(mine)
    assert counters.mine == {CONNECTIONS: mine}
    began = trio.current_time()
    assert await accept.turn() == turn
    assert trio.current_time() - began == (HESITATION if waits else 0)


async def test_fair_accept_takes_what_others_have_gained_while_it_hesitated(autojump_clock):
    counters = Counters(0)
    accept = FairAccept(cast("CounterView", counters))
    accept.count(10)
    turns: list[int] = []

    async def take() -> None:
        turns.append(await accept.turn())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        counters.others = 16
    assert turns == [16 + LEAD + 2 - 10]
