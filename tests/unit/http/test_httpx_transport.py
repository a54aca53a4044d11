"""httpx over our own client: requests, responses, and reuse of connections."""

from __future__ import annotations

import gzip
import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import trio

from support.scripted_server import (
    END,
    MemoryPool,
    Script,
    ScriptedServer,
    Talk,
    answer,
    answering,
    chunk,
    ok,
    once,
    silent,
)
from vllm_router.errors import ConnectFailed
from vllm_router.http.client.httpx_transport import HttpxTransport, get_request
from vllm_router.http.client.pool import Doing, Pool
from vllm_router.runtime.probe_results import error_text


@asynccontextmanager
async def asking(script: Script) -> AsyncIterator[tuple[httpx.AsyncClient, ScriptedServer]]:
    async with trio.open_nursery() as nursery:
        server = ScriptedServer(nursery, script)
        carrier = HttpxTransport(MemoryPool(server))
        headers = {"authorization": "Bearer k"}
        base_url = "http://server.test:1/prefix"
        async with httpx.AsyncClient(
            base_url=base_url, headers=headers, timeout=None, transport=carrier
        ) as client:
            yield client, server
        await closed(server)
        nursery.cancel_scope.cancel()


async def closed(server: ScriptedServer) -> None:
    with trio.fail_after(1.0):
        while server.open:
            await trio.sleep(0.01)


async def test_httpx_transport_responses_share_one_connection(autojump_clock):
    async with asking(answering(ok(b"[1, 2]", b"x-a: b"))) as (client, server):
        for _ in range(3):
            response = await client.get("/health?x=1")
            assert (response.status_code, response.json()) == (200, [1, 2])
            assert response.headers["x-a"] == "b"
    assert len(server.talks) == 1
    first = server.requests[0]
    assert first.line == b"GET /prefix/health?x=1 HTTP/1.1"
    assert (first[b"host"], first[b"authorization"]) == (b"server.test:1", b"Bearer k")


@pytest.mark.parametrize("host", ["xn--a", "xn--ls8h.test:81"])
async def test_get_request_name_that_idna_refuses_is_sent_as_it_is(host: str, autojump_clock):
    async with asking(answering(ok(b""))) as (_, server), HttpxTransport(MemoryPool(server)) as one:
        response = await one.handle_async_request(get_request(f"http://{host}/x", {"a": "b"}))
        await response.aclose()
    (sent,) = server.requests
    assert (sent.line, sent[b"host"], sent[b"a"]) == (b"GET /x HTTP/1.1", host.encode(), b"b")


async def test_httpx_transport_refusal_has_status_and_body(autojump_clock):
    async with asking(answering(answer(404, b"no"))) as (client, _):
        response = await client.get("/health")
        assert (response.status_code, response.is_success, response.text) == (404, False, "no")


async def test_httpx_transport_head_request_waits_for_no_body(autojump_clock):
    announced = b"HTTP/1.1 405 Method Not Allowed\r\ncontent-length: 31\r\n\r\n"
    async with asking(answering(announced)) as (client, _):
        with trio.fail_after(10):
            response = await client.head("/is_sleeping")
        assert (response.status_code, response.content) == (405, b"")


async def test_httpx_transport_sends_request_body(autojump_clock):
    async with asking(answering(ok(b"{}"))) as (client, server):
        await client.post("/sleep", json={"level": 1})
    assert server.requests[0].body == b'{"level":1}'


async def test_httpx_transport_reads_chunked_and_compressed_body(autojump_clock):
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    pieces = [head, chunk(b"vllm:a 1\n"), chunk(b"vllm:b 2\n"), END]
    async with asking(answering(*pieces)) as (client, _), client.stream("GET", "/") as response:
        assert (
            b"".join([piece async for piece in response.aiter_bytes()]) == b"vllm:a 1\nvllm:b 2\n"
        )
    packed = ok(gzip.compress(b"vllm:a 1\n"), b"content-encoding: gzip")
    async with asking(answering(packed)) as (client, _):
        assert (await client.get("/")).text == "vllm:a 1\n"


async def test_httpx_transport_connection_closed_while_idle_is_replaced(autojump_clock):
    async def closes_at_the_second(talk: Talk) -> None:
        await talk.request()
        await talk.send(ok(b"{}"))
        await talk.request()

    async with asking(closes_at_the_second) as (client, server):
        for _ in range(3):
            assert (await client.get("/")).status_code == 200
    assert len(server.talks) == 3


async def test_httpx_transport_unread_response_closes_connection(autojump_clock):
    async with asking(once(ok(b"x" * 1000)[:-10])) as (client, server):
        async with client.stream("GET", "/"):
            pass
        with pytest.raises(httpx.ReadError, match="middle of the response"):
            await client.get("/")
    assert len(server.talks) == 2


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (once(), httpx.ReadError),
        (once(b"HTTP/1.1 2"), httpx.RemoteProtocolError),
        (once(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), httpx.RemoteProtocolError),
    ],
)
async def test_httpx_transport_invalid_response_raises_httpx_error(autojump_clock, script, error):
    async with asking(script) as (client, _):
        with pytest.raises(error):
            await client.get("/")


async def test_httpx_transport_refused_connection_raises_httpx_error_with_cause(autojump_clock):
    async with asking(silent) as (client, server):
        server.refuses = True
        with pytest.raises(httpx.ConnectError, match="refused") as caught:
            await client.get("/")
        assert isinstance(caught.value.__cause__, ConnectFailed)


async def test_httpx_transport_closed_port_has_clear_message():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, transport=HttpxTransport(Pool(url))) as client:
            with pytest.raises(httpx.ConnectError) as caught:
                await client.get("/health")
    assert error_text(caught.value) == "Connection refused"


async def test_httpx_transport_cancellation_leaks_no_connection(autojump_clock):
    async with asking(silent) as (client, server):
        with trio.move_on_after(1.0):
            await client.get("/")
        await closed(server)
        assert not math.isnan(server.talks[0].left_at)


async def test_httpx_transport_wait_state_is_cleared_when_sent(autojump_clock):
    async with trio.open_nursery() as nursery:
        server = ScriptedServer(nursery, answering(ok(b"{}")))
        pool = MemoryPool(server)
        carrier = HttpxTransport(pool)
        request = httpx.Request("GET", "http://server.test:1/health")
        response = await carrier.handle_async_request(request)
        await response.aread()
        await response.aclose()
        pool.doing = Doing.CONNECTION  # of another request, which was cancelled
        response = await carrier.handle_async_request(request)
        assert carrier.doing is None
        await response.aclose()
        await carrier.aclose()
        nursery.cancel_scope.cancel()
