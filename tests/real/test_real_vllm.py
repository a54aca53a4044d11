"""The router in front of real vLLM servers.

    VLLM_LAB=/path/to/start.sh scripts/test -m real

How responses are compared: vLLM takes a response's `id` from X-Request-Id, so both sides get the
same one; `created` is the time in seconds and is masked. The number of tokens in an SSE event
depends on the engine's timing, so streams are compared byte for byte with the bytes that the server
sent for that very request (by a tap between router and server), and with a direct response by
content.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from real.lab import MODEL, RealServer, Tap, real_servers
from support.lazy_import import LazyImport
from support.router_process import router_process, servers_toml, until

openai = LazyImport("openai")

pytestmark = pytest.mark.real

PROMPT = [{"role": "user", "content": "hello, are you there? 你好 🌍"}]
SAMPLING: dict[str, Any] = {
    "model": MODEL,
    "messages": PROMPT,
    "seed": 7,
    "temperature": 0.7,
    "max_tokens": 24,
}
# vLLM's own parameters, which the SDK passes on unchanged.
EXACTLY = {"ignore_eos": True}


@pytest.fixture(scope="module")
def servers() -> Iterator[list[RealServer]]:
    with real_servers(2) as started:
        yield started


@contextlib.contextmanager
def router(servers: Iterable[RealServer | Tap], directory: Path, **settings: Any) -> Iterator[str]:
    """The URL of a router in front of these servers; also checks that it exits cleanly."""
    # Two cores that compute may keep a check waiting for a second.
    settings = {"health_check_timeout": 5.0, **settings}
    config = servers_toml([server.url for server in servers], capacity=8, **settings)
    with router_process(config, directory) as process:
        try:
            yield process.url
            assert process.stop() == 0
        finally:
            print(process.text)  # pytest shows it where a test failed


@pytest.fixture(scope="module")
def routed(servers: list[RealServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with router(servers, tmp_path_factory.mktemp("router")) as url:
        yield url


def sdk(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def async_sdk(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def masked(body: bytes) -> bytes:
    return re.sub(rb'"created":\d+', b'"created":0', body)


def content(chunks: Iterable[Any]) -> dict[str, Any]:
    """The content of a streamed chat response, however the engine split it into events."""
    chunks = list(chunks)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return {
        "id": {chunk.id for chunk in chunks},
        "model": {chunk.model for chunk in chunks},
        "role": [choice.delta.role for choice in choices if choice.delta.role],
        "text": "".join(choice.delta.content or "" for choice in choices),
        "finish_reason": [choice.finish_reason for choice in choices if choice.finish_reason],
        "usage": [chunk.usage.model_dump() for chunk in chunks if chunk.usage],
    }


def streamed(**more: Any) -> dict[str, Any]:
    return {**SAMPLING, "stream": True, "stream_options": {"include_usage": True}, **more}


def test_real_json_response_is_byte_for_byte_the_servers(servers: list[RealServer], routed: str):
    def answer(url: str) -> httpx.Response:
        headers = {"X-Request-Id": "the-same"}
        with sdk(url) as client:
            return client.chat.completions.with_raw_response.create(
                **SAMPLING, extra_headers=headers
            ).http_response

    direct, through = answer(servers[0].url), answer(routed)
    assert json.loads(direct.content)["choices"][0]["message"]["content"]
    assert masked(through.content) == masked(direct.content)
    for name in ("content-type", "content-length", "vary"):
        assert through.headers[name] == direct.headers[name]


def test_real_async_json_response_is_byte_for_byte_the_servers(
    servers: list[RealServer], routed: str
):
    async def answer(url: str) -> bytes:
        async with async_sdk(url) as client:
            raw = await client.chat.completions.with_raw_response.create(
                **SAMPLING, extra_headers={"X-Request-Id": "the-same-async"}
            )
            return raw.http_response.content

    direct, through = asyncio.run(answer(servers[1].url)), asyncio.run(answer(routed))
    assert masked(through) == masked(direct)


def test_real_stream_equals_direct_stream(servers: list[RealServer], routed: str):
    def answer(url: str) -> dict[str, Any]:
        with sdk(url) as client:
            return content(
                client.chat.completions.create(
                    **streamed(), extra_headers={"X-Request-Id": "the-same-stream"}
                )
            )

    direct, through = answer(servers[0].url), answer(routed)
    assert direct["finish_reason"]
    assert through == direct


def test_real_async_streams_reach_both_servers_whole(servers: list[RealServer], routed: str):
    before = [server.metric("vllm:request_success_total") for server in servers]

    async def answer(client: openai.AsyncOpenAI) -> dict[str, Any]:
        stream = await client.chat.completions.create(**streamed(), extra_body=EXACTLY)
        return content([chunk async for chunk in stream])

    async def answers() -> list[dict[str, Any]]:
        async with async_sdk(routed) as client:
            return await asyncio.gather(*(answer(client) for _ in range(12)))

    # Texts may differ here: sampling depends on the rest of the batch.
    for each in asyncio.run(answers()):
        assert each["finish_reason"] == ["length"]
        assert each["usage"][0]["completion_tokens"] == SAMPLING["max_tokens"]
    finished = [
        server.metric("vllm:request_success_total") - start
        for server, start in zip(servers, before, strict=True)
    ]
    assert sum(finished) == 12
    assert min(finished) >= 4


def test_real_completions_and_engine_errors_pass_unchanged(servers: list[RealServer], routed: str):
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"model": MODEL, "prompt": "one two", "max_tokens": 8, "seed": 1}),
        ("/v1/chat/completions", {**SAMPLING, "temperature": -1}),
        ("/v1/chat/completions", {**SAMPLING, "max_tokens": 100_000}),
        ("/tokenize", {"model": MODEL, "prompt": "one two"}),
        ("/v1/embeddings", {"model": MODEL, "input": "one two"}),
    ]
    headers = {"X-Request-Id": "unchanged"}
    with httpx.Client(timeout=60) as client:
        for path, body in requests:
            direct = client.post(f"{servers[0].url}{path}", json=body, headers=headers)
            through = client.post(f"{routed}{path}", json=body, headers=headers)
            assert through.status_code == direct.status_code, path
            assert masked(through.content) == masked(direct.content), path


def test_real_models_keep_fields_of_engine(servers: list[RealServer], routed: str):
    (direct,) = httpx.get(f"{servers[0].url}/v1/models").json()["data"]
    (through,) = httpx.get(f"{routed}/v1/models").json()["data"]
    volatile = {"created", "permission"}  # made anew for each response
    assert direct["max_model_len"] == 2048
    assert {k: v for k, v in through.items() if k not in volatile} == {
        k: v for k, v in direct.items() if k not in volatile
    }


def test_real_stream_is_byte_for_byte_and_unbuffered(servers: list[RealServer], tmp_path: Path):
    request_id = "tapped-stream"
    # Spaces, key order and escapes that a decoder and encoder would not reproduce.
    body = json.dumps(streamed(max_tokens=400, **EXACTLY), indent=1).encode() + b"\n"
    headers = {
        "X-Request-Id": request_id,
        "Content-Type": "application/json",
        "X-Of-The-Client": "kept",
        "Connection": "X-Of-This-Hop",
        "X-Of-This-Hop": "dropped",
    }
    with Tap(servers[0].port) as tap, router([tap], tmp_path) as url, httpx.Client() as client:
        with client.stream(
            "POST", f"{url}/v1/chat/completions", content=body, headers=headers, timeout=60
        ) as answer:
            raw = answer.iter_raw()
            received = next(raw)
            # The first bytes were here before the server had sent the end.
            assert not tap.exchange(request_id)[1].complete
            received += b"".join(raw)
        request, response = tap.exchange(request_id)

    assert request.body == body
    assert request.header(b"x-of-the-client") == b"kept"
    assert request.header(b"x-of-this-hop") is None
    assert response.complete
    assert received == response.body
    assert received.endswith(b"data: [DONE]\n\n")
    assert answer.headers["content-type"].encode() == response.header(b"content-type")


def test_real_client_disconnect_frees_engine(servers: list[RealServer], tmp_path: Path):
    server = servers[0]

    def running() -> float:
        return server.metric("vllm:num_requests_running")

    with router([server], tmp_path) as url, httpx.Client(timeout=60) as client:
        # 1900 tokens take it about 4 s.
        with client.stream(
            "POST", f"{url}/v1/chat/completions", json=streamed(max_tokens=1900, **EXACTLY)
        ) as answer:
            assert answer.status_code == 200
            generating = answer.iter_raw()
            next(generating)
            until(lambda: running() == 1, "the engine is generating", seconds=1.0)
        until(lambda: running() == 0, "the engine has stopped generating", seconds=1.0)


def test_real_vllm_bench_serve_completes_without_error(routed: str):
    home = Path.home() / ".cache" / "vllm-lab"
    vllm = Path(os.environ.get("VLLM_VENV", home / "venv")) / "bin" / "vllm"
    model = os.environ.get("VLLM_MODEL", str(home / "tinymodel"))
    shape = "--random-input-len 64 --random-output-len 64 --num-prompts 100 --max-concurrency 16"
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1"}
    result = subprocess.run(
        f"{vllm} bench serve --backend openai-chat --endpoint /v1/chat/completions"
        f" --base-url {routed} --model {MODEL} --tokenizer {model} --dataset-name random {shape}"
        " --ignore-eos --seed 1 --disable-tqdm".split(),
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    counts = dict(
        re.findall(
            r"(Successful requests|Failed requests|Total generated tokens):\s+(\d+)", result.stdout
        )
    )
    print(result.stdout)
    assert counts == {
        "Successful requests": "100",
        "Failed requests": "0",
        "Total generated tokens": "6400",
    }


def test_real_sigterm_of_one_server_fails_no_unstarted_response(
    servers: list[RealServer], tmp_path: Path
):
    """vLLM ends a SIGTERM mid-generation in three ways, one of them silence on an open connection.

    JSON responses are whole, from the other server; streams of the dying one end visibly truncated;
    later requests are served normally.
    """
    tokens = 1500
    bodies = [
        {**SAMPLING, **EXACTLY, "max_tokens": tokens, "seed": number, "stream": number % 2 == 0}
        for number in range(8)
    ]
    generating = threading.Semaphore(0)
    asked_of: list[str] = []

    def ask(body: dict[str, Any]) -> tuple[int, bytes]:
        received = b""
        with httpx.Client(timeout=60) as client:
            try:
                with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                    asked_of.append(answer.headers["x-vllm-router-server"])
                    for data in answer.iter_raw():
                        received += data
                        generating.release()
            except httpx.RemoteProtocolError:
                pass  # truncated, as the server stopped half-way
        return answer.status_code, received

    with router(servers, tmp_path, idle_timeout=5) as url:
        with ThreadPoolExecutor(len(bodies)) as pool:
            asked = [pool.submit(ask, body) for body in bodies]
            for _ in range(10):
                assert generating.acquire(timeout=30)
            # Only a stream can have begun, so at least one is broken.
            victim = next(server for server in servers if str(server.port) in asked_of[0])
            victim.terminate()
            try:
                answers = [future.result(timeout=60) for future in asked]
                broken = 0
                for body, (status, received) in zip(bodies, answers, strict=True):
                    assert status == 200, received
                    if not body["stream"]:
                        answer = json.loads(received)
                        assert answer["usage"]["completion_tokens"] == tokens
                        assert answer["choices"][0]["finish_reason"] == "length"
                    elif b'"finish_reason":"length"' not in received:
                        broken += 1
                        assert b'"finish_reason":"stop"' not in received
                        assert b'"finish_reason":"abort"' in received or b'{"error"' in received
                assert 1 <= broken <= 4

                with sdk(url) as client:
                    for number in range(20):
                        client.chat.completions.create(**{**SAMPLING, "seed": number})
            finally:
                victim.stop()
                victim.start()
                victim.wait()


def test_real_sigterm_with_grace_period_fails_no_response(
    servers: list[RealServer], tmp_path: Path
):
    """While it finishes its streams, `/health` is 200 and each new request gets a quick 500."""
    long = streamed(max_tokens=1500, **EXACTLY)
    short = {**SAMPLING, **EXACTLY, "max_tokens": 16}
    begun = threading.Semaphore(0)
    over = threading.Event()

    def stream() -> tuple[str, bytes]:
        received = b""
        with httpx.Client(timeout=60) as client:
            with client.stream("POST", f"{url}/v1/chat/completions", json=long) as answer:
                for data in answer.iter_raw():
                    received += data
                    begun.release()
        return answer.headers["x-vllm-router-server"], received

    def ask() -> list[tuple[str, int, int]]:
        """Server, status and attempts of each response."""
        seen = []
        with httpx.Client(timeout=60) as client:
            while not over.is_set():
                answer = client.post(f"{url}/v1/chat/completions", json=short)
                headers = answer.headers
                served_by = headers.get("x-vllm-router-server", "")
                seen.append((served_by, answer.status_code, int(headers["x-vllm-router-attempts"])))
        return seen

    with real_servers(1, "--shutdown-timeout", "20") as [patient]:
        with router([servers[0], patient], tmp_path) as url, ThreadPoolExecutor(8) as pool:
            streams = [pool.submit(stream) for _ in range(4)]
            for _ in range(20):
                assert begun.acquire(timeout=30)
            asking = [pool.submit(ask) for _ in range(4)]
            patient.terminate()
            try:
                ends = [future.result(timeout=60) for future in streams]
                until(lambda: not patient.runs, "its end", 30)
            finally:
                over.set()
            answers = [answer for future in asking for answer in future.result(timeout=60)]
    assert any(str(patient.port) in name for name, _ in ends)
    for _, received in ends:
        assert b'"finish_reason":"length"' in received
        assert received.endswith(b"data: [DONE]\n\n")
    assert {status for _, status, _ in answers} == {200}
    assert max(attempts for _, _, attempts in answers) == 2, "no request was refused by it"
