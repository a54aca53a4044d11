"""Requests that the lane refuses, its responses to them, and its behaviour without sockets."""

from __future__ import annotations

import os
import socket

import pytest
import trio
import trio.testing

from support.front_harness import CHAT, Limits, chunked, connected, get, post, running, soon
from vllm_router.http.chunked import ChunkedBody
from vllm_router.http.http_error import HttpError
from vllm_router.http.request_head import Head
from vllm_router.http.request_line import split_target
from vllm_router.http.server.lane import Lane
from vllm_router.http.server.response_writer import ResponseWriter
from vllm_router.http.server.socket_connection import SocketConnection
from vllm_router.http.server.stream_connection import StreamConnection
from vllm_router.http.syntax import valid_host

HEAD = b"POST /v1/score HTTP/1.1\r\nHost: a\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400),
        (HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
        (HEAD + b"Content-Length: 3, 3\r\n\r\nabc", 400),
        (HEAD + b"Content-Length: +3\r\n\r\nabc", 400),
        (HEAD + b"Content-Length: -3\r\n\r\nabc", 400),
        (HEAD + b"Content-Length: 0x3\r\n\r\nabc", 400),
        (HEAD + b"Content-Length: 3 3\r\n\r\nabc", 400),
        (HEAD + b"Content-Length: \r\n\r\nabc", 400),
        (HEAD + b"Content-Length: 99999999999999999999\r\n\r\nabc", 400),
        (HEAD + b"Content-Length: 9999999999999999999\r\n\r\nabc", 400),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\nabc", 400),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v1/score HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"X: a\r\n b\r\n\r\n", 400),
        (HEAD + b"X: a\rb\r\n\r\n", 400),
        (HEAD + b"X: a\nY: b\r\n\r\n", 400),
        (HEAD + b"X: a\x00b\r\n\r\n", 400),
        (HEAD + b"X : a\r\n\r\n", 400),
        (HEAD + b": a\r\n\r\n", 400),
        (HEAD + b"no colon\r\n\r\n", 400),
        (b"POST /v1/score HTTP/1.1\r\n\r\n", 400),
        (HEAD + b"Host: a\r\n\r\n", 400),
        (b"POST /v1/score HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"POST /v1/score HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
        (b"POST /v1/score HTTP/1.1\r\nHost: \r\n\r\n", 400),
        (b"POST  /v1/score HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"POST /v1/score\r\nHost: a\r\n\r\n", 400),
        (b"POST /v1/score HTTP/1.1\nHost: a\n\n", 400),
        (b"POST http://u@a/v1/score HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"POST /v1/score#x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"POST /v1/score?\x7f HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"POST * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 204),
        (b"POST /v1/score HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"POST /v1/score HTTP/1.2\r\nHost: a\r\n\r\n", 505),
        (b"POST /v1/score HTTP/11\r\nHost: a\r\n\r\n", 400),
        (HEAD + b"Expect: cake\r\n\r\n", 417),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        (b"TRACE /v1/score HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"SSH-2.0-OpenSSH\r\n", 400),
    ],
)
async def test_server_doubtful_head_is_refused_and_rest_unread(data, status):
    async with running() as on, connected(on.port) as client:
        await client.send(data + post("/v1/smuggled"))
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (status, "close")
        if status != 204:
            assert reply.headers["x-vllm-router-error"] == reply.code
            assert reply.json()["error"].keys() == {"message", "type", "param", "code"}
        assert await client.closed()
        assert on.app.started == 0


@pytest.mark.parametrize(
    "body",
    [
        b"x\r\n",
        b"\r\n",
        b"-3\r\nabc\r\n",
        b"+3\r\nabc\r\n",
        b"0x3\r\nabc\r\n",
        b"3 \r\nabc\r\n",
        b"3 ;a\r\nabc\r\n",
        b"3\t;a\r\nabc\r\n",
        b" 3\r\nabc\r\n",
        b"3\nabc\r\n",
        b"3\r\nabcd\r\n",
        b"3\r\nabc\n",
        b"3\r\nabc\r\n0\r\nX: a\n\r\n",
        b"3\r\nabc\r\n0\r\n X: a\r\n\r\n",
        b"3\r\nabc\r\n0\r\nContent-Length: 3\r\n\r\n",
        b"3\r\nabc\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"3\r\nabc\r\n0\r\nHost: a\r\n\r\n",
        b"3;a=\x00\r\nabc\r\n",
        b"3;" + b"a" * 5000 + b"\r\nabc\r\n",
        b"".join(b"1;%b\r\nx\r\n" % (b"a" * 1000) for _ in range(20)),
        b"0\r\n" + b"".join(b"X-%d: a\r\n" % number for number in range(3000)),
        b"f" * 17 + b"\r\n",
    ],
)
@pytest.mark.parametrize("bytewise", [False, True])
def test_server_malformed_chunk_is_refused(body, bytewise):
    coding = ChunkedBody()
    with pytest.raises(HttpError, match=r"chunk|trailer"):
        for piece in [body[i : i + 1] for i in range(len(body))] if bytewise else [body]:
            coding.feed(piece)


@pytest.mark.parametrize(
    ("before", "limit"),
    [(b"3;", 4096), (b"3\r\nabc\r\n3;", 4096), (b"0\r\nX: ", 16384)],
    ids=["first", "second", "trailer"],
)
@pytest.mark.parametrize("step", [1, 100, 4000])
def test_server_chunk_line_without_end_is_refused_at_limit(before, limit, step):
    """Else a client could fill the memory with one line."""
    coding = ChunkedBody()
    coding.feed(before)
    fed = 0
    with pytest.raises(HttpError, match="malformed chunk"):
        while fed < 10 * limit:
            fed += step
            coding.feed(b"a" * step)
    assert limit - 10 < fed <= limit + step


def test_server_chunk_data_without_line_end_is_refused_at_once():
    coding = ChunkedBody()
    coding.feed(b"3\r\nabc")
    with pytest.raises(HttpError, match="malformed chunk"):
        coding.feed(b"d")


async def test_server_malformed_chunk_ends_request_and_connection():
    async with running() as on, connected(on.port) as client:
        await client.send(CHUNKED + b"3\r\nabc\r\n")
        await soon(lambda: on.app.received == 3)
        await client.send(b"nonsense\r\n" + post())
        reply = await client.reply()
        assert (reply.status, reply.code) == (400, "bad_request")
        assert await client.closed()
        assert on.app.requests == []


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
async def test_server_head_size_limit_is_exact(kind):
    async with running(kind) as on:
        for size, status in [(61440, 200), (61441, 431)]:
            for pieces in (1, 7):
                data = HEAD + b"X: \r\n\r\n"
                data = data.replace(b"X: ", b"X: " + b"x" * (size - len(data)))
                async with connected(on.port) as client:
                    step = -(-size // pieces)
                    for start in range(0, size, step):
                        await client.send(data[start : start + step])
                        await trio.testing.wait_all_tasks_blocked()
                    assert (await client.reply()).status == status


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
async def test_server_endless_head_is_refused_at_limit(kind):
    async with running(kind) as on, connected(on.port) as client:
        await client.send(HEAD + b"X: " + b"x" * 70_000)
        assert (await client.reply()).status == 431
        assert await client.closed()


async def test_server_refusal_waits_for_earlier_responses():
    async with running() as on, connected(on.port) as client:
        await client.send(post("/v1/hang") + b"nonsense\r\n\r\n")
        await soon(lambda: on.app.active)
        await trio.testing.wait_all_tasks_blocked()
        on.app.release.set()
        assert (await client.reply()).status == 200
        assert (await client.reply()).status == 400


async def test_server_empty_lines_before_request_are_ignored():
    async with running() as on, connected(on.port) as client:
        for piece in (b"\r\n", b"\r", b"\n\r", b"\n" + post(), b"\r\n\r\n" + post()):
            await client.send(piece)
            await trio.testing.wait_all_tasks_blocked()
        assert (await client.reply()).status == 200
        assert (await client.reply()).status == 200


async def test_server_many_empty_lines_before_request_are_skipped():
    async with running() as on, connected(on.port) as client:
        await client.send(b"\r\n" * 50_000 + post())
        assert (await client.reply()).status == 200


async def test_server_body_refusal_reaches_client_that_stopped_sending():
    async with running() as on:
        for _ in range(16):  # Trio schedules tasks in random order
            on.app.received = 0
            async with connected(on.port) as client:
                await client.send(CHUNKED + b"3\r\nabc\r\n")
                await soon(lambda: on.app.received == 3)
                await trio.testing.wait_all_tasks_blocked()
                os.write(client.stream.socket.fileno(), b"nonsense\r\n")
                client.stream.socket.shutdown(socket.SHUT_WR)
                assert (await client.reply()).status == 400


async def test_server_refusal_of_first_chunk_reaches_client():
    rejected = []
    async with running(on_rejected=lambda *about: rejected.append(about)) as on:
        async with connected(on.port) as client:
            await client.send(CHUNKED + b"nonsense\r\n")
            assert (await client.reply()).status == 400
        assert on.app.started == 0
    ((refusal, _, line),) = rejected
    assert (refusal.status, line) == (400, b"POST /v1/score HTTP/1.1")


async def test_server_request_at_end_of_patience_is_answered():
    client, side = socket.socketpair()
    with client:
        side.setblocking(False)
        connection = SocketConnection(Lane(nothing), side)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            await trio.testing.wait_all_tasks_blocked()
            client.send(post(CHAT, b"", b"Connection: close"))
            connection.expire()
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")


async def test_server_drain_loses_no_request_being_handed_over():
    moved = []

    async def drain() -> None:
        server.drain()

    def not_here(method: str, path: bytes) -> bool:
        nursery.start_soon(drain)
        return False

    async def serve() -> None:
        moved.append(await StreamConnection(server, side).run())

    for _ in range(8):  # Trio schedules tasks in random order
        server = Lane(nothing, accepts=not_here)
        client, side = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            await trio.testing.wait_all_tasks_blocked()
            await client.send_all(get("/page"))
    assert moved == [get("/page")] * 8


async def test_server_refusal_sends_no_continue():
    async with running() as on, connected(on.port) as client:
        await client.send(post("/v1/early", b"abc", b"Expect: 100-continue")[:-3])
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (413, "close")
        assert await client.closed()


async def test_server_http_1_0_may_keep_connection():
    async with running() as on, connected(on.port) as client:
        for _ in range(2):
            await client.send(post(CHAT, b"{}", b"Connection: Keep-Alive", version="1.0"))
            reply = await client.reply()
            assert reply.headers["connection"] == "keep-alive"


async def test_server_slow_client_delays_no_other():
    async with running() as on:
        async with connected(on.port) as slow, connected(on.port) as quick:
            await slow.send(post("/v1/flood"))
            await soon(lambda: on.app.active)
            await quick.send(post())
            with trio.fail_after(60):
                assert (await quick.reply()).status == 200


# -- in virtual time ---------------------------------------------------------------------------


class Memory:
    """The lane over memory streams."""

    def __init__(self, nursery: trio.Nursery, app, **limits: float) -> None:
        self.server = Lane(app, limits=Limits(**limits))
        self.client, side = trio.testing.memory_stream_pair()
        nursery.start_soon(self.server.watch)
        nursery.start_soon(StreamConnection(self.server, side).run)

    async def received(self) -> bytes:
        data = b""
        while more := await self.client.receive_some():
            data += more
        return bytes(data)


async def nothing(scope, receive, send):
    while (await receive())["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})


async def test_server_idle_connection_is_closed_after_keep_alive_time(autojump_clock):
    async with trio.open_nursery() as nursery:
        on = Memory(nursery, nothing)
        assert await on.received() == b""
        assert 75 <= trio.current_time() <= 76
        nursery.cancel_scope.cancel()


async def test_server_empty_line_after_request_does_not_keep_connection(autojump_clock):
    async with trio.open_nursery() as nursery:
        on = Memory(nursery, nothing)
        await trio.sleep(10)
        await on.client.send_all(post() + b"\r\n")
        with trio.fail_after(100):
            assert (await on.received()).startswith(b"HTTP/1.1 200 ")
        assert 85 <= trio.current_time() <= 86
        nursery.cancel_scope.cancel()


async def test_server_trickling_head_has_ten_seconds(autojump_clock):
    async with trio.open_nursery() as nursery:
        on = Memory(nursery, nothing)

        async def trickle() -> None:
            for byte in get("/" + "x" * 100):
                await on.client.send_all(bytes([byte]))
                await trio.sleep(0.5)

        nursery.start_soon(trickle)
        assert (await on.received()).startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() <= 13
        nursery.cancel_scope.cancel()


async def test_server_long_body_at_minimum_rate_is_accepted(autojump_clock):
    async with trio.open_nursery() as nursery:
        on = Memory(nursery, nothing, min_body_rate=10)
        await on.client.send_all(HEAD + b"Content-Length: 6000\r\n\r\n")
        for _ in range(60):
            await trio.sleep(5)
            await on.client.send_all(bytes(100))
        assert (await on.client.receive_some()).startswith(b"HTTP/1.1 200 ")
        nursery.cancel_scope.cancel()


async def test_server_trickling_body_is_timed_out(autojump_clock):
    async with trio.open_nursery() as nursery:
        on = Memory(nursery, nothing, min_body_rate=10)
        await on.client.send_all(HEAD + b"Content-Length: 6000\r\n\r\n")

        async def trickle() -> None:
            while True:
                await trio.sleep(5)
                await on.client.send_all(b"x")

        nursery.start_soon(trickle)
        assert (await on.client.receive_some()).startswith(b"HTTP/1.1 408 ")
        assert 60 <= trio.current_time() <= 70
        nursery.cancel_scope.cancel()


async def test_server_application_time_does_not_count_for_client(autojump_clock):
    async def dawdle(scope, receive, send):
        await receive()
        await trio.sleep(300)
        await nothing(scope, receive, send)

    async with trio.open_nursery() as nursery:
        on = Memory(nursery, dawdle, max_read_ahead=10)
        await on.client.send_all(HEAD + b"Content-Length: 100\r\n\r\n" + bytes(10))
        await trio.testing.wait_all_tasks_blocked()
        await on.client.send_all(bytes(50))
        await trio.sleep(290)
        nursery.start_soon(on.client.send_all, bytes(40))
        assert (await on.client.receive_some()).startswith(b"HTTP/1.1 200 ")
        nursery.cancel_scope.cancel()


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"a", b"a:80", b"a.b-c_d", b"[::1]:8000", b"[fe80::1%25eth0]"])
def test_server_valid_host_is_accepted(value):
    assert valid_host(value)


@pytest.mark.parametrize("value", [b"", b":80", b"a b", b"a/", b"a:b", b"[::1", b"u@a", b"a,b"])
def test_server_invalid_host_is_refused(value):
    assert not valid_host(value)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"/a?b", (b"/a", b"b")),
        (b"/a?b?c", (b"/a", b"b?c")),
        (b"/a?", (b"/a", b"")),
        (b"//a/b", (b"//a/b", b"")),
        (b"http://h/a?b", (b"/a", b"b")),
        (b"HTTPS://h:1?b", (b"/", b"b")),
    ],
)
def test_server_target_is_accepted_or_refused(target, expected):
    assert split_target("GET", target) == expected


def answer_to(method: str = "POST", version: str = "1.1") -> ResponseWriter:
    return ResponseWriter(Head(method, b"/", b"", version))


def body(data: bytes, *, more: bool = False):
    return {"type": "http.response.body", "body": data, "more_body": more}


def start(status: int = 200, *headers: tuple[bytes, bytes]):
    return {"type": "http.response.start", "status": status, "headers": headers}


def test_server_response_in_one_piece_has_length():
    answer = answer_to()
    answer.hold(start(200, (b"date", b"now")))
    assert answer.encode(body(b"abc"), close=False) == (
        b"HTTP/1.1 200 OK\r\ndate: now\r\ncontent-length: 3\r\n\r\nabc"
    )


def test_server_connection_headers_of_application_are_dropped():
    answer = answer_to()
    fields = ((b"Transfer-Encoding", b"gzip"), (b"Keep-Alive", b"5"), (b"Connection", b"close"))
    answer.hold(start(200, (b"date", b"now"), *fields))
    assert answer.encode(body(b""), close=False) == (
        b"HTTP/1.1 200 OK\r\ndate: now\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    )
    assert answer.close


@pytest.mark.parametrize("sent", [b"ab", b"abcd"])
def test_server_response_of_wrong_length_raises(sent):
    answer = answer_to()
    answer.hold(start(200, (b"content-length", b"3")))
    with pytest.raises(RuntimeError):
        answer.encode(body(sent), close=False)
    assert not answer.started


@pytest.mark.parametrize("value", [b"a\r\nb: c", b"a\nb", b"a\rb", b"a\0b"])
def test_server_control_characters_in_headers_raise(value):
    for field in ((b"x", value), (value, b"x")):
        answer = answer_to()
        answer.hold(start(200, field))
        with pytest.raises(RuntimeError):
            answer.encode(body(b""), close=False)


@pytest.mark.parametrize("status", [100, 101, 199, 99, 1000])
def test_server_interim_status_as_response_raises(status):
    answer = answer_to()
    answer.hold(start(status))
    with pytest.raises(RuntimeError):
        answer.encode(body(b""), close=False)


@pytest.mark.parametrize("status", [204, 304])
def test_server_response_without_content_has_no_body(status):
    answer = answer_to()
    answer.hold(start(status, (b"date", b"now")))
    assert answer.encode(body(b"abc", more=True), close=False).endswith(b"date: now\r\n\r\n")
    assert answer.encode(body(b"def"), close=False) == b""


def test_server_unknown_status_has_no_reason():
    answer = answer_to()
    answer.hold(start(599))
    assert answer.encode(body(b""), close=False).startswith(b"HTTP/1.1 599 \r\n")


def test_server_empty_part_does_not_end_stream():
    answer = answer_to()
    answer.hold(start())
    assert answer.encode(body(b"", more=True), close=False).endswith(b"\r\n\r\n")
    assert answer.encode(body(b"", more=True), close=False) == b""
    assert answer.encode(body(b"ab", more=True), close=False) == b"2\r\nab\r\n"
    assert answer.encode(body(b"c"), close=False) == b"1\r\nc\r\n0\r\n\r\n"
    with pytest.raises(RuntimeError):
        answer.encode(body(b""), close=False)


def test_server_messages_out_of_order_raise():
    answer = answer_to()
    with pytest.raises(RuntimeError):
        answer.encode(body(b""), close=False)
    answer.hold(start())
    with pytest.raises(RuntimeError):
        answer.hold(start())


def test_chunked_helper_body_is_parsed():
    data = chunked("/", b"abc", b"de").partition(b"\r\n\r\n")[2]
    coding = ChunkedBody()
    pieces, used = coding.feed(data + b"next")
    assert (b"".join(pieces), data[used:], coding.complete) == (b"abcde", b"", True)
