"""The simulated server answers as the captured real one: status, headers, fields, framing."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from mock_memory import Answer, running_mock

DATA = Path(__file__).parent / "data" / "vllm"
# On top of vLLM's own: who answered.
OURS = {"x-mock-server"}


def capture(name: str) -> tuple[str, str, str | None, Answer]:
    """Method, path, body and the real answer; without the curl trailer."""
    text = (DATA / f"{name}.txt").read_text()
    text = text.split("\n# curl rc=")[0]
    request, head, body = re.fullmatch(r"# ([^\n]*)\n(.*?)\n\n(.*)", text, re.DOTALL).groups()
    given = re.search(r" -d (.*)$", request)
    method = request.split()[0] if request.startswith("GET ") else "GET"
    path = re.search(r"/\S*", request)[0]
    answer = Answer(head.replace("\n", "\r\n").encode())
    answer.body = body.encode()
    return "POST" if given or " -X POST" in request else method, path, given and given[1], answer


def shape(value: Any) -> Any:
    """Field names in order, and kinds of values."""
    if isinstance(value, dict):
        return [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def shapes(answer: Answer) -> list[Any]:
    """Of the events, neighbours of one shape being one; or of the whole body."""
    if answer["content-type"].startswith("text/event-stream"):
        found = [shape(event) for event in answer.events]
    else:
        found = [shape(answer.json)]
    return [key for key, _ in groupby(found)]


def header_names(answer: Answer) -> list[str]:
    # --enable-request-id-headers was on for some captures only.
    return [name for name, _ in answer.headers if name not in OURS | {"x-request-id"}]


async def ask(name: str, **options: Any) -> tuple[Answer, Answer]:
    method, path, body, real = capture(name)
    async with running_mock(max_model_len=2048, **options) as mock:
        client = await mock.client()
        json_kind = "noheaderct" not in name
        kind = "application/json" if json_kind else "application/x-www-form-urlencoded"
        headers = [f"content-type: {kind}"] if method == "POST" and not body else []
        ours = await client.ask(method, path, (body or "").encode(), *headers, kind=kind)
        await client.aclose()
        return ours, real


@pytest.mark.parametrize(
    "name",
    [
        "chat",
        "chat-stream",
        "chat-stream-continuous",
        "completion",
        "completion-stream",
        "completion-stream-usage",
        "messages",
        "messages-stream",
        "responses",
        "responses-stream",
        "get-v1_models",
        "tokenize",
    ],
)
async def test_answers_have_the_captured_fields_in_the_captured_order(name, autojump_clock):
    ours, real = await ask(name)
    assert (ours.status, header_names(ours)) == (real.status, header_names(real))
    assert ours["content-type"] == real["content-type"]
    assert shapes(ours) == shapes(real)


@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("err-*.txt")))
async def test_errors_are_the_captured_ones_to_the_letter(name, autojump_clock):
    ours, real = await ask(name)
    assert (ours.status, header_names(ours)) == (real.status, header_names(real))
    assert ours.body == real.body
    assert ours["allow"] == real["allow"]


@pytest.mark.parametrize("name", ["chat-noheaderct", "get-version", "get-load", "get-health"])
async def test_small_answers_are_the_captured_ones_to_the_letter(name, autojump_clock):
    ours, real = await ask(name)
    assert (ours.status, header_names(ours)) == (real.status, header_names(real))
    assert ours.body == real.body.strip()


@pytest.mark.parametrize(
    "name", ["chat-stream", "completion-stream-usage", "chat-stream-continuous"]
)
async def test_a_stream_has_as_many_events_as_the_captured_one_each_in_its_own_chunk(
    name, autojump_clock
):
    ours, real = await ask(name)
    assert len(ours.events) == len(real.events)
    assert [chunk.endswith(b"\n\n") for chunk in ours.chunks] == [True] * len(ours.events)


async def test_usage_tells_cached_tokens_where_the_captured_server_does(autojump_clock):
    real = capture("prefix-cache-2")[3].json["usage"]
    prompt = "hello world the of and " * 55
    async with running_mock(enable_prompt_tokens_details=True, block_size=32) as mock:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 2}
        first = (await mock.ask("POST", "/v1/completions", body)).json["usage"]
        again = (await mock.ask("POST", "/v1/completions", body)).json["usage"]
    assert (real["prompt_tokens"], first["prompt_tokens"]) == (316, 317)
    assert first["prompt_tokens_details"]["created_cache_tokens"] == 288
    assert again["prompt_tokens_details"] == real["prompt_tokens_details"]
    assert shape(again) == shape(real)


async def test_metrics_have_the_captured_names_and_labels(autojump_clock):
    def names(text: str) -> set[str]:
        return {line.rsplit(" ", 1)[0] for line in text.splitlines() if line.startswith("vllm:")}

    async with running_mock() as mock:
        ours = names((await mock.ask("GET", "/metrics")).body.decode())
    real = names((DATA / "metrics-loaded-samples.txt").read_text())
    plain = {
        name for name in ours if not re.search(r"_bucket\{|_created\{|_sum\{|cache_config", name)
    }
    assert plain <= real
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_count",
        "vllm:e2e_request_latency_seconds_count",
    ):
        assert f'{name}{{engine="0",model_name="tiny"}}' in plain
    assert any(name.startswith('vllm:engine_sleep_state{engine="0"') for name in plain)
    assert any(name.startswith("vllm:num_requests_waiting_by_reason{") for name in plain)
    assert any(name.startswith("vllm:admission_rejections_total{") for name in plain)


async def test_http_10_gets_the_chunked_answer_that_uvicorn_gives(autojump_clock):
    real = capture("http10")[3]
    body = b'{"model":"tiny","prompt":"a","max_tokens":2,"stream":true}'
    head = b"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: %d"
    async with running_mock() as mock:
        client = await mock.client()
        await client.stream.send_all(head % len(body) + b"\r\n\r\n" + body)
        answer = await client.rest(await client.head())
        assert header_names(answer) == header_names(real)
        assert await client.everything() == b""


def test_the_captures_are_read_as_meant():
    method, path, body, real = capture("chat-stream")
    assert (method, path) == ("POST", "/v1/chat/completions")
    assert json.loads(body)["stream"] is True
    assert real.events[-1] == "[DONE]"
