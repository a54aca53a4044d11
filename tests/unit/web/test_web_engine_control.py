"""Engine control paths go to every server, or to one; responses are returned by server."""

from __future__ import annotations

import contextlib
import json
from contextlib import asynccontextmanager

import pytest
import trio

from support.fleet_makers import come_up
from support.scripted_server import ScriptedServer, silent
from support.web_harness import Lab
from vllm_router.fleet.state import State
from vllm_router.proxy.identity import ANONYMOUS


class Engine:
    """Answers every request on a loopback port, and records it."""

    def __init__(self, status: int, body: bytes) -> None:
        self._answer = (
            b"HTTP/1.1 %d Whatever\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
            % (status, len(body), body)
        )
        self.requests: list[bytes] = []

    async def handle(self, stream: trio.SocketStream) -> None:
        received = b""
        async with stream:
            while not _complete(received):
                received += await stream.receive_some()
            self.requests.append(received)
            with contextlib.suppress(trio.BrokenResourceError):  # the client may close early
                await stream.send_all(self._answer)


def _complete(request: bytes) -> bool:
    head, end, body = request.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return bool(end) and len(body) >= int(line[15:])
    return bool(end)


@asynccontextmanager
async def engines(*running: Engine, **settings):
    """A lab with a server for each engine, and one unreachable server at the end."""
    async with trio.open_nursery() as nursery:
        servers = []
        for name, engine in zip("ab", running, strict=False):
            listeners = await nursery.start(_serve, engine)
            port = listeners[0].socket.getsockname()[1]
            servers.append({"url": f"http://127.0.0.1:{port}", "name": name, "api_key": "k"})
        yield Lab(servers, **{"allow_engine_control": True, **settings})
        nursery.cancel_scope.cancel()


async def _serve(engine, task_status):
    await trio.serve_tcp(engine.handle, 0, host="127.0.0.1", task_status=task_status)


async def test_engine_control_asks_every_server_and_reports_all():
    one, other = Engine(200, b'{"is_sleeping": true}'), Engine(200, b"")
    async with engines(one, other) as lab:
        reply = await lab.post("/sleep?level=1&tag=a%26b", b'{"x": 1}')
    assert reply.status == 200
    assert reply.json == {
        "results": {
            "a": {"ok": True, "status": 200, "body": {"is_sleeping": True}},
            "b": {"ok": True, "status": 200, "body": None},
        }
    }
    for engine in (one, other):
        (request,) = engine.requests
        assert request.startswith(b"POST /sleep?level=1&tag=a%26b HTTP/1.1\r\n")
        assert b"authorization: bearer k" in request.lower()
        assert request.endswith(b'{"x": 1}')


async def test_engine_control_passes_on_fields_beyond_ascii():
    engine = Engine(200, b"")
    async with engines(engine) as lab:
        reply = await lab.post("/sleep", headers={"accept": "text/é", "content-type": "a/é"})
    assert reply.status == 200
    assert "\r\naccept: text/é\r\n" in engine.requests[0].decode().lower()
    assert "\r\ncontent-type: a/é\r\n" in engine.requests[0].decode().lower()


async def test_engine_control_one_failure_is_502_with_all_answers():
    async with engines(Engine(200, b"fine"), Engine(500, b"broken")) as lab:
        reply = await lab.get("/is_sleeping")
    assert reply.status == 502
    assert reply.json["results"] == {
        "a": {"ok": True, "status": 200, "body": "fine"},
        "b": {"ok": False, "status": 500, "body": "broken"},
    }


async def test_engine_control_unreachable_server_is_reported():
    async with engines(Engine(200, b"")) as lab:
        lab.apply([*_configs(lab), {"url": "http://127.0.0.1:1", "name": "gone"}])
        reply = await lab.post("/wake_up")
    assert reply.status == 502
    assert reply.json["results"]["a"]["ok"] is True
    assert reply.json["results"]["gone"]["ok"] is False
    assert reply.json["results"]["gone"]["error"]


def _configs(lab):
    return [
        {"url": server.url, "name": server.name} for server in lab.router.fleet.servers.values()
    ]


