"""The router's own errors: their dialect, status and text, wherever they are made."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from support.front_harness import CHAT, Limits, connected, running
from support.proxy_harness import lab
from support.scripted_server import answering, ok
from support.web_harness import Lab, Reply
from vllm_router.http.error_format import anthropic_type, path_of
from vllm_router.http.http_error import HttpError
from vllm_router.http.server.listener import Listener
from vllm_router.routing.paths import is_inference
from vllm_router.runtime.dispatch import RequestDispatcher

MESSAGES = ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/batches", "/v1/messages/")


def anthropic_error(status: int, headers: dict[str, str], body: bytes) -> dict[str, Any]:
    """The error object of one of the router's own responses to Anthropic's clients."""
    value = json.loads(body)
    assert value.keys() == {"type", "error", "request_id"}
    assert value["type"] == "error"
    assert value["error"].keys() == {"type", "message"}
    assert value["error"]["type"] == anthropic_type(status)
    assert value["request_id"] == headers["request-id"] == headers["x-request-id"]
    assert headers["x-vllm-router-error"]
    return value["error"]


class Whole:
    """The whole application with a supervisor that does not run. Needs a Trio loop."""

    def __init__(self, **settings: Any) -> None:
        self.lab = Lab(1, **settings)
        self._app = RequestDispatcher()
        self._app.attach(self.lab.router, self.lab.app)

    async def ask(self, method: str, target: str, **more: Any) -> Reply:
        return await self.lab.request(method, target, app=self._app, **more)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (408, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (431, "invalid_request_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
        (508, "api_error"),
    ],
)
def test_anthropic_type_of_status_is_documented_type(status, kind):
    assert anthropic_type(status) == kind


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (b"POST /v1/messages?beta=true HTTP/1.1", b"/v1/messages"),
        (b"POST /v1/messages", b"/v1/messages"),
        (b"POST http://h:1/v1/messages?a HTTP/1.1", b"/v1/messages"),
        (b"POST http://h HTTP/1.1", b""),
        (b"POST", b""),
        (b"", b""),
        (b"\x16\x03 /x", b"/x"),
    ],
)
def test_path_of_request_line_is_found_in_partial_line(line, path):
    assert path_of(line) == path


# -- errors of the proxy ----------------------------------------------------------------------


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("path", MESSAGES[:3])
async def test_dialect_of_refused_message_is_anthropics(path, watched, autojump_clock):
    async with lab(answering(ok(b"{}")), watched=watched) as rig:
        got = await rig.post({"model": "none"}, path=path)
        headers = {name.decode(): value.decode() for name, value in got.headers}
        error = anthropic_error(got.status, headers, got.body)
        assert got.status == 404
        assert "'none' does not exist" in error["message"]


async def test_dialect_of_refused_message_repeats_client_request_id(autojump_clock):
    async with lab(answering(ok(b"{}"))) as rig:
        headers = ((b"x-request-id", b"mine-1"), (b"content-type", b"application/json"))
        got = await rig.post({"model": "none"}, path="/v1/messages", headers=headers)
        assert got.json["request_id"] == "mine-1"
        assert got[b"request-id"] == b"mine-1"


async def test_dialect_of_path_with_same_beginning_is_openais(autojump_clock):
    async with lab(answering(ok(b"{}"))) as rig:
        got = await rig.post({"model": "none"}, path="/v1/messages-new")
        assert got.code == "model_not_found"
        assert got[b"request-id"] is None


# -- errors made before the proxy, and by the control plane -----------------------------------

AUTH = '[auth]\nkeys = [{ name = "a", key = "sk-a" }]\n'


@pytest.mark.parametrize("path", MESSAGES)
async def test_dialect_of_wrong_method_at_messages_path_is_anthropics(path):
    reply = await Whole().ask("GET", path)
    assert reply.status == (404 if "batches" in path else 405)
    anthropic_error(reply.status, reply.headers, reply.body)


@pytest.mark.parametrize("path", MESSAGES)
async def test_dialect_of_forbidden_origin_follows_path(path):
    reply = await Whole().ask("POST", path, headers={"origin": "https://evil.example"})
    assert reply.status == 403
    anthropic_error(reply.status, reply.headers, reply.body)


async def test_dialect_of_missing_key_follows_path(tmp_path):
    file = tmp_path / "servers.toml"
    file.write_text('[servers]\nservers = [{ url = "http://a.test:1", name = "a" }]\n' + AUTH)
    whole = Whole(file=file)
    reply = await whole.ask("POST", "/v1/messages")
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    anthropic_error(reply.status, reply.headers, reply.body)
    assert (await whole.ask("POST", CHAT)).error["code"] == "missing_api_key"


# -- errors of the front: heads that are no requests ------------------------------------------


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
@pytest.mark.parametrize(
    "field",
    [
        "Content-Length: x",
        "Content-Length: 1\r\nContent-Length: 2",
        "Transfer-Encoding: gzip",
        "Expect: nothing",
        "X-Big: " + "x" * 5000,
    ],
)
async def test_dialect_of_refused_head_follows_path(kind, field):
    limits = Limits(max_head_bytes=4096, linger=0.3, max_linger=2.0)
    async with running(kind, limits=limits) as it:
        for path in ("/v1/messages?beta=true", CHAT):
            async with connected(it.port) as client:
                await client.send(f"POST {path} HTTP/1.1\r\nHost: h\r\n{field}\r\n\r\n".encode())
                reply = await client.reply()
            assert reply.status >= 400
            assert reply.headers["x-request-id"]
            if path == CHAT:
                assert reply.code == reply.headers["x-vllm-router-error"]
            else:
                anthropic_error(reply.status, reply.headers, reply.body)


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
async def test_dialect_of_body_timeout_follows_path(kind):
    limits = Limits(body_read_timeout=0.2, linger=0.3, max_linger=2.0)
    async with running(kind, limits=limits) as it, connected(it.port) as client:
        head = b"POST /v1/messages HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n"
        await client.send(head + b"X-Request-Id: mine-1\r\n\r\n")
        reply = await client.reply()
        assert reply.status == 408
        anthropic_error(reply.status, reply.headers, reply.body)


# -- paths and methods ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", [CHAT, "/tokenize", "/invocations", "/v1/responses/resp_1/cancel"])
async def test_inference_path_wrong_method_is_405_with_allow(path, method):
    reply = await Whole().ask(method, path)
    assert reply.status == 405
    assert reply.headers["allow"] == "POST"
    assert reply.error["code"] == "method_not_allowed"
    assert reply.error["message"] == f"{method} is not allowed at {path}. Allowed: POST."


async def test_tokenizer_path_wrong_method_is_405_with_allow():
    reply = await Whole().ask("POST", "/tokenizer_info")
    assert (reply.status, reply.headers["allow"]) == (405, "GET")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files",
        "/v1/batches",
        "/v1/vector_stores",
        "/v1/fine_tuning/jobs",
        "/v1/nowhere",
        "/v1/anything/else",
        "/nowhere",
        "/docs",
        "/v1",
    ],
)
@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
async def test_path_without_methods_is_404(path, method):
    reply = await Whole().ask(method, path)
    assert reply.status == 404
    assert "allow" not in reply.headers
    assert reply.error["message"].startswith(f"There is nothing at {path}.")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/healthz", " Did you mean /livez, /readyz or /health?"),
        ("/docs", " Did you mean /openapi.json?"),
        ("/metric", " Did you mean /metrics?"),
        ("/loadstats", " Did you mean /load-stats?"),
        ("/nowhere", ""),
        ("/v1/files", ""),
        ("/metrics" + "s" * 100_000, ""),
    ],
)
async def test_unknown_path_names_similar_one(path, hint):
    reply = await Whole().ask("GET", path)
    assert (reply.status, reply.error["message"]) == (404, f"There is nothing at {path}.{hint}")


async def test_stored_response_wrong_method_lists_allowed_methods():
    reply = await Whole().ask("PUT", "/v1/responses/resp_1")
    assert (reply.status, reply.headers["allow"]) == (405, "DELETE, GET")


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/health", "GET, HEAD, OPTIONS"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/models/m", "GET, HEAD, OPTIONS"),
        ("/load", "GET, HEAD, OPTIONS"),
        ("/admin/reload", "OPTIONS, POST"),
    ],
)
async def test_router_path_wrong_method_lists_allowed_methods(path, methods):
    for method in ("DELETE", "PUT") if "POST" in methods else ("DELETE", "POST"):
        reply = await Whole().ask(method, path)
        assert (reply.status, reply.headers["allow"]) == (405, methods)


async def test_feed_path_plain_request_says_websocket_needed():
    reply = await Whole().ask("GET", "/ws/load")
    assert reply.status == 400
    assert reply.error["message"] == "/ws/load is a websocket: the request must be an upgrade."


@pytest.mark.parametrize("path", ["/v1/realtime", "/nowhere", CHAT, "/tokenizer_info", "/health"])
async def test_websocket_at_other_path_is_404_naming_feed(path):
    whole = Whole()
    sent: list[Any] = []
    events = [{"type": "websocket.connect"}]

    async def receive() -> Any:
        return events.pop() if events else await trio.sleep_forever()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "websocket",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"h")],
        "client": ("192.0.2.1", 1),
        "server": ("127.0.0.1", 8888),
        "subprotocols": [],
        "extensions": {"websocket.http.response": {}},
    }
    await whole._app(scope, receive, send)
    assert sent[0]["type"] == "websocket.http.response.start"
    assert sent[0]["status"] == 404
    message = json.loads(b"".join(part.get("body", b"") for part in sent[1:]))["error"]["message"]
    assert message.startswith(f"There is no websocket at {path}: the router has one at /ws/load")


# -- trailing slashes -------------------------------------------------------------------------


@pytest.mark.parametrize("slashes", ["/", "//"])
async def test_path_with_trailing_slash_is_served_without_redirect(slashes):
    whole = Whole()
    for path in ("/health", "/v1/models", "/v1/models/m", "/load"):
        reply = await whole.ask("GET", path + slashes)
        assert reply.status == 200, path
        assert "location" not in reply.headers
    assert (await whole.ask("GET", CHAT + slashes)).headers["allow"] == "POST"
    assert (await whole.ask("POST", "/sleep" + slashes)).error["code"] == "engine_control_closed"


async def test_path_with_encoded_slash_in_name_is_kept():
    reply = await Whole().ask("GET", "/v1/models/a%2F/")
    assert reply.error["message"].startswith("The model 'a/' does not exist.")


async def test_load_path_reports_whole_fleet():
    whole = Whole()
    lease = whole.lab["a"].lease(trio.current_time())
    assert (await whole.ask("GET", "/load")).json == {"server_load": 1}
    lease.release()
    assert (await whole.ask("GET", "/load")).json == {"server_load": 0}


# -- addresses of clients ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
async def test_client_address_ipv4_mapped_is_shown_as_ipv4(kind):
    seen: list[Any] = []

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        seen.append(scope["client"][0])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    limits = Limits(linger=0.3, max_linger=2.0)
    server = Listener(app, accepts=is_inference, lane=kind == "lane", limits=limits)
    try:
        (_, port), *_ = server.open("::", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        async with connected(port) as client:
            await client.send(b"POST /v1/messages HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
            assert (await client.reply()).status == 200
        server.abort()
    assert seen == ["127.0.0.1"]


# -- the access log ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lane", "hypercorn"])
async def test_request_id_of_refused_client_is_logged(kind):
    rejected: list[HttpError] = []

    def note(refusal: HttpError, _client: Any, _line: bytes) -> None:
        rejected.append(refusal)

    async with running(kind, on_rejected=note) as it, connected(it.port) as client:
        await client.send(b"POST /v1/messages HTTP/1.1\r\nHost: h\r\nContent-Length: x\r\n\r\n")
        reply = await client.reply()
        assert [(refusal.request_id or b"").decode() for refusal in rejected] == [
            reply.headers["request-id"]
        ]
