"""HTTP behaviour that clients may rely on, whichever front serves them."""

from __future__ import annotations

import os
import socket

import pytest
import trio
import trio.testing

from support.front_harness import (
    CHAT,
    HOST,
    PATIENCE,
    Application,
    Client,
    Limits,
    answer,
    chunked,
    connected,
    get,
    post,
    reset_on_close,
    running,
    soon,
)


@pytest.fixture(params=["lane", "hypercorn"])
def kind(request) -> str:
    return request.param


async def test_front_responses_share_one_connection(kind):
    async with running(kind) as on, connected(on.port) as client:
        for number in range(3):
            await client.send(post(body=b"%d" % number))
            reply = await client.reply()
            assert (reply.status, reply.reason) == (200, "OK")
            assert reply.json()["body"] == str(number)
            assert "date" in reply.headers
            assert "server" not in reply.headers


async def test_front_pipelined_requests_are_answered_in_order(kind):
    async with running(kind) as on, connected(on.port) as client:
        await client.send(b"".join(post(body=b"%d" % number) for number in range(20)))
        bodies = [(await client.reply()).json()["body"] for _ in range(20)]
        assert bodies == [str(number) for number in range(20)]


async def test_front_request_byte_by_byte_is_read(kind):
    async with running(kind) as on, connected(on.port) as client:
        for byte in chunked(CHAT, b"abc", b"defg"):
            await client.send(bytes([byte]))
        assert (await client.reply()).json()["body"] == "abcdefg"


async def test_front_chunk_extensions_and_trailers_are_dropped(kind):
    data = b"POST %b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode()
    data += b"3;name=value\r\nabc\r\n0\r\nX-Trailer: 1\r\nContent-Type: a\r\n\r\n"
    async with running(kind) as on, connected(on.port) as client:
        await client.send(data + post(body=b"next"))
        assert (await client.reply()).json()["body"] == "abc"
        assert (await client.reply()).json()["body"] == "next"


async def test_front_connection_close_is_honoured(kind):
    async with running(kind) as on, connected(on.port) as client:
        await client.send(post(CHAT, b"{}", b"Connection: close"))
        reply = await client.reply()
        assert reply.headers["connection"] == "close"
        assert await client.closed()


async def test_front_http_1_0_response_ends_with_connection(kind):
    async with running(kind) as on, connected(on.port) as client:
        on.app.release.set()
        await client.send(post("/v1/stream", b"", version="1.0"))
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"chunked" not in head
        assert body == b"".join(b"data: %d\n\n" % number for number in range(5))


async def test_front_continue_is_sent_when_body_is_read(kind):
    head = post(CHAT, b"abc", b"Expect: 100-continue")[:-3]
    async with running(kind) as on, connected(on.port) as client:
        await client.send(head)
        interim = b""
        while not interim.endswith(b"\r\n\r\n"):
            interim += bytes(await client.stream.receive_some())
        assert interim.startswith(b"HTTP/1.1 100 ")
        await client.send(b"abc")
        assert (await client.reply()).json()["body"] == "abc"


async def test_front_stream_is_chunked_and_unbuffered(kind):
    async with running(kind) as on, connected(on.port) as client:
        await client.send(post("/v1/stream", b""))
        received = b""
        while b"data: 4" not in received:
            received += bytes(await client.stream.receive_some())
        assert b"0\r\n\r\n" not in received
        on.app.release.set()
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += bytes(await client.stream.receive_some())


@pytest.mark.parametrize("path", ["/v1/truncated", "/v1/short"])
async def test_front_unfinished_response_never_looks_whole(kind, path):
    async with running(kind) as on, connected(on.port) as client:
        await client.send(post(path))
        reply = await client.reply()
        assert reply.body == b"half of "
        assert not reply.complete


async def test_front_unfinished_http_1_0_response_is_reset(kind):
    async with running(kind) as on, connected(on.port) as client:
        await client.send(post("/v1/truncated", b"", version="1.0"))
        with pytest.raises(trio.BrokenResourceError):
            await client.rest()


