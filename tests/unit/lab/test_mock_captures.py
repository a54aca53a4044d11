"""The simulated server answers like the captured real one: status, headers, fields, framing."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from support.mock_memory import Answer, running_mock
from support.vllm_captures import DATA, capture, header_names, names, shape, shapes


async def ask(name: str, **options: Any) -> tuple[Answer, Answer]:
    real = capture(name)
    async with running_mock(max_model_len=2048, **options) as mock:
        client = await mock.client()
        json_kind = "noheaderct" not in name
        kind = "application/json" if json_kind else "application/x-www-form-urlencoded"
        headers = [f"content-type: {kind}"] if real.method == "POST" and not real.body else []
        body = (real.body or "").encode()
        ours = await client.ask(real.method, real.path, body, *headers, kind=kind)
        await client.aclose()
        return ours, real.answer


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
        "count-tokens",
        "encoded-slash",
        "invocations-chat-stream",
        "invocations-completion",
        *names("zero-*"),
    ],
)
async def test_mock_answers_have_captured_fields_in_order(name, autojump_clock):
    ours, real = await ask(name)
    assert (ours.status, header_names(ours)) == (real.status, header_names(real))
    assert ours["content-type"] == real["content-type"]
    assert shapes(ours) == shapes(real)


@pytest.mark.parametrize("name", names("err-*"))
async def test_mock_errors_equal_captured_ones(name, autojump_clock):
    ours, real = await ask(name)
    assert (ours.status, header_names(ours)) == (real.status, header_names(real))
    assert ours.body == real.body
    assert ours["allow"] == real["allow"]


@pytest.mark.parametrize(
    "name",
    [
        "chat-noheaderct",
        "get-version",
        "get-load",
        "get-health",
        "get-invocations",
        "invocations-nothing-fits",
        "scale-out-disabled",
        "pause",
        "pause-bad-mode",
        "resume",
        "abort-requests-no-body",
    ],
)
async def test_mock_small_answers_equal_captured_ones(name, autojump_clock):
    ours, real = await ask(name)
    assert (ours.status, header_names(ours)) == (real.status, header_names(real))
    assert ours.body == real.body.strip()


@pytest.mark.parametrize(
    "name", ["chat-stream", "completion-stream-usage", "chat-stream-continuous"]
)
async def test_mock_stream_has_captured_number_of_events_one_per_chunk(name, autojump_clock):
    ours, real = await ask(name)
    assert len(ours.events) == len(real.events)
    assert [chunk.endswith(b"\n\n") for chunk in ours.chunks] == [True] * len(ours.events)


async def test_mock_usage_has_cached_tokens_like_captured_server(autojump_clock):
    real = capture("prefix-cache-2").answer.json["usage"]
    prompt = "hello world the of and " * 55
    async with running_mock(enable_prompt_tokens_details=True, block_size=32) as mock:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 2}
        first = (await mock.ask("POST", "/v1/completions", body)).json["usage"]
        again = (await mock.ask("POST", "/v1/completions", body)).json["usage"]
    assert (real["prompt_tokens"], first["prompt_tokens"]) == (316, 317)
    assert first["prompt_tokens_details"]["created_cache_tokens"] == 288
    assert again["prompt_tokens_details"] == real["prompt_tokens_details"]
    assert shape(again) == shape(real)


async def test_mock_metrics_have_captured_names_and_labels(autojump_clock):
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


async def test_mock_http_10_gets_chunked_answer_like_uvicorn(autojump_clock):
    real = capture("http10").answer
    body = b'{"model":"tiny","prompt":"a","max_tokens":2,"stream":true}'
    head = b"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: %d"
    async with running_mock() as mock:
        client = await mock.client()
        await client.stream.send_all(head % len(body) + b"\r\n\r\n" + body)
        answer = await client.rest(await client.head())
        assert header_names(answer) == header_names(real)
        assert await client.everything() == b""


def test_captures_are_read_as_intended():
    real = capture("chat-stream")
    assert (real.method, real.path, real.end) == ("POST", "/v1/chat/completions", 0)
    assert json.loads(real.body)["stream"] is True
    assert real.answer.events[-1] == "[DONE]"
