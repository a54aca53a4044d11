"""All four APIs, streamed and plain, on real processes.

A server that stops with a queue, aborts with tokens, and client errors that are found inside a
stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from support.api_clients import ENDS, KINDS, PATHS, ask, body
from support.mock_process import MockProcess, mock_processes
from support.router_process import router_process, servers_toml, until

FATES = ("abort", "error", "silence")
LONG = 100_000
REPLACED = b": vllm-router: another server answers"
WELL = ("--model", "tiny", "--ttft", "0.02", "--token-delay", "0.01", "--max-model-len", "200000")
MOCK = (*WELL, "--max-num-seqs", "1")


@contextlib.contextmanager
def full(mock: MockProcess) -> Iterator[None]:
    """Its only slot is taken by a direct request, so that later requests wait."""
    asked = body("completions", LONG, stream=True)
    with (
        httpx.Client(timeout=60) as client,
        client.stream(
            "POST", f"{mock.url}/v1/completions", json=asked, headers={"x-mock-delay-ms": "100"}
        ) as answer,
    ):
        pieces = answer.iter_raw()  # keep a reference: its destructor would close the connection
        next(pieces)
        yield
        del pieces


def has_queue(mock: MockProcess) -> bool:
    return bool(mock.stats()["waiting"] >= 3)


def test_stopping_server_queue_is_answered_by_others(tmp_path: Path):
    """In every shutdown mode of vLLM: ends without a token, errors, silence."""
    with contextlib.ExitStack() as stack:
        stopping = [
            stack.enter_context(mock_processes(1, *MOCK, "--sigterm", fate))[0] for fate in FATES
        ]
        [well] = stack.enter_context(mock_processes(1, *WELL))
        urls = [mock.url for mock in (*stopping, well)]
        router = stack.enter_context(
            router_process(servers_toml(urls, capacity=64, policy="round_robin"), tmp_path)
        )
        pool = stack.enter_context(ThreadPoolExecutor(32))
        for mock in stopping:
            stack.enter_context(full(mock))
            asked = [
                pool.submit(ask, router.url, api, 5, stream=stream, text=f"{api} {number}")
                for number in range(2)
                for api, stream in KINDS
            ]
            until(partial(has_queue, mock), "a queue")
            mock.terminate()
            answers = [future.result(timeout=60) for future in asked]
            for got in answers:
                assert (got.status, got.whole, got.error) == (200, True, ""), got
                # After 2 s the client has the head of the first server.
                replaced = REPLACED in got.body
                assert replaced or got.headers["x-mock-server"] != mock.name
                assert len(got.text.split()) == 5
                assert not got.aborted
                assert not got.stream or got.body.count(ENDS[got.api]) == 1
            assert any(
                got.headers["x-vllm-router-attempts"] == "2" or REPLACED in got.body
                for got in answers
            )
            # Successful responses pay the retry budget back.
            paid = [pool.submit(ask, router.url, "chat", 1, stream=False) for _ in range(30)]
            assert all(future.result(timeout=60).status == 200 for future in paid)


def test_abort_with_tokens_passes_uncounted(tmp_path: Path):
    with (
        mock_processes(2, *MOCK) as mocks,
        router_process(servers_toml(mock.url for mock in mocks), tmp_path) as router,
    ):
        for mock in mocks:
            mock.set(mode="abort_finish", after=4)
        for api, stream in KINDS:
            got = ask(router.url, api, 50, stream=stream)
            assert (got.status, got.whole) == (200, True), got
            assert len(got.text.split()) == 4
            assert got.headers["x-vllm-router-attempts"] == "1"
            assert got.aborted == (api != "responses")
        assert {each["state"] for each in router.servers().values()} == {"up"}
        assert sum(mock.stats()["total"] for mock in mocks) == len(KINDS)


SCHEMA = {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}
LATE_MISTAKES: dict[str, dict[str, Any]] = {
    "chat": {"stop_token_ids": [99_999_999]},
    "completions": {"logit_bias": {"99999999": 1}},
    "responses": {"stop_token_ids": [99_999_999]},
    "messages": {"output_config": SCHEMA},
}


def test_stream_client_error_takes_no_server_out(tmp_path: Path):
    """In a Responses stream it looks like a crashing server, on every server."""
    with (
        mock_processes(2, *WELL) as mocks,
        router_process(servers_toml(mock.url for mock in mocks), tmp_path) as router,
        router.client() as client,
    ):
        for number in range(8):
            for api, wrong in LATE_MISTAKES.items():
                asked = body(api, 5, stream=True, text=f"{number}") | wrong
                answer = client.post(PATHS[api], json=asked)
                assert (answer.status_code == 502) == (api == "responses"), answer.text
                assert "error" in answer.text
            assert {each["state"] for each in router.servers().values()} == {"up"}
        for api, stream in KINDS:
            assert ask(router.url, api, 5, stream=stream).text
