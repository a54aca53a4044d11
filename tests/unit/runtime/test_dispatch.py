"""Dispatch of requests by path, and refusals before any part of the router sees the request."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.web_harness import Lab, Reply
from vllm_router.http.asgi_types import HEAD_MEMO, IDENTITY, OUTLET
from vllm_router.runtime.dispatch import RequestDispatcher

ORIGIN = "https://chat.example"
CHAT = "/v1/chat/completions"


class Parts:
    """A dispatcher before a supervisor that does not run; records which part got which scope."""

    def __init__(self, **settings: Any) -> None:
        self.lab = Lab(1, **settings)
        self.proxied: list[dict[str, Any]] = []
        self.controlled: list[dict[str, Any]] = []
        self.app = RequestDispatcher()
        self.app.attach(self.lab.router, self._control)
        self.lab.router.proxy = _Proxy(self.lab.router.proxy.context, self.proxied)  # type: ignore[assignment]

    async def _control(self, scope: Any, receive: Any, send: Any) -> None:
        self.controlled.append(scope)
        await _answer(send)

    async def ask(self, method: str, target: str, **more: Any) -> Reply:
        return await self.lab.request(method, target, app=self.app, **more)


class _Proxy:
    def __init__(self, context: Any, seen: list[dict[str, Any]]) -> None:
        self.context, self._seen = context, seen

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._seen.append(scope)
        await _answer(send)


async def _answer(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def test_dispatch_without_supervisor_is_an_error():
    with pytest.raises(RuntimeError, match="must speak the lifespan protocol"):
        await RequestDispatcher()({}, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "target", "part", "path"),
    [
        ("POST", CHAT, "proxied", CHAT),
        ("POST", f"{CHAT}/", "proxied", CHAT),
        ("POST", f"http://router.test{CHAT}", "proxied", CHAT),
        ("GET", CHAT, "controlled", CHAT),
        ("GET", "/health//", "controlled", "/health"),
        ("GET", "/", "controlled", "/"),
        ("GET", "HTTPS://router.test", "controlled", "/"),
    ],
)
async def test_dispatch_goes_by_normalized_path(method, target, part, path):
    parts = Parts()
    assert (await parts.ask(method, target)).status == 200
    (scope,) = getattr(parts, part)
    assert (scope["path"], scope["raw_path"]) == (path, path.encode())
    assert len(parts.proxied) + len(parts.controlled) == 1


async def ask_with(parts: Parts, extensions: dict[str, Any], target: str, **headers: str) -> None:
    """One request of a server with these extensions."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"] = extensions
        await parts.app(scope, receive, send)

    assert (await parts.lab.request("POST", target, app=app, headers=headers)).status == 200


async def test_dispatch_remembers_heads_of_normal_paths_alone():
    parts, memo = Parts(), {}
    await ask_with(parts, {HEAD_MEMO: memo}, f"{CHAT}/")
    assert memo == {}
    await ask_with(parts, {HEAD_MEMO: memo}, CHAT)
    assert memo
    await ask_with(parts, {HEAD_MEMO: memo}, CHAT)
    assert len(parts.proxied) == 3
    assert IDENTITY in parts.proxied[-1]


async def test_dispatch_response_for_page_of_other_origin_passes_no_outlet():
    """The outlet would bypass the headers that let the page read the response."""
    parts = Parts(cors_origins=[ORIGIN])
    extensions = {OUTLET: object()}
    await ask_with(parts, extensions, CHAT)
    await ask_with(parts, extensions, CHAT, origin=ORIGIN)
    assert [OUTLET in scope["extensions"] for scope in parts.proxied] == [True, False]
    assert OUTLET in extensions  # the server's own dictionary is left alone


async def test_dispatch_preflight_is_answered_before_any_part():
    parts = Parts(cors_origins=[ORIGIN])
    headers = {"origin": ORIGIN, "access-control-request-method": "POST"}
    reply = await parts.ask("OPTIONS", CHAT, headers=headers)
    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == ORIGIN
    assert parts.proxied + parts.controlled == []


async def test_dispatch_engine_control_is_closed_unless_allowed():
    parts = Parts()
    refused = await parts.ask("POST", "/sleep")
    assert (refused.status, refused.error["code"]) == (403, "engine_control_closed")
    assert parts.lab.router.metrics.refused_by_code() == {"engine_control_closed": 1}
    allowing = Parts(allow_engine_control=True)
    assert (await allowing.ask("POST", "/sleep")).status == 200
    assert len(allowing.controlled) == 1


async def websocket(parts: Parts, extensions: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages to a handshake from a page of another site."""
    scope = {
        "type": "websocket",
        "path": "/ws/load",
        "raw_path": b"/ws/load",
        "query_string": b"",
        "headers": [(b"host", b"router.test"), (b"origin", b"https://evil.example")],
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 8888),
        "extensions": extensions,
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await parts.app(scope, receive, send)
    return sent


async def test_dispatch_refused_websocket_gets_error_response():
    start, body = await websocket(Parts(), {"websocket.http.response": {}})
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 403)
    assert body["type"] == "websocket.http.response.body"
    assert json.loads(body["body"])["error"]["code"] == "cross_origin"


async def test_dispatch_refused_websocket_is_closed_by_servers_without_responses():
    assert await websocket(Parts(), {}) == [{"type": "websocket.close", "code": 1008}]
