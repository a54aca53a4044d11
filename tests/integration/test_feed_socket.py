"""The feed and the pages through the real application, Hypercorn and sockets on loopback."""

from __future__ import annotations

from contextlib import asynccontextmanager

import httpx
import msgspec
import pytest
import trio
from trio_websocket import ConnectionClosed, wrap_client_stream

from support.fleet_makers import go_down
from support.front_harness import HOST, PATIENCE, connected, post, running
from support.web_harness import Lab
from vllm_router.runtime.dispatch import RequestDispatcher
from vllm_router.web import schema

UPGRADE = {
    "upgrade": "websocket",
    "connection": "Upgrade",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    "sec-websocket-version": "13",
}


class Served:
    """A lab behind a real front, with the feed running and without probes."""

    def __init__(self, lab: Lab, port: int) -> None:
        self.lab = lab
        self.port = port
        self.url = f"http://{HOST}:{port}"

    @asynccontextmanager
    async def feed(self, **headers: str):
        """A websocket client that closes its connection on exit.

        It owns the stream: trio-websocket 0.12 leaves it open when the server closes first.
        """
        stream = await trio.open_tcp_stream(HOST, self.port)
        async with stream, trio.open_nursery() as nursery:
            with trio.fail_after(PATIENCE):
                websocket = await wrap_client_stream(
                    nursery,
                    stream,
                    f"127.0.0.1:{self.port}",
                    "/ws/load",
                    extra_headers=[(k.encode(), v.encode()) for k, v in headers.items()],
                    max_message_size=2**24,
                )
            yield websocket
            nursery.cancel_scope.cancel()

    async def clients(self, count: int) -> None:
        """Wait until the feed has `count` clients."""
        with trio.fail_after(PATIENCE):
            while self.lab.router.metrics.feed_clients != count:
                await trio.sleep(0.01)


@asynccontextmanager
async def served(servers=2, **settings):
    lab = Lab(servers, **settings)
    app = RequestDispatcher()
    app.attach(lab.router)
    async with running(app=app) as front, trio.open_nursery() as nursery:
        nursery.start_soon(lab.router.feed.run)
        yield Served(lab, front.port)
        nursery.cancel_scope.cancel()


async def message(websocket):
    return msgspec.json.decode(await websocket.get_message(), type=schema.Message)


async def test_feed_websocket_client_gets_hello_snapshots_and_events():
    async with served(feed_interval=0.05) as router, router.feed() as websocket:
        hello = await message(websocket)
        assert isinstance(hello, schema.Hello)
        assert not hello.admin
        sequence = []
        while len(sequence) < 4:
            snapshot = await message(websocket)
            assert isinstance(snapshot, schema.Snapshot)
            sequence.append(snapshot.seq)
        assert sequence == sorted(sequence)
        go_down(router.lab["a"], trio.current_time())
        router.lab.settle()
        while not isinstance(event := await message(websocket), schema.Event):
            pass
        assert (event.server, event.new) == ("a", "down")


async def test_feed_client_that_resets_is_forgotten():
    async with served() as router:
        async with router.feed() as websocket:
            await message(websocket)
            await router.clients(1)
        await router.clients(0)


async def test_feed_client_close_frame_is_answered():
    async with served(feed_interval=0.05) as router, router.feed() as websocket:
        for _ in range(4):
            await message(websocket)
        await router.clients(1)
        with trio.fail_after(PATIENCE):
            await websocket.aclose()
        await router.clients(0)


async def test_feed_ignores_client_messages_but_detects_disconnect():
    async with served() as router:
        async with router.feed() as websocket:
            for _ in range(200):
                await websocket.send_message("hello")
            await message(websocket)
            await router.clients(1)
        await router.clients(0)


async def test_feed_closes_clients_with_1001_on_stop():
    async with served() as router, router.feed() as one, router.feed() as other:
        await router.clients(2)
        router.lab.router.feed.close()
        for websocket in (one, other):
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    await websocket.get_message()
            assert closed.value.reason.code == 1001
        await router.clients(0)


async def test_feed_slow_client_delays_no_other():
    async with served(feed_interval=0.01) as router:
        stalled = await trio.open_tcp_stream(HOST, router.port)
        fields = "".join(f"{name}: {value}\r\n" for name, value in UPGRADE.items())
        await stalled.send_all(f"GET /ws/load HTTP/1.1\r\nhost: a\r\n{fields}\r\n".encode())
        await router.clients(1)
        async with router.feed() as quick:
            for _ in range(100):
                await message(quick)
        await stalled.aclose()
        await router.clients(0)


@pytest.mark.parametrize("origin", ["http://127.0.0.1:{port}", None])
async def test_feed_admits_same_origin_pages_and_programs(origin):
    async with served() as router:
        headers = {"origin": origin.format(port=router.port)} if origin else {}
        async with router.feed(**headers) as websocket:
            assert isinstance(await message(websocket), schema.Hello)


async def test_feed_admits_pages_of_listed_origin():
    async with served(cors_origins=["https://ops.test"]) as router:
        async with router.feed(origin="https://ops.test") as websocket:
            assert isinstance(await message(websocket), schema.Hello)


async def refusal(url: str, **headers: str) -> httpx.Response:
    """The response to a refused websocket handshake."""
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(url, headers={**UPGRADE, **headers})


@pytest.mark.parametrize("origin", ["http://evil.test", "null", "http://127.0.0.1:1"])
async def test_feed_refuses_pages_of_other_origins(origin):
    async with served() as router:
        reply = await refusal(f"{router.url}/ws/load", origin=origin)
        assert reply.status_code == 403
        assert reply.json()["error"]["code"] == "cross_origin"
        assert reply.headers["x-vllm-router-error"] == "cross_origin"
        assert router.lab.router.metrics.feed_clients == 0


async def test_feed_refused_page_gets_reason_by_plain_request():
    """A browser hides the response to a refused websocket handshake."""
    async with served() as router, httpx.AsyncClient(trust_env=False) as client:
        url = f"{router.url}/ws/load"
        refused = await client.post(url, headers={"origin": "https://llm.example"})
        assert refused.status_code == 403
        message = refused.json()["error"]["message"]
        assert 'cors_origins = ["https://llm.example"]' in message
        assert 'trusted_proxies = ["127.0.0.1"]' in message
        own = await client.post(url, headers={"origin": router.url})
        assert own.status_code in (400, 405)


async def test_websocket_at_other_path_is_refused():
    async with served() as router:
        reply = await refusal(f"{router.url}/ws/nope")
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "not_found"


async def test_pages_are_served_repeatedly_on_one_connection():
    paths = ["/health", "/nope", "/metrics", "/v1/models", "/load-stats", "/", "/readyz"]
    async with served() as router, httpx.AsyncClient(trust_env=False) as client:
        for path in paths * 3:
            reply = await client.get(router.url + path)
            assert reply.status_code == (404 if path == "/nope" else 200)
        assert (await client.head(router.url + "/health")).content == b""


async def test_engine_control_is_closed_for_every_method():
    async with served() as router, httpx.AsyncClient(trust_env=False) as client:
        for method in ("GET", "POST"):
            reply = await client.request(method, router.url + "/sleep")
            assert reply.status_code == 403
            assert reply.headers["x-vllm-router-error"] == "engine_control_closed"


async def test_control_plane_large_body_is_refused_early():
    async with served() as router, connected(router.port) as client:
        await client.send(post("/explain", b"").replace(b"Length: 0", b"Length: 20000000"))
        reply = await client.reply()
        assert (reply.status, reply.code) == (413, "body_too_large")
