"""The source `http`, in virtual time with answers in memory."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import trio
from trio.testing import MockClock

from support.one_piece import OnePiece
from support.source_notes import Notes
from vllm_router.config.discovery import HttpSource
from vllm_router.config.parser import parse
from vllm_router.config.types import Secret
from vllm_router.discovery.file_sd import MAX_BYTES
from vllm_router.discovery.http_source import WebDocument
from vllm_router.discovery.source import Again
from vllm_router.errors import ConfigError

URL = "http://sd.test/targets?team=ml"


class Inventory:
    """The server of the document: answers as `answer` says, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answer: Callable[[httpx.Request], httpx.Response] = self.targets("a:1")

    @staticmethod
    def targets(*addresses: str, **more: Any) -> Callable[[httpx.Request], httpx.Response]:
        body = json.dumps([{"targets": addresses}]).encode()
        return lambda request: httpx.Response(200, stream=OnePiece(body), **more)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        await trio.lowlevel.checkpoint()
        return self.answer(request)


@asynccontextmanager
async def following(
    inventory: Any, again: Again | None = None, **options: Any
) -> AsyncIterator[Notes]:
    notes = Notes()
    config = HttpSource(**{"name": "http", "url": URL, **options})

    async def connect(config: HttpSource) -> httpx.AsyncBaseTransport:
        return httpx.MockTransport(inventory)

    source = WebDocument(config, connect)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.run, notes, again or Again())
        yield notes
        nursery.cancel_scope.cancel()


async def test_http_document_is_fetched_every_interval(autojump_clock: MockClock) -> None:
    inventory = Inventory()
    async with following(inventory) as notes:
        await notes.until(lambda it: it.sets == [["a:1"]])
        inventory.answer = inventory.targets("a:1", "b:1")
        began = trio.current_time()
        await notes.until(lambda it: it.sets[-1] == ["a:1", "b:1"])
        assert trio.current_time() - began == pytest.approx(30, abs=0.1)
    assert str(inventory.requests[0].url) == URL


async def test_http_sends_headers_and_key(autojump_clock: MockClock) -> None:
    inventory = Inventory()
    headers = (("X-Scope", Secret("ml")), ("User-Agent", Secret("mine")))
    async with following(inventory, headers=headers, api_key=Secret("k")) as notes:
        await notes.until(lambda it: it.sets == [["a:1"]])
    sent = inventory.requests[0].headers
    assert (sent["x-scope"], sent["authorization"]) == ("ml", "Bearer k")
    assert sent["user-agent"] == "mine"


async def test_http_unchanged_document_is_confirmed_by_etag(autojump_clock: MockClock) -> None:
    inventory = Inventory()
    inventory.answer = inventory.targets("a:1", headers={"etag": '"v1"'})
    async with following(inventory) as notes:
        await notes.until(lambda it: it.sets == [["a:1"]])
        inventory.answer = lambda request: httpx.Response(
            304 if request.headers.get("if-none-match") == '"v1"' else 500
        )
        await notes.until(lambda it: it.confirmations == 2)
        assert notes.sets == [["a:1"]]
        assert notes.problem is None


async def test_http_etag_beyond_ascii_is_not_sent_back(autojump_clock: MockClock) -> None:
    inventory = Inventory()
    inventory.answer = inventory.targets("a:1", headers=[(b"etag", b'"caf\xe9"')])
    async with following(inventory) as notes:
        await notes.until(lambda it: it.sets == [["a:1"]])
        inventory.answer = inventory.targets("b:1")
        await notes.until(lambda it: it.sets[-1] == ["b:1"])
        assert notes.problem is None
    assert "if-none-match" not in inventory.requests[-1].headers


def _raise(error: Exception) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        raise error

    return answer


