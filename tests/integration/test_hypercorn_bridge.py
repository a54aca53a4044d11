"""Cures of Hypercorn's and quart-trio's defects, each with a test of the defect."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import inspect
import json

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import hypercorn
import hypercorn.trio
import hypercorn.trio.run
import hyperframe.frame
import priority
import pytest
import quart_trio
import trio
import trio.testing
from hypercorn.config import Config
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h2 import H2Protocol, StreamBuffer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import EventWrapper

from support.front_harness import (
    HOST,
    PATIENCE,
    Application,
    Limits,
    connected,
    get,
    post,
    running,
    soon,
)
from vllm_router.http.hypercorn.final_message import hold_last
from vllm_router.http.hypercorn.h2 import MAX_RESETS, GuardedH2Protocol
from vllm_router.http.hypercorn.patch import install
from vllm_router.http.hypercorn.settings import TUNED, tune

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class H2Client:
    """HTTP/2 with prior knowledge on a raw connection."""

    def __init__(self, client) -> None:
        self.client = client
        config = h2.config.H2Configuration(
            header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()

    def request(self, path=b"/v1/score", method=b"POST", *extra, end=True) -> int:
        stream = self.h2.get_next_available_stream_id()
        fields = [(b":method", method), (b":scheme", b"http"), (b":authority", b"a")]
        fields += [(b":path", path)] if path is not None else []
        self.h2.send_headers(stream, [*fields, *extra], end_stream=end)
        return stream

    async def flush(self) -> None:
        await self.client.send(self.h2.data_to_send())

    async def events(self) -> list[h2.events.Event]:
        """Some events; an empty list when the server has closed."""
        found: list[h2.events.Event] = []
        while not found:
            try:
                data = await self.client.stream.receive_some()
            except trio.BrokenResourceError:
                break
            if not data:
                break
            found = self.h2.receive_data(bytes(data))
            with contextlib.suppress(trio.BrokenResourceError):
                await self.flush()
        return found

    async def ending(self) -> list[h2.events.Event]:
        """All events until the server closes."""
        found: list[h2.events.Event] = []
        while more := await self.events():
            found += more
        return found

    async def statuses(self, *wanted: int) -> dict[int, bytes]:
        """The status of each stream once all have ended; b"reset" for a reset one."""
        await self.flush()
        found: dict[int, bytes] = {}
        ended: set[int] = set()
        while not ended >= set(wanted) and (events := await self.events()):
            for event in events:
                if isinstance(event, h2.events.ResponseReceived):
                    found[event.stream_id] = dict(event.headers)[b":status"]
                elif isinstance(event, h2.events.StreamReset):
                    found[event.stream_id] = b"reset"
                    ended.add(event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    ended.add(event.stream_id)
        return found


async def still_serves(port: int) -> bool:
    async with connected(port) as client:
        await client.send(post("/v1/score"))
        return (await client.reply()).status == 200


@pytest.fixture(params=["lane", "hypercorn"])
def kind(request) -> str:
    return request.param


# -- names that Hypercorn does not promise -----------------------------------------------------


def test_hypercorn_version_is_the_reviewed_one():
    """The cures override classes of this version.

    After an upgrade, review every override in vllm_router/http/hypercorn, `TCPServer.run` and
    `worker_serve`.
    """
    assert importlib.metadata.version("hypercorn").startswith("0.18.")


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (TCPServer, "__init__", "self app config context state stream"),
        (TCPServer, "run", "self"),
        (TCPServer, "protocol_send", "self event"),
        (TCPServer, "_read_data", "self"),
        (TCPServer, "_close", "self"),
        (TCPServer, "_idle_timeout", "self"),
        (TCPServer, "_initiate_server_close", "self"),
        (H11Protocol, "_check_protocol", "self event"),
        (H11Protocol, "_create_stream", "self request"),
        (H11Protocol, "_send_h11_event", "self event"),
        (H11Protocol, "_send_error_response", "self status_code"),
        (H11Protocol, "stream_send", "self event"),
        (H2Protocol, "_handle_events", "self events"),
        (H2Protocol, "_create_stream", "self request"),
        (H2Protocol, "_priority_updated", "self event"),
        (H2Protocol, "_flush", "self"),
        (H2Protocol, "_send_data", "self stream_id"),
        (H2Protocol, "_close_stream", "self stream_id"),
        (H2Protocol, "_window_updated", "self stream_id"),
        (StreamBuffer, "push", "self data"),
        (StreamBuffer, "pop", "self max_length"),
        (WSStream, "handle", "self event"),
        (TaskGroup, "spawn_app", "self app config scope send"),
        (TaskGroup, "spawn", "self func args"),
        (EventWrapper, "wait", "self"),
        (hypercorn.trio.run, "worker_serve", "app config sockets shutdown_trigger task_status"),
    ],
)
def test_hypercorn_private_name_exists_with_its_parameters(owner, name, parameters):
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters.split()


def test_hypercorn_private_attributes_are_set():
    wrapper_source = inspect.getsource(ProtocolWrapper)
    for name in ("self.protocol", "self.task_group", "self.context", "self.state", "self.send"):
        assert name in wrapper_source
    for name in ("self.send_lock", "self.idle_task", "self.stream"):
        assert name in inspect.getsource(TCPServer)
    for name in ("self.can_read", "self.connection", "self.keep_alive_requests", "self.stream"):
        assert name in inspect.getsource(H11Protocol)
    for name in ("self.streams", "self.stream_buffers", "def idle", "self.keep_alive_requests"):
        assert name in inspect.getsource(H2Protocol)
    for name in ("self.closed", "self.app_put", "self.handshake", "def idle"):
        assert name in inspect.getsource(WSStream)
    for name in ("self.buffer", "self._complete", "self._is_empty", "self._paused"):
        assert name in inspect.getsource(StreamBuffer)
    assert "self._event" in inspect.getsource(EventWrapper)
    assert "self._nursery" in inspect.getsource(TaskGroup)
    assert "TCPServer" in vars(hypercorn.trio.run)
    assert "worker_serve" in vars(hypercorn.trio)


def test_hypercorn_tuned_settings_exist_and_keep_user_choices():
    assert all(hasattr(Config, name) for name in TUNED)
    config = Config()
    config.keep_alive_timeout = 5
    config.backlog = 7
    tune(config)
    assert (config.keep_alive_timeout, config.backlog) == (5, 7)
    assert config.graceful_timeout == 1


# -- HTTP/2: what ended the whole process ------------------------------------------------------


async def test_http2_with_prior_knowledge_is_served(kind):
    async with running(kind) as on, connected(on.port) as client:
        peer = H2Client(client)
        streams = [peer.request(), peer.request(b"/other", b"GET")]
        assert await peer.statuses(*streams) == dict.fromkeys(streams, b"200")


@pytest.mark.parametrize(
    ("path", "method"),
    [
        *[(b"/\xff", b"GET"), (b"/", b"G\xffT"), (None, b"CONNECT"), (b"", b"GET")],
        *[(b"/?a HTTP/1.1", b"GET"), (b"/\x01", b"GET"), (b"/#a", b"GET"), (b"/", b"PO ST")],
    ],
    ids=["path", "method", "connect", "empty", "space", "control", "fragment", "two-words"],
)
async def test_http2_malformed_request_costs_at_most_its_connection(kind, path, method):
    async with running(kind) as on:
        async with connected(on.port) as client:
            peer = H2Client(client)
            stream = peer.request(path, method)
            assert (await peer.statuses(stream)).get(stream) in (b"reset", None)
        assert await still_serves(on.port)
        assert on.app.started == 1


@pytest.mark.parametrize("field", [(b"x-a", b"1\x01"), (b"x-a", b"\x7f"), (b"x(a)", b"1")])
async def test_http2_field_that_http1_cannot_carry_is_refused(kind, field):
    async with running(kind) as on, connected(on.port) as client:
        peer = H2Client(client)
        stream = peer.request(b"/", b"GET", field)
        assert (await peer.statuses(stream)).get(stream) == b"reset"
        assert on.app.started == 0


async def test_http2_body_after_early_response_is_ignored(kind):
    async with running(kind) as on, connected(on.port) as client:
        peer = H2Client(client)
        stream = peer.request(b"/v1/early", b"POST", end=False)
        assert await peer.statuses(stream) == {stream: b"413"}
        with_body = peer.h2.data_to_send()
        # h2 has ended the stream, but a client may not know that yet.
        frame = hyperframe.frame.DataFrame(stream, b"late", flags=["END_STREAM"])
        await client.send(with_body + frame.serialize())
        again = peer.request()
        assert (await peer.statuses(again))[again] == b"200"


async def test_http2_websocket_with_early_data_costs_at_most_connection(kind):
    async with running(kind) as on:
        async with connected(on.port) as client:
            peer = H2Client(client)
            stream = peer.request(b"/ws", b"CONNECT", (b":protocol", b"websocket"), end=False)
            peer.h2.send_data(stream, b"\x81\x05hello")
            peer.h2.send_data(stream, b"x", end_stream=True)
            await peer.flush()
            with trio.move_on_after(0.5):
                await peer.ending()
        assert await still_serves(on.port)


async def test_http2_priority_flood_is_ignored(kind):
    async with running(kind) as on, connected(on.port) as client:
        peer = H2Client(client)
        for number in range(3000):
            peer.h2.prioritize(2 * number + 1, weight=16, depends_on=0, exclusive=False)
        await peer.flush()
        stream = peer.h2.get_next_available_stream_id()
        stream = peer.request()
        assert await peer.statuses(stream) == {stream: b"200"}


async def test_http2_rapid_reset_starts_almost_nothing(kind):
    async with running(kind) as on:
        async with connected(on.port) as client:
            peer = H2Client(client)
            peer.h2.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 10_000
            for _ in range(2000):
                stream = peer.request(b"/v1/hang")
                peer.h2.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
            await peer.flush()
            ended = [
                e for e in await peer.ending() if isinstance(e, h2.events.ConnectionTerminated)
            ]
            assert [e.error_code for e in ended] == [h2.errors.ErrorCodes.ENHANCE_YOUR_CALM]
        assert on.app.started <= 5
        await soon(lambda: not on.app.active and not on.front.connections)


async def test_http2_slow_rapid_reset_is_ended(kind):
    async with running(kind) as on, connected(on.port) as client:
        peer = H2Client(client)
        await peer.flush()
        begun = trio.current_time()
        # The server may have closed the connection before the last of them.
        with contextlib.suppress(trio.BrokenResourceError):
            for _ in range(500):
                stream = peer.request(b"/v1/hang")
                await peer.flush()
                peer.h2.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
                await peer.flush()
        await peer.ending()
        # One more reset per second is allowed.
        assert on.app.started <= MAX_RESETS + 10 + (trio.current_time() - begun)


async def test_http2_connection_without_request_is_closed_as_idle(kind):
    limits = Limits(keep_alive_timeout=0.3)
    async with running(kind, limits=limits) as on, connected(on.port) as client:
        await client.send(PREFACE + hyperframe.frame.SettingsFrame(0).serialize())
        while await client.stream.receive_some():
            pass


# A client announces its window (RFC 9113 5.2), and may never open it.
NO_WINDOW = hyperframe.frame.SettingsFrame(
    0, settings={hyperframe.frame.SettingsFrame.INITIAL_WINDOW_SIZE: 0}
).serialize()


async def test_http2_unread_response_applies_backpressure(kind):
    async with running(kind) as on, connected(on.port) as client:
        peer = H2Client(client)
        await peer.flush()
        await client.send(NO_WINDOW)
        stream = peer.request(b"/v1/flood")
        await peer.flush()
        await soon(lambda: on.app.parts > 0)
        for _ in range(50):
            await trio.testing.wait_all_tasks_blocked()
        assert on.app.parts == 1
        # A byte more or less: the rest waits for a larger window.
        await client.send(
            hyperframe.frame.WindowUpdateFrame(stream, window_increment=1).serialize()
        )
        for _ in range(50):
            await trio.testing.wait_all_tasks_blocked()
        assert on.app.parts == 1


@pytest.mark.parametrize("path", [b"/v1/flood", b"/v1/score"])
async def test_http2_unread_stream_is_reset_in_time(kind, path):
    limits = Limits(write_stall_timeout=0.3)
    async with running(kind, limits=limits) as on, connected(on.port) as client:
        peer = H2Client(client)
        await peer.flush()
        await client.send(NO_WINDOW)
        stream = peer.request(path)
        assert (await peer.statuses(stream))[stream] == b"reset"
        await soon(lambda: not on.app.active)
        # Only that stream: the connection stays open.
        await client.send(
            hyperframe.frame.SettingsFrame(
                0, settings={hyperframe.frame.SettingsFrame.INITIAL_WINDOW_SIZE: 65535}
            ).serialize()
        )
        again = peer.request()
        assert (await peer.statuses(again))[again] == b"200"


@pytest.mark.parametrize("path", [b"/v1/flood", b"/v1/score"])
async def test_http2_client_reading_nothing_is_forgotten_on_disconnect(kind, path):
    async with running(kind) as on:
        async with connected(on.port) as client:
            peer = H2Client(client)
            await peer.flush()
            await client.send(NO_WINDOW)
            peer.request(path)
            await peer.flush()
            while not any(isinstance(e, h2.events.ResponseReceived) for e in await peer.events()):
                pass
        await soon(lambda: not on.front.connections and not on.app.active)


@pytest.mark.parametrize("path", [b"/v1/truncated", b"/v1/short"])
async def test_http2_truncated_response_is_reset_after_last_byte(kind, path):
    async with running(kind) as on, connected(on.port) as client:
        peer = H2Client(client)
        await peer.flush()
        await client.send(NO_WINDOW)
        stream = peer.request(path)
        await peer.flush()
        received, ended = b"", None
        while ended is None:
            for event in await peer.events():
                if isinstance(event, h2.events.DataReceived):
                    received += event.data
                elif isinstance(event, h2.events.StreamReset | h2.events.StreamEnded):
                    ended = event
                elif isinstance(event, h2.events.ResponseReceived):
                    more = hyperframe.frame.WindowUpdateFrame(stream, window_increment=100)
                    await client.send(more.serialize())
        assert received == b"half of "
        assert isinstance(ended, h2.events.StreamReset)
        again = peer.request(b"/v1/empty")
        assert (await peer.statuses(again))[again] == b"204"
        await soon(lambda: not on.app.active)


async def test_http2_truncated_response_can_be_read_before_its_reset(kind, monkeypatch):
    """The last bytes have the error event, and curl drops what it has not read at the reset."""
    monkeypatch.setattr("vllm_router.http.hypercorn.h2.DELAY_OF_RESET", 3600.0)
    async with running(kind) as on, connected(on.port) as client:
        peer = H2Client(client)
        truncated, other = peer.request(b"/v1/truncated"), peer.request(b"/v1/empty")
        await peer.flush()
        found: list[h2.events.Event] = []
        data = b""
        while data != b"half of " or not any(
            isinstance(e, h2.events.StreamEnded) and e.stream_id == other for e in found
        ):
            found += await peer.events()
            data = b"".join(e.data for e in found if isinstance(e, h2.events.DataReceived))
        assert not any(isinstance(e, h2.events.StreamReset) for e in found)
        peer.h2.reset_stream(truncated)
        await peer.flush()


async def test_http2_client_reset_of_unread_stream_frees_application(kind):
    async with running(kind) as on, connected(on.port) as client:
        peer = H2Client(client)
        await peer.flush()
        await client.send(NO_WINDOW)
        streams = [peer.request(path) for path in (b"/v1/flood", b"/v1/score")]
        await peer.flush()
        answered = 0
        while answered < 2:
            found = await peer.events()
            answered += sum(isinstance(event, h2.events.ResponseReceived) for event in found)
        for stream in streams:
            peer.h2.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        await peer.flush()
        await soon(lambda: not on.app.active)


async def test_http2_response_through_small_window_is_whole(kind):
    async with running(kind) as on, connected(on.port) as client:
        peer = H2Client(client)
        await peer.flush()
        await client.send(NO_WINDOW)
        stream = peer.request()
        await peer.flush()
        received, ended = b"", False
        while not ended:
            more = hyperframe.frame.WindowUpdateFrame(stream, window_increment=7)
            await client.send(more.serialize())
            for event in await peer.events():
                if isinstance(event, h2.events.DataReceived):
                    received += event.data
                ended = ended or isinstance(event, h2.events.StreamEnded)
        assert json.loads(received)["path"] == "/v1/score"


async def test_http2_streams_finish_while_server_drains(kind):
    async with running(kind) as on, connected(on.port) as client:
        peer = H2Client(client)
        streams = [peer.request(b"/v1/stream") for _ in range(20)]
        await peer.flush()
        await soon(lambda: on.app.active == 20)
        on.front.stop_accepting()
        on.front.begin_drain()
        on.app.release.set()
        ended = set()
        for event in await peer.ending():
            if isinstance(event, h2.events.StreamEnded):
                ended.add(event.stream_id)
        assert ended == set(streams)
        await soon(lambda: not on.front.connections)


async def test_http2_connection_leaves_nothing_for_the_collector(kind):
    gc.collect()
    gc.disable()
    try:
        async with running(kind) as on:
            for _ in range(3):
                async with connected(on.port) as client:
                    peer = H2Client(client)
                    stream = peer.request()
                    assert await peer.statuses(stream) == {stream: b"200"}
            await soon(lambda: not on.front.connections)
            kinds = (GuardedH2Protocol, priority.PriorityTree)
            assert [one for one in gc.get_objects() if isinstance(one, kinds)] == []
    finally:
        gc.enable()


async def test_http2_upgrade_is_declined(kind):
    fields = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk")
    async with running(kind) as on, connected(on.port) as client:
        await client.send(get("/", *fields))
        assert (await client.reply()).status == 200
        await client.send(post("/v1/score", b"{}", *fields))
        assert (await client.reply()).json()["body"] == "{}"


# -- websockets --------------------------------------------------------------------------------

HANDSHAKE = get(
    "/ws",
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


@pytest.mark.parametrize("trailing", [b"x", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", bytes(70_000)])
async def test_websocket_bytes_after_handshake_cost_at_most_connection(kind, trailing):
    async with running(kind) as on:
        async with connected(on.port) as client:
            await client.send(HANDSHAKE + trailing)
            assert (await client.reply("GET")).status == 400
            assert await client.closed()
        assert await still_serves(on.port)
        await soon(lambda: not on.front.connections)


# -- HTTP/1.1 that h11 lets pass ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400),
        (get("/", b"Content-Length: 3", b"Transfer-Encoding: chunked"), 400),
        (b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 204),
        (b"GET http:// HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nExpect: cake\r\n\r\n", 417),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        (b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    ],
)  # fmt: skip
async def test_hypercorn_suspicious_request_is_refused_with_close(kind, data, status):
    async with running(kind) as on, connected(on.port) as client:
        await client.send(data + get("/smuggled"))
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (status, "close")
        if status != 204:
            assert reply.headers["x-vllm-router-error"] == reply.code
        assert await client.closed()
        assert on.app.started == 0


async def test_hypercorn_failing_application_is_logged_and_isolated(kind, caplog):
    class Failing(Application):
        async def __call__(self, scope, receive, send) -> None:
            if scope["path"] == "/v1/bad":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.sleep_forever)
                    raise ValueError("one of several")
            await super().__call__(scope, receive, send)

    async with running(kind, app=Failing()) as on:
        async with connected(on.port) as client:
            await client.send(post("/v1/bad"))
            assert (await client.reply()).status == 500
        assert await still_serves(on.port)
    assert "one of several" in caplog.text


# -- Quart routes ------------------------------------------------------------------------------


def quart_app():
    app = quart_trio.QuartTrio(__name__)

    @app.get("/")
    async def index():
        return "hello"

    @app.post("/early")
    async def early():
        return "no", 413

    app.asgi_app = hold_last(app.asgi_app)  # type: ignore[method-assign]
    return app


async def test_hypercorn_connection_close_after_quart_route_is_honoured(kind):
    async with running(kind, app=quart_app()) as on, connected(on.port) as client:
        await client.send(get("/", b"Connection: close"))
        assert (await client.reply("GET")).body == b"hello"
        assert await client.closed()


async def test_hypercorn_keep_alive_expires_after_quart_route(kind):
    limits = Limits(keep_alive_timeout=0.3)
    async with running(kind, app=quart_app(), limits=limits) as on, connected(on.port) as client:
        await client.send(get("/"))
        await client.reply("GET")
        await client.send(get("/"))
        await client.reply("GET")
        assert await client.closed()


async def test_hypercorn_early_response_does_not_hang_next_request(kind):
    async with running(kind, app=quart_app()) as on, connected(on.port) as client:
        await client.send(post("/early", b"").replace(b"Length: 0", b"Length: 900000"))
        assert (await client.reply()).status == 413
        with trio.move_on_after(PATIENCE) as patience:
            try:
                await client.send(bytes(900_000) + get("/"))
            except trio.BrokenResourceError:
                pass
            assert await client.closed()
        assert not patience.cancelled_caught


async def test_hypercorn_idle_connections_do_not_delay_drain(kind):
    async with running(kind, app=quart_app()) as on, connected(on.port) as client:
        await client.send(get("/"))
        await client.reply("GET")
        on.front.stop_accepting()
        on.front.begin_drain()
        with trio.fail_after(PATIENCE):
            await on.front.drained()


async def test_hypercorn_stalled_websocket_ends_before_stalled_response():
    async def flood(scope, receive, send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while True:
            await send({"type": "websocket.send", "bytes": bytes(65536)})
            await trio.lowlevel.checkpoint()

    upgrade = b"GET /ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    upgrade += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    limits = Limits(websocket_stall_timeout=0.5)
    async with running(app=flood, limits=limits) as on, connected(on.port, buffer=4096) as client:
        await client.send(upgrade)
        await soon(lambda: on.front.connections == 1)
        with trio.fail_after(PATIENCE):
            await soon(lambda: on.front.connections == 0)


# -- under Hypercorn itself --------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Hypercorn's names, put back afterwards."""
    for module, name in [
        (hypercorn.trio.run, "TCPServer"),
        (hypercorn.trio.run, "worker_serve"),
        (hypercorn.trio, "worker_serve"),
    ]:
        monkeypatch.setattr(module, name, getattr(module, name))
    return install


