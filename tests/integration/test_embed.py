"""The router as a part of a Trio program."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

import vllm_router
from support.docs import code_block
from vllm_router import ConfigError, RunningRouter, load_config, parse_config, run_app, serve
from vllm_router.lab.mock import MockOptions, serve_mock

ROOT = Path(__file__).parents[2]
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "Hello!"}],
    "max_tokens": 2,
}


@pytest.fixture
async def config(nursery: trio.Nursery) -> AsyncIterator[vllm_router.Config]:
    host, port = await nursery.start(serve_mock, MockOptions(models=("m",)))
    yield parse_config(f'[[servers.servers]]\nurl = "http://{host}:{port}"\nmodels = ["m"]')
    nursery.cancel_scope.cancel()


async def chat(url: str, **more: Any) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        return await client.post(f"{url}/v1/chat/completions", json={**CHAT, **more})


async def test_serve_answers_until_stopped(config: vllm_router.Config):
    async with trio.open_nursery() as nursery:
        router: RunningRouter = await nursery.start(serve, config, "127.0.0.1", 0)
        answer = await chat(router.url)
        assert answer.status_code == 200
        await router.stop()
        with pytest.raises(httpx.ConnectError):
            await chat(router.url)


async def test_stop_lets_running_request_finish(config: vllm_router.Config):
    codes: list[int] = []
    async with trio.open_nursery() as nursery:
        router: RunningRouter = await nursery.start(serve, config, "127.0.0.1", 0)

        async def ask() -> None:
            codes.append((await chat(router.url, max_tokens=60)).status_code)

        nursery.start_soon(ask)
        async with httpx.AsyncClient(trust_env=False) as client:
            while not (await client.get(f"{router.url}/load-stats")).json()["servers"][0][
                "in_flight"
            ]:
                await trio.sleep(0.01)
        await router.stop()
    assert codes == [200]


async def test_serve_cancelled_frees_port(config: vllm_router.Config):
    for port in (0, 0):
        async with trio.open_nursery() as nursery:
            router: RunningRouter = await nursery.start(serve, config, "127.0.0.1", port)
            nursery.cancel_scope.cancel()
        assert router.url


async def test_serve_busy_port_raises_oserror(config: vllm_router.Config):
    async with trio.open_nursery() as nursery:
        router: RunningRouter = await nursery.start(serve, config, "127.0.0.1", 0)
        port = int(router.url.rpartition(":")[2])
        with pytest.raises(OSError, match="in use"):
            await serve(config, "127.0.0.1", port)
        await router.stop()


async def test_run_app_is_asgi_application(config: vllm_router.Config):
    async with trio.open_nursery() as nursery:
        app: Any = await nursery.start(run_app, config)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            answer = await client.post("/v1/chat/completions", json=CHAT, timeout=60)
            assert answer.status_code == 200
            assert (await client.get("/livez")).status_code == 200
        nursery.cancel_scope.cancel()


def test_config_functions_report_every_problem(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        parse_config("[config]\nmax_retries = -1")
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "missing.toml")
    (tmp_path / "servers.toml").write_text('servers.servers = [{ url = "http://${HOST}" }]')
    config = load_config(tmp_path / "servers.toml", {"HOST": "gpu"})
    assert config.servers[0].url == "http://gpu"


def test_unknown_name_is_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'server'"):
        vllm_router.server  # noqa: B018


def test_example_of_docs_runs(tmp_path: Path):
    (tmp_path / "servers.toml").write_text('servers.servers = [{ url = "http://127.0.0.1:9" }]')
    example = code_block(ROOT / "docs/embedding.md", "Serve in a nursery").replace(
        "trio.sleep(1)", "trio.sleep(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.startswith("the router is on http://127.0.0.1:")