@pytest.mark.parametrize("path", ["/v1/broken", "/v1/nothing"])
async def test_front_application_without_response_is_500(kind, path):
    async with running(kind) as on:
        async with connected(on.port) as client:
            await client.send(post(path))
            assert (await client.reply()).status == 500
            assert await client.closed()
        async with connected(on.port) as client:
            await client.send(post())
            assert (await client.reply()).status == 200


async def test_front_header_injection_by_application_is_blocked(kind):
    async with running(kind) as on, connected(on.port) as client:
        await client.send(post("/v1/injected"))
        assert (await client.reply()).status == 500


async def test_front_bodiless_status_has_no_body(kind):
    async with running(kind) as on, connected(on.port) as client:
        await client.send(post("/v1/empty") + post("/v1/unchanged") + post())
        empty, unchanged, full = [await client.reply() for _ in range(3)]
        assert (empty.status, empty.body) == (204, b"")
        assert "content-length" not in empty.headers
        assert (unchanged.status, unchanged.body) == (304, b"")
        assert full.status == 200


async def test_front_head_response_has_length_and_no_body(kind):
    async with running(kind, accepts=lambda *_: True) as on, connected(on.port) as client:
        await client.send(b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n")
        reply = await client.reply("HEAD")
        assert int(reply.headers["content-length"]) > 0
        await client.send(get("/x"))
        assert (await client.reply("GET")).json()["method"] == "GET"


async def test_front_absolute_target_becomes_path(kind):
    async with running(kind) as on, connected(on.port) as client:
        await client.send(post("http://elsewhere:80/v1/score?a=b"))
        reply = await client.reply()
        assert (reply.json()["path"], reply.json()["query"]) == ("/v1/score", "a=b")
        await client.send(get("HTTP://elsewhere"))
        assert (await client.reply()).json()["path"] == "/"


async def test_front_early_response_reaches_client_still_sending(kind):
    head = post("/v1/early", b"")[:-4].replace(b"Length: 0", b"Length: 40000000") + b"\r\n\r\n"
    async with running(kind) as on, connected(on.port) as client:
        await client.send(head)

        async def upload() -> None:
            for _ in range(400):
                try:
                    await client.send(bytes(100_000))
                except trio.BrokenResourceError:
                    return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload)
            reply = await client.reply()
            assert (reply.status, reply.body) == (413, b'{"too": "large"}')
            nursery.cancel_scope.cancel()
        await soon(lambda: on.app.active == 0)


async def test_front_unread_body_is_not_read_on(kind):
    async with running(kind) as on, connected(on.port) as client:
        size = 64_000_000
        await client.send(post("/v1/unread", b"").replace(b"Length: 0", b"Length: %d" % size))
        sent = 0
        with trio.move_on_after(1):
            while sent < size:
                await client.send(bytes(100_000))
                sent += 100_000
        assert sent < 16_000_000  # router memory, plus the kernel's buffers on both sides
        on.app.release.set()
        await soon(lambda: on.app.received > sent / 2)


@pytest.mark.parametrize("path", ["/v1/hang", "/v1/stream", "/v1/flood"])
@pytest.mark.parametrize("leave", ["close", "reset", "half"])
async def test_front_client_disconnect_cancels_request(kind, path, leave):
    async with running(kind) as on:
        async with connected(on.port) as client:
            await client.send(post(path))
            await soon(lambda: on.app.active)
            if path != "/v1/hang":
                await client.stream.receive_some(100)
            if leave == "reset":
                reset_on_close(client)
            elif leave == "half":
                await client.stream.send_eof()
            else:
                await client.stream.aclose()
            if leave == "half":
                await soon(lambda: not on.app.active)
        with trio.fail_after(PATIENCE):
            await soon(lambda: not on.app.active and not on.front.connections)
        assert not on.app.completed


