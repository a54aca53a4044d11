"""Probes of a server with a bad name, port, TLS or response: the resulting state and message.

The probe's own client is used, with a resolver and a network of the test, in virtual time.
"""

from __future__ import annotations

import math
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio

from support.fleet_makers import make_config, shown_state
from support.scripted_server import (
    Script,
    ScriptedServer,
    Talk,
    answer,
    answering,
    ok,
    once,
    silent,
)
from vllm_router.errors import ConnectFailed
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State
from vllm_router.http.client import race
from vllm_router.http.client.resolver import Address, Host, Resolver
from vllm_router.runtime.probe import Probe

NO_ANSWER = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
NO_SUCH_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


async def engine(talk: Talk) -> None:
    """A server that closes its connection after each answer: every check connects anew."""
    request = await talk.request()
    page = b'{"data": [{"id": "m"}]}' if b"/v1/models" in request.line else b""
    await talk.send(ok(page, b"connection: close"))


class World:
    """One server called `gpu.test`, a resolver, and the result of connecting to each address."""

    def __init__(self, server: Server, scripted: ScriptedServer) -> None:
        self.server = server
        self.scripted = scripted
        self.answer: list[str] | Exception | None = ["10.0.0.1"]
        self.network: dict[str, ScriptedServer | Exception] = {"10.0.0.1": scripted}
        self.downs: list[float] = []

    async def look_up(self, name: str) -> list[Host]:
        if self.answer is None:
            await trio.sleep_forever()
        await trio.sleep(0.01)
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return [(socket.AF_INET, text, 0, 0) for text in self.answer]

    async def connect(self, address: Address, slow: Callable[[], None]) -> socket.socket:
        there = self.network.get(address[1][0])
        await trio.lowlevel.checkpoint()
        if isinstance(there, Exception):
            raise there
        if there is None:
            await trio.sleep(connecting_delay())
            slow()
            await trio.sleep_forever()
        assert isinstance(there, ScriptedServer)
        return there.connect()

    @property
    def state(self) -> tuple[State, str]:
        return shown_state(self.server, trio.current_time())

    async def until(self, condition: Callable[[], bool]) -> float:
        """Seconds until the condition holds."""
        began = trio.current_time()
        with trio.fail_after(300):
            while not condition():
                await trio.sleep(0.05)
        return trio.current_time() - began


def connecting_delay() -> float:
    return 0.25


@asynccontextmanager
async def world(
    monkeypatch: pytest.MonkeyPatch,
    script: Script = engine,
    prepare: Callable[[World], None] = lambda _: None,
    seed: int = 1,
) -> AsyncIterator[World]:
    config = make_config([{"url": "http://gpu.test:8000", "name": "a"}])
    fleet = Fleet(config)
    server = fleet.servers["a"]
    async with trio.open_nursery() as nursery:
        there = World(server, ScriptedServer(nursery, script))
        prepare(there)
        monkeypatch.setattr(race, "connect", there.connect)
        probe = Probe(
            server,
            fleet,
            Random(seed),
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            lambda _: there.downs.append(trio.current_time()),
            lambda *_: None,
            Resolver(there.look_up),
        )
        nursery.start_soon(probe.run)
        yield there
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("trouble", "seconds"), [(NO_ANSWER, 300), (NO_SUCH_NAME, 60), ([], 60), (None, 120)], ids=str
)
async def test_probe_resolver_failure_takes_no_server_down(
    autojump_clock, monkeypatch, caplog, trouble, seconds
):
    """Every check needs a new connection; one of the failures lasts for five minutes."""
    async with world(monkeypatch) as there:
        await there.until(lambda: there.state[0] is State.UP)
        there.answer = trouble
        await trio.sleep(seconds)
        assert there.state == (State.UP, "")
        assert there.server.active_health.success_rate == 1.0
        assert there.downs == []
        assert "cannot resolve gpu.test" in caplog.text


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (NO_ANSWER, "cannot resolve gpu.test: Temporary failure in name resolution"),
        (NO_SUCH_NAME, "cannot resolve gpu.test: Name or service not known"),
        ([], "cannot resolve gpu.test: the resolver knows no address"),
        (None, "no answer of the resolver for gpu.test in 2 s"),
    ],
    ids=str,
)
async def test_probe_unresolvable_name_is_down_with_resolver_message(
    autojump_clock, monkeypatch, trouble, words
):
    async with world(monkeypatch, prepare=lambda w: setattr(w, "answer", trouble)) as there:
        await there.until(lambda: there.state[0] is State.DOWN)
        assert words in there.state[1]
        there.answer = ["10.0.0.1"]
        assert await there.until(lambda: there.state[0] is State.UP) < 70