def _body(data: bytes, **headers: str) -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: httpx.Response(200, stream=OnePiece(data), headers=headers)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (lambda request: httpx.Response(500), "it answered 500"),
        (lambda request: httpx.Response(401), "it answered 401: check its api_key"),
        (lambda request: httpx.Response(304), "it answered 304"),
        (lambda request: httpx.Response(204), "it answered 204"),
        (
            lambda request: httpx.Response(302, headers={"location": "http://evil.test"}),
            "a redirect: set `url`",
        ),
        (_body(b""), "empty document"),
        (_body(b"<html>"), "expected JSON"),
        (_body(b"{}"), "expected an array of groups"),
        (_body(b" " * (MAX_BYTES + 1)), "it is longer than"),
        (
            _body(gzip.compress(b" " * (MAX_BYTES + 1)), **{"content-encoding": "gzip"}),
            "it is longer than",
        ),
        (_body(b"x", **{"content-encoding": "br"}), "it is compressed"),
        (_raise(httpx.ConnectError("refused")), "refused"),
        (_raise(httpx.RemoteProtocolError("cut")), "cut"),
    ],
)
async def test_http_bad_answer_keeps_the_last_set(
    autojump_clock: MockClock, answer: Any, problem: str
) -> None:
    inventory = Inventory()
    async with following(inventory) as notes:
        await notes.until(lambda it: it.sets == [["a:1"]])
        inventory.answer = answer
        await notes.until(lambda it: it.problem is not None)
        assert problem in (notes.problem or "")
        assert notes.sets == [["a:1"]]
        inventory.answer = inventory.targets("b:1")
        await notes.until(lambda it: it.sets[-1] == ["b:1"] and it.problem is None)


async def test_http_silent_server_is_a_failure_after_timeout(autojump_clock: MockClock) -> None:
    async def silent(request: httpx.Request) -> httpx.Response:
        await trio.sleep_forever()
        raise AssertionError

    async with following(silent, timeout=3.0) as notes:
        await notes.until(lambda it: it.problem is not None)
        assert trio.current_time() == pytest.approx(3, abs=0.1)
        assert notes.problem == "no whole answer within 3 s"


async def test_http_dripping_body_is_a_failure_after_timeout(autojump_clock: MockClock) -> None:
    class Drip(httpx.AsyncByteStream):
        def __aiter__(self) -> AsyncIterator[bytes]:
            return self

        async def __anext__(self) -> bytes:
            await trio.sleep(0.5)
            return b" "

    inventory = Inventory()
    inventory.answer = lambda request: httpx.Response(200, stream=Drip())
    async with following(inventory, timeout=3.0) as notes:
        await notes.until(lambda it: it.problem is not None)
        assert "no whole answer" in (notes.problem or "")


async def test_http_is_asked_at_most_every_five_seconds_while_it_fails(
    autojump_clock: MockClock,
) -> None:
    inventory = Inventory()
    inventory.answer = lambda request: httpx.Response(503)
    async with following(inventory):
        await trio.sleep(3600)
    assert len(inventory.requests) <= 3600 / 5 + 1


async def test_http_second_look_comes_at_once(autojump_clock: MockClock) -> None:
    inventory, again = Inventory(), Again()
    async with following(inventory, again) as notes:
        await notes.until(lambda it: len(it.sets) == 1)
        again()
        await notes.until(lambda it: len(it.sets) == 2)
        assert trio.current_time() < 1


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("{}", "discovery.http.url: expected a URL"),
        ('{ url = "ftp://x" }', "discovery.http.url: expected a URL"),
        ('{ url = "http://u:p@x/" }', "without a password"),
        ('{ url = "http://x:99999/" }', "discovery.http.url: expected a URL"),
        ('{ url = "http://x/", interval = 0 }', "discovery.http.interval: expected number"),
        (
            '{ url = "http://x/", headers = { "a b" = "c" } }',
            'headers."a b": expected the name of a header',
        ),
        ('{ url = "http://x/", headers = { a = "b\\nc" } }', "headers.a: expected a string"),
        ('{ url = "http://x/", headers = { a = "b\\nc" } }', "not shown"),
        ('{ url = "http://x/", headers = 5 }', "discovery.http.headers: expected table"),
        ('{ url = "http://x/", headers = { Content-Length = "5" } }', "headers.Content-Length"),
        ('{ url = "http://x/", api_key = "a", headers = { Authorization = "b" } }', "got both"),
        ('{ url = "http://x/", ca = "/nowhere.pem" }', "discovery.http.ca"),
        ('{ url = "http://x/", api_key_env = "NOT_SET" }', "discovery.http.api_key_env"),
    ],
)
def test_http_table_problem_names_key(table: str, problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(f"[discovery]\nhttp = {table}\n".encode(), "servers.toml", {})
    assert any(problem in line for line in raised.value.problems), raised.value.problems


def test_http_place_hides_query_and_secrets_are_masked() -> None:
    from vllm_router.discovery.kinds import kind_and_place

    text = f'[discovery]\nhttp = {{ url = "{URL}", api_key = "k1", headers = {{ a = "h1" }} }}\n'
    discovery = parse(text.encode(), "servers.toml", {}).discovery
    assert discovery is not None
    assert kind_and_place(discovery.sources[0]) == ("http", "http://sd.test/targets")
    assert "k1" not in repr(discovery)
    assert "h1" not in repr(discovery)