async def test_front_hundred_pipelining_clients_disconnecting_leak_nothing(kind):
    async with running(kind) as on:
        for number in range(100):
            async with connected(on.port) as client:
                await client.send(post("/v1/hang") + 3 * post() + bytes(80_000 * (number % 2)))
                await soon(lambda: on.app.active)
                if number % 3:
                    reset_on_close(client)
        await soon(lambda: not on.app.active and not on.front.connections)


async def test_front_stalled_reader_is_cut_off_with_bounded_memory(kind):
    limits = Limits(write_stall_timeout=0.5)
    async with running(kind, limits=limits) as on, connected(on.port, buffer=4096) as client:
        await client.send(post("/v1/flood"))
        await soon(lambda: on.app.active)
        with trio.fail_after(PATIENCE):
            await soon(lambda: not on.app.active and not on.front.connections)


async def test_front_stalled_reader_does_not_delay_stop(kind):
    async with running(kind) as on, connected(on.port, buffer=4096) as client:
        await client.send(post("/v1/flood"))
        await soon(lambda: on.app.active)
        await trio.testing.wait_all_tasks_blocked()  # nothing more fits into the socket
        on.front.abort()
        await soon(lambda: not on.front.connections)


async def test_front_refused_client_gets_no_continue(kind):
    async def locked(scope, receive, send) -> None:
        await answer(send, 401, b"{}")

    async with running(kind, app=locked) as on, connected(on.port) as client:
        await client.send(post(CHAT, b"abc", b"Expect: 100-continue")[:-3])
        received = await client.rest()
        assert received.startswith(b"HTTP/1.1 401 ")
        assert b"100 Continue" not in received


@pytest.mark.parametrize(
    ("data", "line", "code"),
    [
        (b"POST /v1/score HTTP/1.1\r\nHost: a\r\nX: \x1b\r\n\r\n", b"POST /v1/score HTTP/1.1", 400),
        (b"GET /page HTTP/1.1\r\n\r\n", b"GET /page HTTP/1.1", 400),
        (b"POST /v1/score HTTP/3.7\r\nHost: a\r\n\r\n", b"POST /v1/score HTTP/3.7", 505),
        (b"POST /v1/score HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", b"POST /v1/score HTTP/1.1", 400),
        (b"POST /v1/score HTTP/1.1\r\nHost: a\nA: b\r\n\r\n", b"POST /v1/score HTTP/1.1", 400),
    ],
    ids=["control byte", "no Host", "version", "folded", "bare LF"],
)
async def test_front_refusal_before_application_is_logged(kind, data, line, code):
    rejected = []
    async with running(kind, on_rejected=lambda *about: rejected.append(about)) as on:
        async with connected(on.port) as client:
            await client.send(data)
            assert (await client.reply()).status == code
        ((refusal, client_, line_),) = rejected
        assert (refusal.status, client_[0], line_) == (code, "127.0.0.1", line)
        assert on.app.started == 0


async def test_front_refusal_log_has_request_line_in_any_split(kind):
    rejected = []
    async with running(kind, on_rejected=lambda *about: rejected.append(about)) as on:
        for cut in (10, 25, 40):
            data = b"POST /v1/score HTTP/1.1\r\nHost: a\r\nX: \x1b\r\n\r\n"
            async with connected(on.port) as client:
                await client.send(data[:cut])
                await trio.testing.wait_all_tasks_blocked()  # the front has read the first part
                await client.send(data[cut:])
                assert (await client.reply()).status == 400
    assert [line for _, _, line in rejected] == [b"POST /v1/score HTTP/1.1"] * 3


async def test_front_slow_head_is_logged(kind):
    rejected = []
    limits = Limits(header_timeout=0.2)
    options = {"limits": limits, "on_rejected": lambda *about: rejected.append(about)}
    async with running(kind, **options) as on, connected(on.port) as client:
        await client.send(b"POST /v1/score HTTP/1.1\r\nHo")
        assert (await client.reply()).status == 408
    assert [(refusal.status, line) for refusal, _, line in rejected] == [
        (408, b"POST /v1/score HTTP/1.1")
    ]