async def test_probe_moved_name_is_followed_while_old_address_swallows(autojump_clock, monkeypatch):
    async with world(monkeypatch) as there:
        await there.until(lambda: there.state[0] is State.UP)
        there.network, there.answer = {"10.0.0.2": there.scripted}, ["10.0.0.2"]
        await trio.sleep(60)
        assert there.downs == []
        assert there.server.active_health.success_rate == 1.0


async def test_probe_swallowing_first_address_takes_no_server_down(autojump_clock, monkeypatch):
    def two(there: World) -> None:
        there.answer = ["10.9.9.9", "10.0.0.1"]

    async with world(monkeypatch, prepare=two) as there:
        assert await there.until(lambda: there.state[0] is State.UP) < 2
        await trio.sleep(120)
        assert there.downs == []


async def tls_server(talk: Talk) -> None:
    await talk.request()
    await talk.send(b"\x15\x03\x01\x00\x02\x02\x46")


async def resets(talk: Talk) -> None:
    await talk.request()
    talk.reset()


START = {
    "refused": (engine, ConnectFailed("Connection refused"), "Connection refused"),
    "unreachable": (engine, ConnectFailed("No route to host"), "No route to host"),
    "swallows": (engine, None, "no connection in 2 s"),
    "certificate": (
        *(engine, ConnectFailed("its certificate is not trusted: certificate has expired")),
        "certificate has expired",
    ),
    "silent": (silent, ..., "no answer to /health in 2 s"),
    "closes": (once(), ..., "connection closed before the response"),
    "not http": (once(b"SSH-2.0-OpenSSH_9.2\r\n"), ..., "is not HTTP/1.1"),
    "tls": (tls_server, ..., "speaks TLS"),
    "503": (answering(answer(503, b"")), ..., "/health answered 503"),
    "401": (answering(answer(401, b"")), ..., "/health answered 401"),
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("script", "connects", "words"), START.values(), ids=START)
async def test_probe_down_at_start_has_helpful_reason(
    autojump_clock, monkeypatch, script: Callable[[Talk], Awaitable[None]], connects, words, seed
):
    """Whichever check comes first, including the scrape's connection."""

    def prepare(there: World) -> None:
        if connects is None:
            there.network.clear()
        elif connects is not ...:
            there.network["10.0.0.1"] = connects

    async with world(monkeypatch, script, prepare, seed) as there:
        await there.until(lambda: there.state[0] is State.DOWN)
        assert words in there.state[1]
        await trio.sleep(10)
        assert there.state[0] is State.DOWN
        assert words in there.state[1]


async def test_probe_reason_of_down_server_follows_last_check(autojump_clock, monkeypatch):
    async with world(monkeypatch) as there:
        await there.until(lambda: there.state[0] is State.UP)
        there.network["10.0.0.1"] = ConnectFailed("Connection refused")
        await there.until(lambda: there.state[0] is State.DOWN)
        assert "Connection refused" in there.state[1]
        there.network["10.0.0.1"] = there.scripted
        there.scripted.script = once(answer(503, b""))
        await there.until(lambda: "/health answered 503" in there.state[1])
        there.scripted.script = silent
        assert await there.until(lambda: "no answer to /health" in there.state[1]) < 20
        assert not math.isnan(there.server.active_health.mean_response_time)