async def test_engine_control_can_address_one_server():
    one, other = Engine(200, b""), Engine(200, b"")
    async with engines(one, other) as lab:
        reply = await lab.post("/v1/load_lora_adapter?server=b", json.dumps({"l": 1}).encode())
        unknown = await lab.post("/sleep?server=nope")
    assert list(reply.json["results"]) == ["b"]
    assert other.requests[0].startswith(b"POST /v1/load_lora_adapter HTTP/1.1\r\n")
    assert not one.requests
    assert (unknown.status, unknown.error["code"]) == (404, "server_not_found")


async def test_engine_control_needs_admin_rights():
    engine = Engine(200, b"")
    async with engines(engine) as lab:
        reply = await lab.post("/sleep", identity=ANONYMOUS)
        assert (reply.status, reply.error["code"]) == (403, "admin_local_only")
    assert not engine.requests


async def test_engine_control_is_closed_unless_configured():
    engine = Engine(200, b"")
    async with engines(engine, allow_engine_control=False) as lab:
        reply = await lab.post("/sleep")
    assert (reply.status, reply.error["code"]) == (403, "engine_control_closed")
    assert not engine.requests


async def test_engine_control_pause_is_a_state_until_resume():
    one, other = Engine(200, b'{"status":"paused"}'), Engine(500, b"")
    async with engines(one, other) as lab:
        for server in lab.router.fleet.servers.values():
            come_up(server, trio.current_time())
        await lab.post("/pause")
        states = {name: one.state for name, one in lab.router.fleet.servers.items()}
        assert states == {"a": State.PAUSED, "b": State.UP}
        assert [one.name for one in lab.router.fleet.candidates("m", trio.current_time())] == ["b"]
        await lab.post("/resume")
        assert lab.router.fleet.servers["a"].state is State.UP


async def test_engine_control_is_paused_response_sets_state():
    engine = Engine(200, b'{"is_paused": true}')
    async with engines(engine) as lab:
        come_up(lab.router.fleet.servers["a"], trio.current_time())
        await lab.get("/is_paused")
        assert lab.router.fleet.servers["a"].state is State.PAUSED


HOSTILE = {
    "half a character": (b'{"a": "\\ud800"}', str),
    "no UTF-8": (b'{"a": "\xff"}', str),
    "NaN": (b"NaN", str),
    "nested": (b"[" * 900 + b"]" * 900, str),
    "nested far too deeply": (b"[" * 100_000, str),
    "many values": (b"[" + b"0," * 200_000 + b"0]", str),
    "a large number": (b"1" + b"0" * 5000, str),
    "good": (b'{"a": [1, "\xc3\xa9"]}', dict),
}


@pytest.mark.parametrize(("body", "kind"), HOSTILE.values(), ids=HOSTILE)
async def test_engine_control_odd_response_is_passed_as_text(body, kind):
    async with engines(Engine(200, body)) as lab:
        reply = await lab.get("/is_sleeping")
    assert reply.status == 200
    assert isinstance(reply.json["results"]["a"]["body"], kind)


async def test_engine_control_overlong_response_is_reported_not_kept():
    async with engines(Engine(200, bytes(3_000_000)), Engine(200, b"1")) as lab:
        reply = await lab.get("/is_sleeping")
    assert reply.status == 502
    assert "longer than 1048576 bytes" in reply.json["results"]["a"]["error"]
    assert reply.json["results"]["b"]["ok"] is True


async def test_engine_control_silent_server_is_reported(autojump_clock):
    async with trio.open_nursery() as nursery:
        scripted = ScriptedServer(nursery, silent)
        port = await nursery.start(scripted.listen)
        lab = Lab(
            [{"url": f"http://127.0.0.1:{port}", "name": "a"}],
            allow_engine_control=True,
            request_timeout=7,
        )
        reply = await lab.post("/wake_up")
        nursery.cancel_scope.cancel()
    assert reply.json["results"]["a"] == {"ok": False, "error": "no answer in 7 s"}