async def test_front_slow_head_is_timed_out(kind):
    limits = Limits(header_timeout=0.3)
    async with running(kind, limits=limits) as on, connected(on.port) as client:
        await client.send(b"POST /v1/score HTTP/1.1\r\nHo")
        reply = await client.reply()
        assert (reply.status, reply.code) == (408, "request_timeout")
        assert await client.closed()


async def test_front_silent_body_is_timed_out(kind):
    limits = Limits(body_read_timeout=0.3)
    async with running(kind, limits=limits) as on, connected(on.port) as client:
        await client.send(post(CHAT, b"abcdef")[:-3])
        reply = await client.reply()
        assert (reply.status, reply.code) == (408, "request_timeout")
        assert await client.closed()
        await soon(lambda: not on.app.active)


async def test_front_trickling_body_is_timed_out(kind):
    limits = Limits(body_read_timeout=0.5, min_body_rate=10_000, linger=0.2)
    async with running(kind, limits=limits) as on, connected(on.port) as client:
        await client.send(post(CHAT, b"", b"").replace(b"Length: 0", b"Length: 100000"))

        async def trickle() -> None:
            while True:
                await client.send(b"x")
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            assert (await client.reply()).status == 408
            nursery.cancel_scope.cancel()


async def test_front_silent_application_is_not_timed_out(kind):
    limits = Limits(header_timeout=0.2, body_read_timeout=0.2, keep_alive_timeout=0.2)
    async with running(kind, limits=limits) as on, connected(on.port) as client:
        await client.send(post("/v1/hang"))
        await trio.sleep(3 * 0.2)  # longer than every limit
        on.app.release.set()
        assert (await client.reply()).status == 200


async def test_front_drain_closes_idle_and_finishes_busy_connections(kind):
    async with running(kind) as on, connected(on.port) as idle, connected(on.port) as busy:
        await idle.send(post())
        await idle.reply()
        await busy.send(post("/v1/hang"))
        await soon(lambda: on.app.started == 2)
        on.front.stop_accepting()
        on.front.begin_drain()
        assert await idle.closed()
        on.app.release.set()
        reply = await busy.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert await busy.closed()
        await on.front.drained()


async def test_front_close_after_responses_keeps_idle_connection_for_one_request(kind):
    async with running(kind) as on, connected(on.port) as idle, connected(on.port) as fresh:
        await idle.send(post())
        await idle.reply()
        on.front.close_after_responses()
        for client in (idle, fresh):
            await client.send(post())
            reply = await client.reply()
            assert (reply.status, reply.headers["connection"]) == (200, "close")
            assert await client.closed()


async def test_front_requests_received_before_drain_are_answered(kind):
    async with running(kind) as on, connected(on.port) as known:
        await known.send(post())
        await known.reply()
        await trio.testing.wait_all_tasks_blocked()
        os.write(known.stream.socket.fileno(), post())  # without a checkpoint: not accepted yet
        sock = socket.create_connection((HOST, on.port))  # not accepted yet
        sock.sendall(post())
        on.front.stop_accepting()
        on.front.begin_drain()
        async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
            for client in (known, Client(stream)):
                reply = await client.reply()
                assert (reply.status, reply.headers["connection"]) == (200, "close")
                assert await client.closed()


async def test_front_stop_accepting_closes_listener(kind):
    async with running(kind) as on:
        on.front.stop_accepting()
        await soon(lambda: not _can_connect(on.port))


def _can_connect(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) == 0


async def test_front_failing_application_leaves_server_serving(kind):
    class Failing(Application):
        async def __call__(self, scope, receive, send) -> None:
            raise ExceptionGroup("several", [ValueError(), OSError()])

    async with running(kind, app=Failing()) as on:
        for _ in range(20):
            async with connected(on.port) as client:
                await client.send(post())
                assert (await client.reply()).status == 500
