"""Connections that repeat a head: what is cached for it, and when the cache is dropped."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from support.fleet_makers import make_config
from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, router_process, servers_toml, until
from unit.config.test_auth import read
from vllm_router.errors import Refused
from vllm_router.http.asgi_types import HEAD_MEMO, IDENTITY
from vllm_router.proxy.body import Bodies, BodyShare
from vllm_router.proxy.client_head import ClientHead
from vllm_router.proxy.identity import ANONYMOUS
from vllm_router.routing.paths import classify
from vllm_router.web.guard import Guard

PATH = "/v1/chat/completions"
KEY = "sk-client-1"
KEYS = f"""
[auth]
[[auth.keys]]
name = "c"
key = "{KEY}"
"""


def scope_of(memo: dict[Any, Any] | None, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
        "headers": [(b"host", b"r"), *headers, (b"content-length", b"7")],
        "extensions": {HEAD_MEMO: memo} if memo is not None else {},
    }


INFERENCE = classify("POST", PATH.encode())
BEARER = (b"authorization", b"Bearer " + KEY.encode())


def test_head_memo_key_is_removed_from_every_request():
    guard, memo = Guard(read(KEYS)), {}
    for _ in range(3):
        scope = scope_of(memo, BEARER)
        known = guard.remembers(scope)
        if not known:
            guard.admit(scope, INFERENCE)
        assert BEARER not in scope["headers"]
        assert scope[IDENTITY].key.name == "c"
    assert known


def test_head_memo_is_dropped_when_rules_change():
    memo: dict[Any, Any] = {}
    open_to_all = Guard(read(""))
    scope = scope_of(memo, BEARER)
    assert not open_to_all.remembers(scope)
    open_to_all.admit(scope, INFERENCE)
    assert open_to_all.remembers(scope_of(memo, BEARER))
    assert scope[IDENTITY] is ANONYMOUS
    memo["of others"] = BEARER
    assert not Guard(read(KEYS)).remembers(scope_of(memo, BEARER))
    assert memo == {}


def test_head_memo_other_origin_is_checked_every_time():
    guard = Guard(read('[config]\ncors_origins = ["https://a.example"]'))
    memo: dict[Any, Any] = {}
    guard.admit(scope_of(memo, (b"origin", b"https://a.example")), INFERENCE)
    assert not guard.remembers(scope_of(memo, (b"origin", b"https://a.example")))


def test_head_memo_without_extension_is_not_used():
    guard = Guard(read(""))
    scope = scope_of(None)
    guard.admit(scope, INFERENCE)
    assert not guard.remembers(scope)


def test_head_memo_is_rebuilt_under_other_settings():
    settings = make_config(1).settings
    memo: dict[Any, Any] = {}
    first = ClientHead.of(scope_of(memo), "192.0.2.1", settings, ())
    assert ClientHead.of(scope_of(memo), "192.0.2.1", settings, ()) is first
    settings = make_config(1).settings
    assert ClientHead.of(scope_of(memo), "192.0.2.1", settings, ()) is not first


def test_head_memo_check_uses_length_of_each_request():
    head = ClientHead(scope_of(None), "192.0.2.1", make_config(1).settings, ())
    bodies = Bodies()
    bodies.limit = 1000
    head.check_length([(b"host", b"r"), (b"content-length", b"99")], 99, BodyShare(bodies))
    with pytest.raises(Refused, match="larger than 98 bytes"):
        head.check_length([(b"host", b"r"), (b"content-length", b"99")], 98, BodyShare(bodies))


class Talk:
    """A client that sends one head again and again on one connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=10)

    def ask(self, body: bytes) -> bytes:
        """The answer's head."""
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: r\r\nx-mine: 1\r\n"
            b"authorization: Bearer sk-client-1\r\ncontent-type: application/json\r\n"
        )
        self._socket.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        answer = b""
        while b"\r\n\r\n" not in answer:
            data = self._socket.recv(65536)
            assert data, answer
            answer += data
        head, _, rest = answer.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(rest) < length:
            rest += self._socket.recv(65536)
        assert len(rest) == length
        return head

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def mock():
    with mock_processes(1, "--model", "m") as (mock,):
        yield mock


def seen(mock: MockProcess) -> dict[str, str]:
    return {name.lower(): value for name, value in mock.last()["headers"]}


def reload(router: RouterProcess, text: str, times: int) -> None:
    router.config.write_text(text)
    line = "configuration applied"
    until(lambda: router.text.count(line) == times, "the reload")


def test_head_memo_follows_reload_on_open_connection(tmp_path: Path, mock: MockProcess):
    plain = servers_toml([mock.url])
    with router_process(plain, tmp_path) as router:
        talk = Talk(router.port)
        for size in (1, 3):
            body = b'{"model":"m","messages":[{"role":"user","content":"%s"}]}' % (b"a" * size)
            assert talk.ask(body).startswith(b"HTTP/1.1 200")
            assert seen(mock)["authorization"] == f"Bearer {KEY}"
            assert seen(mock)["content-length"] == str(len(body))
        ids = {dict(entry["headers"])["x-request-id"] for entry in mock.log(PATH)}
        assert len(ids) == 2
        # From now on the key is the router's own.
        reload(router, plain + KEYS, 1)
        for _ in range(2):
            assert talk.ask(body).startswith(b"HTTP/1.1 200")
            assert "authorization" not in seen(mock)
            assert seen(mock)["x-mine"] == "1"
        # And then a request of another client.
        reload(router, plain + KEYS.replace(KEY, "sk-other"), 2)
        assert talk.ask(body).startswith(b"HTTP/1.1 401")
        assert len(mock.log(PATH)) == 4
        talk.close()
