"""The SDKs of OpenAI and Anthropic raise the right classes for the router's errors, on both fronts.

Also path rules of the real fronts: trailing slashes, and vLLM's paths outside `/v1`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.lazy_import import LazyImport
from support.router_process import FAST, RouterProcess, router_process

anthropic = LazyImport("anthropic")
openai = LazyImport("openai")

CHAT = "/v1/chat/completions"
GAUGES = 'vllm:num_requests_running{engine="0"} 0\nvllm:num_requests_waiting{engine="0"} 0\n'
KEYS = ("sk-all", "sk-other", "sk-slow-openai", "sk-slow-anthropic")


def chat_answer() -> dict[str, Any]:
    message = {"role": "assistant", "content": "hi"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


def message_answer() -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": "hi"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }


def events(path: str) -> bytes:
    """The first events of a stream, up to its first token."""
    if path.startswith("/v1/messages"):
        start = {**message_answer(), "content": [], "stop_reason": None}
        block = {"type": "text", "text": ""}
        values: list[dict[str, Any]] = [
            {"type": "message_start", "message": start},
            {"type": "content_block_start", "index": 0, "content_block": block},
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": "hi"},
            },
        ]
        return b"".join(
            f"event: {value['type']}\ndata: {json.dumps(value)}\n\n".encode() for value in values
        )
    choice = {"index": 0, "delta": {"content": "hi"}, "finish_reason": None}
    value = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return f"data: {json.dumps(value | {'choices': [choice]})}\n\n".encode()


class Upstream(ThreadingHTTPServer):
    """One server. A request with `hang` never ends, one with `stream` crashes it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        """Method, target and fields of every request except probes."""
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        card = {"id": "m", "object": "model", "max_model_len": 4096}
        pages = {
            "/health": b"",
            "/metrics": GAUGES.encode(),
            "/v1/models": json.dumps({"object": "list", "data": [card]}).encode(),
        }
        if self.path in pages:
            self._answer(pages[self.path])
        elif self.path.startswith("/v1/responses/"):
            self._answer(b'{"error":{"message":"Response not found."}}', 404)
        else:
            self._note()
            self._answer(b'{"tokenizer_class":"T"}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._note()
        if "hang" in json.dumps(body):
            self.server.ended.wait()
            self.close_connection = True
        elif body.get("stream"):
            data = events(self.path)
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.close_connection = True
        else:
            value = message_answer() if "/messages" in self.path else chat_answer()
            self._answer(json.dumps(value).encode())

    def _note(self) -> None:
        fields = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((self.command, self.path, fields))

    def _answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("x-vllm-router-error", "fake")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    server = Upstream()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module", params=["lane", "hypercorn"])
def router(
    request: pytest.FixtureRequest, upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RouterProcess]:
    # Long enough for every request but `hang`: the server is a thread of the tests' busy process.
    settings = {**FAST, "first_byte_timeout": 4, "max_body_mb": 0.02}
    config = f"""
[servers]
servers = [
    {{ url = "{upstream.url}", max_concurrent_requests = 8 }},
    {{ url = "http://127.0.0.1:9", name = "gone", models = ["gone"] }},
]
[config]
{"".join(f"{key} = {json.dumps(value)}{chr(10)}" for key, value in settings.items())}
[auth]
keys = [
    {{ name = "all", key = "sk-all" }},
    {{ name = "other", key = "sk-other", models = ["other"] }},
    {{ name = "slow-openai", key = "sk-slow-openai", requests_per_minute = 1 }},
    {{ name = "slow-anthropic", key = "sk-slow-anthropic", requests_per_minute = 1 }},
]
"""
    directory: Path = tmp_path_factory.mktemp("router")
    with router_process(config, directory, "--front", request.param) as started:
        yield started


# -- OpenAI ------------------------------------------------------------------------------------


def openai_chat(router: RouterProcess, key: str = "sk-all", **more: Any) -> Any:
    text = more.pop("text", "hello")
    request = {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    with openai.OpenAI(base_url=router.url + "/v1", api_key=key, max_retries=0) as client:
        answer = client.chat.completions.create(**request)
        return list(answer) if more.get("stream") else answer


OPENAI = {
    "400": ({"extra_body": {"kv_transfer_params": {"remote_host": "x"}}}, "BadRequestError"),
    "401": ({"key": "sk-wrong"}, "AuthenticationError"),
    "403": ({"key": "sk-other"}, "PermissionDeniedError"),
    "404": ({"model": "none"}, "NotFoundError"),
    "413": ({"text": "x" * 30_000}, "APIStatusError"),
    "429": ({"key": "sk-slow-openai"}, "RateLimitError"),
    "503": ({"model": "gone"}, "InternalServerError"),
    "504": ({"text": "hang"}, "InternalServerError"),
}


@pytest.mark.parametrize("status", OPENAI)
def test_openai_sdk_raises_class_of_status(router: RouterProcess, status: str):
    request, name = OPENAI[status]
    if status == "429":
        openai_chat(router, **request)
    with pytest.raises(getattr(openai, name)) as caught:
        openai_chat(router, **request)
    error = caught.value
    assert error.status_code == int(status)
    assert error.code == error.response.headers["x-vllm-router-error"]
    assert error.request_id == error.response.headers["x-request-id"]
    assert error.type
    assert str(error.body["message"]) in str(error)


def test_openai_sdk_raises_status_error_for_wrong_method(router: RouterProcess):
    with openai.OpenAI(base_url=router.url + "/v1", api_key="sk-all", max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            client.get("/chat/completions", cast_to=object)
        assert caught.value.status_code == 405
        assert caught.value.response.headers["allow"] == "POST"
        with pytest.raises(openai.NotFoundError):
            client.files.list()
        # One server of the fleet is gone, and may have had it.
        with pytest.raises(openai.InternalServerError) as caught:
            client.responses.retrieve("resp_1")
        assert caught.value.status_code == 503
        assert caught.value.code == "response_unavailable"


def test_openai_sdk_raises_for_broken_stream(router: RouterProcess):
    with pytest.raises(openai.APIError) as caught:
        openai_chat(router, stream=True)
    assert not isinstance(caught.value, openai.APIConnectionError)
    assert caught.value.code


# -- Anthropic ---------------------------------------------------------------------------------


def anthropic_client(router: RouterProcess, key: str) -> Any:
    return anthropic.Anthropic(base_url=router.url, api_key=key, auth_token=None, max_retries=0)


def anthropic_chat(router: RouterProcess, key: str = "sk-all", **more: Any) -> Any:
    text = more.pop("text", "hello")
    message: Any = {"role": "user", "content": text}
    request = {"model": "m", "max_tokens": 5, "messages": [message], **more}
    with anthropic_client(router, key) as client:
        answer = client.messages.create(**request)
        return list(answer) if more.get("stream") else answer


ANTHROPIC = {
    "400": (
        {"extra_body": {"kv_transfer_params": {"remote_host": "x"}}},
        "BadRequestError",
        "invalid_request_error",
    ),
    "401": ({"key": "sk-wrong"}, "AuthenticationError", "authentication_error"),
    "403": ({"key": "sk-other"}, "PermissionDeniedError", "permission_error"),
    "404": ({"model": "none"}, "NotFoundError", "not_found_error"),
    "413": ({"text": "x" * 30_000}, "APIStatusError", "request_too_large"),
    "429": ({"key": "sk-slow-anthropic"}, "RateLimitError", "rate_limit_error"),
    "503": ({"model": "gone"}, "InternalServerError", "overloaded_error"),
    "504": ({"text": "hang"}, "InternalServerError", "timeout_error"),
}


@pytest.mark.parametrize("status", ANTHROPIC)
def test_anthropic_sdk_raises_class_of_status(router: RouterProcess, status: str):
    request, name, error_type = ANTHROPIC[status]
    if status == "429":
        anthropic_chat(router, **request)
    with pytest.raises(getattr(anthropic, name)) as caught:
        anthropic_chat(router, **request)
    error = caught.value
    assert type(error) is not anthropic.APIStatusError  # each status has a class of its own
    assert error.status_code == int(status)
    assert error.request_id == error.response.headers["request-id"]
    body: Any = error.body
    assert body["type"] == "error"
    assert body["error"]["type"] == error_type
    assert body["request_id"] == error.request_id


def test_anthropic_sdk_raises_status_error_for_wrong_method(router: RouterProcess):
    with anthropic_client(router, "sk-all") as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            client.get("/v1/messages", cast_to=object)
        assert caught.value.status_code == 405
        assert caught.value.request_id
        with pytest.raises(anthropic.NotFoundError) as missing:
            client.messages.batches.list()
        assert missing.value.request_id


def test_anthropic_sdk_raises_for_broken_stream(router: RouterProcess):
    with pytest.raises(anthropic.APIError) as caught:
        anthropic_chat(router, stream=True)
    assert not isinstance(caught.value, anthropic.APIConnectionError)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "api_error"


# -- paths -------------------------------------------------------------------------------------


def ask(router: RouterProcess, method: str, target: str, **more: Any) -> httpx.Response:
    headers = {"authorization": "Bearer sk-all", **more.pop("headers", {})}
    with router.client() as client:
        return client.request(method, target, headers=headers, **more)


@pytest.mark.parametrize("slashes", ["", "/", "//"])
@pytest.mark.parametrize(
    "path", [CHAT, "/v1/messages", "/invocations", "/inference/v1/generate", "/v1/new"]
)
def test_path_reaches_server_with_query_and_without_trailing_slash(
    router: RouterProcess, upstream: Upstream, path: str, slashes: str
):
    answer = ask(router, "POST", f"{path}{slashes}?beta=true&x=%2F", json={"model": "m"})
    assert answer.status_code == 200
    assert upstream.seen[-1][:2] == ("POST", f"{path}?beta=true&x=%2F")


def test_path_with_trailing_slash_keeps_connection(router: RouterProcess):
    with router.client() as client:
        for path in (CHAT, CHAT + "/", CHAT):
            answer = client.post(
                path, json={"model": "m"}, headers={"authorization": "Bearer sk-all"}
            )
            assert answer.status_code == 200


def test_tokenizer_info_is_read_from_server(router: RouterProcess, upstream: Upstream):
    for path in ("/tokenizer_info", "/tokenizer_info/"):
        answer = ask(router, "GET", path)
        assert (answer.status_code, answer.json()) == (200, {"tokenizer_class": "T"})
        assert answer.headers["x-vllm-router-server"]
        assert upstream.seen[-1][:2] == ("GET", "/tokenizer_info")
    assert ask(router, "HEAD", "/tokenizer_info").status_code == 405


def test_headers_of_router_and_client_stay_on_their_side(router: RouterProcess, upstream: Upstream):
    secrets = {"x-api-key": "sk-all", "api-key": "sk-all", "cookie": "k=sk-all"}
    answer = ask(router, "POST", f"{CHAT}?key=sk-all&a=1", json={"model": "m"}, headers=secrets)
    assert answer.status_code == 200
    assert "x-vllm-router-error" not in answer.headers
    _, target, fields = upstream.seen[-1]
    assert target == f"{CHAT}?a=1"
    assert "sk-all" not in json.dumps(fields)