async def test_hypercorn_installed_bridge_cures_and_drains(installed):
    asked, go_on, stop = trio.Event(), trio.Event(), trio.Event()

    async def before_shutdown() -> None:
        asked.set()
        await go_on.wait()

    installed()
    installed(before_shutdown)
    app = Application()
    config = Config()
    config.bind = [f"{HOST}:0"]
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:

            async def serve(task_status=trio.TASK_STATUS_IGNORED) -> None:
                await hypercorn.trio.serve(
                    app, config, shutdown_trigger=stop.wait, mode="asgi", task_status=task_status
                )

            binds = await nursery.start(serve)
            port = int(binds[0].rsplit(":", 1)[1])
            assert config.backlog == 2048
            async with connected(port) as client:
                await client.send(post("/v1/score"))
                assert (await client.reply()).reason == "OK"
            async with connected(port) as client:
                peer = H2Client(client)
                await peer.statuses(peer.request(b"/\xff", b"GET"))
            assert await still_serves(port)
            stop.set()
            await asked.wait()
            assert await still_serves(port)
            go_on.set()


async def test_hypercorn_stalled_reader_does_not_delay_shutdown(installed):
    installed()
    stop = trio.Event()
    app = Application()
    config = Config()
    config.bind = [f"{HOST}:0"]
    config.graceful_timeout = 0.2
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:

            async def serve(task_status=trio.TASK_STATUS_IGNORED) -> None:
                await hypercorn.trio.serve(
                    app, config, shutdown_trigger=stop.wait, mode="asgi", task_status=task_status
                )

            binds = await nursery.start(serve)
            async with connected(int(binds[0].rsplit(":", 1)[1]), buffer=4096) as client:
                await client.send(post("/v1/flood"))
                await soon(lambda: app.active)
                await trio.testing.wait_all_tasks_blocked()  # nothing more fits into the socket
                stop.set()
                await soon(lambda: not app.active)
