"""An unmodified OpenAI client, and others, through the whole router."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.lazy_import import LazyImport
from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml, until

openai = LazyImport("openai")

DATA = Path(__file__).parents[1] / "data" / "vllm"


@pytest.fixture(scope="module")
def mocks() -> Iterator[list[MockProcess]]:
    with mock_processes(3, "--model", "m", "--token-delay", "0.002", "--ttft", "0.002") as started:
        yield started


@pytest.fixture(scope="module", params=["lane", "hypercorn"])
def router(request, mocks, tmp_path_factory) -> Iterator[RouterProcess]:
    config = servers_toml(mock.url for mock in mocks)
    directory = tmp_path_factory.mktemp("router")
    with router_process(config, directory, "--front", request.param) as started:
        yield started


_VARYING = re.compile(
    rb'"id":"[^"]*"|"created(?:_at)?":[0-9]+|"system_fingerprint":"[^"]*"|chatcmpl-[\w-]+|cmpl-[\w-]+|resp_[\w-]+|msg_[\w-]+'
)


def masked(data: bytes) -> bytes:
    """Ids and times differ between any two responses, the fingerprint between any two servers."""
    return _VARYING.sub(b"*", data)


PATHS = {
    "/v1/chat/completions": chat(seed=1),
    "/v1/completions": {"model": "m", "prompt": "Once upon", "max_tokens": 8, "seed": 1},
    "/v1/embeddings": {"model": "m", "input": "Hello"},
    "/tokenize": {"model": "m", "prompt": "Hello"},
    "/v1/responses": {"model": "m", "input": "Hello", "max_output_tokens": 8},
    "/v1/messages": chat(),
}


@pytest.mark.parametrize("path", PATHS)
def test_json_response_is_byte_for_byte_the_servers(router, mocks, path):
    direct = httpx.post(mocks[0].url + path, json=PATHS[path])
    routed = router.post(path, PATHS[path])
    assert routed.status_code == direct.status_code == 200
    assert masked(routed.content) == masked(direct.content)
    assert routed.headers["content-type"] == direct.headers["content-type"]
    assert routed.headers["x-vllm-router-attempts"] == "1"
    assert len(routed.headers.get_list("date")) == 1


@pytest.mark.parametrize("pieces", [1, 7, 200])
def test_stream_is_byte_for_byte_the_servers(router, pieces):
    """With chunks cut anywhere, even inside an event or a character."""
    payload = (DATA / "chat-stream.txt").read_bytes().split(b"\r\n\r\n", 1)[-1]
    payload = payload[payload.index(b"data:") : payload.index(b"[DONE]") + 8] + "é€".encode()
    size = len(payload) // pieces + 1
    chunks = [payload[start : start + size] for start in range(0, len(payload), size)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked"
    raw = base64.b64encode(head + b"\r\n\r\n" + framed + b"0\r\n\r\n").decode()
    with router.client() as client:
        answer = client.post(
            "/v1/chat/completions",
            json=chat(stream=True),
            headers={"x-mock-mode": "raw", "x-mock-raw": raw},
        )
    assert answer.status_code == 200
    assert answer.content == payload


def test_openai_sdk_sync_works(router):
    with openai.OpenAI(base_url=router.url + "/v1", api_key="none", max_retries=0) as client:
        plain = client.chat.completions.create(**chat(seed=3))
        pieces = client.chat.completions.create(**chat(seed=3), stream=True)
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert plain.choices[0].message.content == streamed != ""
        assert [model.id for model in client.models.list()] == ["m"]


def test_openai_sdk_async_works(router):
    async def converse() -> None:
        async with openai.AsyncOpenAI(
            base_url=router.url + "/v1", api_key="none", max_retries=0
        ) as client:
            plain = await client.chat.completions.create(**chat(seed=4))
            pieces = await client.chat.completions.create(**chat(seed=4), stream=True)
            streamed = "".join([piece.choices[0].delta.content or "" async for piece in pieces])
            assert plain.choices[0].message.content == streamed != ""

    asyncio.run(converse())  # the SDK leaves async generators open, which Trio complains about


def test_stream_first_event_arrives_before_second_is_sent(router, mocks):
    """The second token takes an hour."""
    with (
        router.client() as client,
        client.stream(
            "POST",
            "/v1/chat/completions",
            json=chat(stream=True, max_tokens=4),
            headers={"x-mock-delay-ms": "3600000"},
        ) as answer,
    ):
        tokens = (line for line in answer.iter_lines() if '"content":"' in line)
        assert next(tokens).startswith("data: {")
        assert sum(mock.stats()["running"] for mock in mocks) == 1
    until(lambda: sum(mock.stats()["running"] for mock in mocks) == 0, "the end of the response")


def test_request_bytes_and_headers_reach_server_unchanged(router, mocks):
    for mock in mocks:
        mock.reset()
    body = (
        b'{ "model" : "m",  "messages":[{"role":"user","content":"\\u00e9 \xc3\xa9"}] , "x":1e3 }'
    )
    with router.client() as client:
        answer = client.post(
            "/v1/chat/completions?a=1&b=%20",
            content=body,
            headers={
                "content-type": "application/json",
                "x-custom": "Kept As Is",
                "authorization": "Bearer client-key",
                "connection": "keep-alive, x-hop",
                "x-hop": "dropped",
                "x-request-id": "abc-1",
            },
        )
    assert answer.status_code == 200
    seen = next(entry for mock in mocks for entry in mock.log("/v1/chat/completions"))
    headers = {name.lower(): value for name, value in seen["headers"]}
    assert seen["body"].encode() == body
    assert seen["path"] == "/v1/chat/completions?a=1&b=%20"
    assert headers["x-custom"] == "Kept As Is"
    assert headers["authorization"] == "Bearer client-key"
    assert headers["x-request-id"] == answer.headers["x-request-id"] == "abc-1"
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["via"] == "1.1 vllm-router"
    assert "x-hop" not in headers


def test_multipart_audio_is_routed_by_model(router):
    answer = httpx.post(
        router.url + "/v1/audio/transcriptions",
        data={"model": "m"},
        files={"file": ("a.wav", b"RIFF" + bytes(1000), "audio/wav")},
    )
    assert answer.status_code == 200
    refused = httpx.post(
        router.url + "/v1/audio/transcriptions",
        data={"model": "other"},
        files={"file": ("a.wav", b"RIFF", "audio/wav")},
    )
    assert refused.status_code == 404


def test_body_large_passes_and_larger_is_refused(router):
    answer = router.post("/v1/chat/completions", chat(text="x" * 20_000_000))
    assert answer.status_code in (200, 400)  # the server's own context length
    assert "x-vllm-router-error" not in answer.headers
    with router.client() as client:
        refused = client.post("/v1/chat/completions", content=b"x" * 64_000_001)
    assert refused.status_code == 413
    assert refused.headers["x-vllm-router-error"] == "body_too_large"


def test_models_unknown_is_404_naming_known_ones(router):
    answer = router.post("/v1/chat/completions", chat(model="nope"))
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert "m" in error["message"].split("Available models: ")[1]


def test_models_keep_fields_of_engine(router, mocks):
    [card] = router.get("/v1/models").json()["data"]
    [direct] = httpx.get(mocks[0].url + "/v1/models").json()["data"]
    assert card.keys() == direct.keys()
    assert card["max_model_len"] == direct["max_model_len"]


def test_engine_control_is_closed_by_default(router, mocks):
    for path in ("/sleep", "/v1/load_lora_adapter", "/collective_rpc", "/reset_prefix_cache"):
        answer = router.post(path, {})
        assert answer.status_code == 403, path
        assert answer.headers["x-vllm-router-error"] == "engine_control_closed"
    assert all(entry["path"] != "/sleep" for mock in mocks for entry in mock.log())


def test_client_errors_pass_in_engines_words(router, mocks):
    body = {"model": "m", "messages": "x"}
    direct = httpx.post(mocks[0].url + "/v1/chat/completions", json=body)
    routed = router.post("/v1/chat/completions", body)
    assert routed.status_code == direct.status_code == 400
    assert json.loads(routed.content) == json.loads(direct.content)
