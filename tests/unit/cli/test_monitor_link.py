"""The monitor's connection to the feed: what ends it, and how it comes back."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio_websocket

from support.feed_makers import event, hello, server, snapshot
from support.scripted_server import ScriptedServer, Talk, answer
from vllm_router.cli.monitor import link, plain
from vllm_router.cli.monitor.link import (
    FIRST_PAUSE,
    GOING_AWAY,
    LONGEST_PAUSE,
    SILENCE,
    Feed,
    GoingAway,
    Message,
    NoFeed,
)
from vllm_router.cli.monitor.plain import print_lines

PEM = Path(__file__).parents[2] / "data" / "localhost.pem"

Serve = Callable[[trio_websocket.WebSocketRequest], Any]


def encoded(message: Message) -> str:
    return msgspec.json.encode(message).decode()


async def failure_of(
    serve: Serve, scheme: str = "http", tls: ssl.SSLContext | None = None, **options: Any
) -> tuple[list[Message], NoFeed]:
    """What a router that serves the feed like this sends, and how the connection ends."""
    taken: list[Message] = []
    async with trio.open_nursery() as nursery:
        handler: Any = trio_websocket.serve_websocket
        service = await nursery.start(handler, serve, "127.0.0.1", 0, tls)
        feed = Feed(f"{scheme}://127.0.0.1:{service.port}", **options)
        with trio.fail_after(60), pytest.raises(NoFeed) as ended:
            await feed.once(taken.append)
        nursery.cancel_scope.cancel()
    return taken, ended.value


def sending(*texts: str, code: int | None = None) -> Serve:
    """A router that accepts, sends these messages and closes with the code."""

    async def serve(request: trio_websocket.WebSocketRequest) -> None:
        connection = await request.accept()
        for text in texts:
            await connection.send_message(text)
        if code is not None:
            await connection.aclose(code)

    return serve


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (GOING_AWAY, GoingAway, "the router is stopping"),
        (1011, NoFeed, "the router closed the connection"),
    ],
)
async def test_feed_messages_are_taken_until_the_router_closes(code, kind, words):
    sent: list[Message] = [hello(), snapshot(server("a")), event(1, "hi")]
    taken, ended = await failure_of(sending(*map(encoded, sent), code=code))
    assert taken == sent
    assert (type(ended), str(ended)) == (kind, words)


async def test_feed_key_is_sent_as_a_bearer_token():
    seen: list[tuple[bytes, bytes]] = []

    async def serve(request: trio_websocket.WebSocketRequest) -> None:
        seen.extend(request.headers)
        assert request.path == "/ws/load"
        await sending(code=1000)(request)

    await failure_of(serve, key="secret")
    assert (b"authorization", b"Bearer secret") in seen


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "it needs its status or admin key (--key or VLLM_ROUTER_KEY)"),
        (404, "it answers 404: it is no vLLM Router, or does not accept this client"),
    ],
)
async def test_feed_rejected_handshake_is_explained(status, words):
    async def serve(request: trio_websocket.WebSocketRequest) -> None:
        await request.reject(status)

    _, ended = await failure_of(serve)
    assert str(ended) == words


@pytest.mark.parametrize("text", ["odd", '{"type":"unknown"}'])
async def test_feed_of_another_service_is_named(text):
    taken, ended = await failure_of(sending(text, code=1000))
    assert taken == []
    assert str(ended).startswith("not the feed of a vLLM Router: ")


async def test_feed_without_a_listener_says_what_the_system_says():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        feed = Feed(f"http://127.0.0.1:{unused.getsockname()[1]}/")
        with pytest.raises(NoFeed, match=r"^Connection refused$"):
            await feed.once(lambda _: None)


async def test_feed_url_that_is_none_is_named():
    with pytest.raises(NoFeed, match=r"^http://a:b: "):
        await Feed("a:b").once(lambda _: None)


async def test_feed_with_missing_authorities_is_an_error_before_connecting(tmp_path):
    feed = Feed("https://127.0.0.1:1", ca=str(tmp_path / "missing.pem"))
    with pytest.raises(NoFeed, match=r"missing\.pem"):
        await feed.once(lambda _: None)


async def test_feed_of_port_without_tls_is_named():
    async with trio.open_nursery() as nursery:
        scripted = ScriptedServer(nursery, plain_http)
        port = await nursery.start(scripted.listen)
        with trio.fail_after(60), pytest.raises(NoFeed, match=r"^TLS failed: "):
            await Feed(f"https://127.0.0.1:{port}").once(lambda _: None)
        nursery.cancel_scope.cancel()


async def plain_http(talk: Talk) -> None:
    """Answers anything with plain HTTP."""
    await talk.send(answer(400, b""))
    await talk.gone()


@pytest.mark.parametrize("ca", [str(PEM), None])
async def test_feed_over_tls_verifies_the_certificate(ca):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    sent = event(1, "hi")
    taken, ended = await failure_of(sending(encoded(sent), code=1001), "https", context, ca=ca)
    if ca is None:
        assert (taken, "certificate is not trusted" in str(ended)) == ([], True)
    else:
        assert (taken, type(ended)) == ([sent], GoingAway)


@pytest.mark.parametrize("rejects", [False, True])
async def test_feed_of_router_on_this_machine_comes_by_its_unix_socket(
    tmp_path, monkeypatch, rejects
):
    path = str(tmp_path / "socket")
    monkeypatch.setattr(link, "find_socket", lambda url: path)
    taken: list[Message] = []

    async def serve(stream: trio.SocketStream) -> None:
        async with trio.open_nursery() as connections:
            request = await trio_websocket.wrap_server_stream(connections, stream)
            if rejects:
                await request.reject(401)
            else:
                await sending(encoded(event(7, "near")), code=GOING_AWAY)(request)

    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(path)
        listener.listen()
        async with trio.open_nursery() as nursery:
            like_tcp = trio.SocketListener.__new__(trio.SocketListener)
            like_tcp.socket = listener
            nursery.start_soon(trio.serve_listeners, serve, [like_tcp])
            with trio.fail_after(60), pytest.raises(NoFeed) as ended:
                await Feed("http://router.test").once(taken.append)
            nursery.cancel_scope.cancel()
    if rejects:
        assert "status or admin key" in str(ended.value)
    else:
        assert (taken, type(ended.value)) == ([event(7, "near")], GoingAway)


async def test_feed_unix_socket_that_is_gone_says_what_the_system_says(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "find_socket", lambda url: str(tmp_path / "none"))
    with pytest.raises(NoFeed, match=r"^No such file or directory$"):
        await Feed("http://router.test").once(lambda _: None)


# -- in virtual time ----------------------------------------------------------------------------


class Connection:
    """A connection that sends a hello, and then nothing."""

    def __init__(self) -> None:
        self.messages = [encoded(hello())]

    async def get_message(self) -> str:
        await trio.lowlevel.checkpoint()
        if not self.messages:
            await trio.sleep_forever()
        return self.messages.pop()


async def test_feed_silence_ends_a_connection_after_a_few_intervals(autojump_clock):
    feed, connection = Feed("http://router.test"), Connection()
    like_websocket: Any = connection
    for words, seconds in (("12", 12.0), ("12", 12.0)):  # the interval of the hello is 0.5 s
        began = trio.current_time()
        with pytest.raises(NoFeed, match=f"^the router was silent for {words} s$"):
            await feed._read(like_websocket, lambda _: None)
        assert trio.current_time() - began == seconds
    assert SILENCE == 10.0


class Scripted(Feed):
    """A feed whose connections send these messages, each, and end. `at` is when they began."""

    def __init__(self, *rounds: list[Message]) -> None:
        super().__init__("router.test")
        self.rounds = list(rounds)
        self.at: list[float] = []

    async def once(self, take: Callable[[Message], None]) -> None:
        self.at.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if not self.rounds:
            raise NoFeed("gone")
        for message in self.rounds.pop(0):
            take(message)
        raise NoFeed("broken")


async def test_feed_follow_reconnects_after_growing_pauses(autojump_clock):
    feed, lost, taken = Scripted([event(1, "a")]), [], []
    with trio.move_on_after(20):
        await feed.follow(taken.append, lambda error: lost.append(str(error)), patient=False)
    assert taken == [event(1, "a")]
    assert lost[:3] == ["broken", "gone", "gone"]
    pauses = [after - before for before, after in zip(feed.at, feed.at[1:], strict=False)]
    assert pauses[:6] == [FIRST_PAUSE, 0.5, 1.0, 2.0, LONGEST_PAUSE, LONGEST_PAUSE]


async def test_feed_follow_message_shortens_the_next_pause(autojump_clock):
    feed = Scripted([], [], [], [event(1, "a")])
    with trio.move_on_after(6):
        await feed.follow(lambda _: None, lambda _: None, patient=True)
    pauses = [after - before for before, after in zip(feed.at, feed.at[1:], strict=False)]
    assert pauses[:4] == [FIRST_PAUSE, 0.5, 1.0, FIRST_PAUSE]


@pytest.mark.parametrize("patient", [False, True])
async def test_feed_follow_first_failure_ends_it_unless_patient(autojump_clock, patient):
    lost: list[NoFeed] = []
    with trio.move_on_after(1) as time:
        if patient:
            await Scripted().follow(lambda _: None, lost.append, patient=True)
        else:
            with pytest.raises(NoFeed, match="gone"):
                await Scripted().follow(lambda _: None, lost.append, patient=False)
    assert time.cancelled_caught is patient
    assert bool(lost) is patient


# -- lines instead of a screen ------------------------------------------------------------------


async def test_print_lines_shows_figures_events_and_breaks(autojump_clock, capsys):
    first: list[Message] = [hello(), snapshot(server("a"))]
    soon: Message = snapshot(server("a"))
    again: list[Message] = [hello(event(3, "c\x1b")), snapshot(server("a"))]
    feed = Scripted([*first, event(2, "b"), soon], again)
    with trio.move_on_after(0.7):
        await print_lines(feed, 60.0)
    lines = [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    figures = plain.summary(snapshot(server("a")))
    assert lines == [
        figures,
        "b",
        "no data from http://router.test: broken; trying again",
        "c\\x1b",
        "connected again to http://router.test",
        figures,
        "no data from http://router.test: broken; trying again",
        "no data from http://router.test: gone; trying again",
    ]


async def test_print_lines_figures_come_once_per_interval(autojump_clock, capsys):
    class Ticking(Feed):
        async def once(self, take: Callable[[Message], None]) -> None:
            take(hello())
            for _ in range(21):
                take(snapshot(server("a")))
                await trio.sleep(0.5)
            raise NoFeed("end")

    with trio.move_on_after(10.4):
        await print_lines(Ticking("router.test"), 5.0)
    assert len(capsys.readouterr().out.splitlines()) == 3
