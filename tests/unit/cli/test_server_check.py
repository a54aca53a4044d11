"""`check-config --probe`: what is reported of servers that answer in every way."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
import trio

from support.fleet_makers import make_config
from vllm_router.cli import server_check
from vllm_router.cli.server_check import ServerReport, probe_fleet

Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]

MODELS = {"data": [{"id": "m", "max_model_len": 4096}, {"id": "lora", "parent": "m"}]}
METRICS = (
    b'vllm:num_requests_running{model_name="m"} 3\n'
    b'vllm:num_requests_waiting{model_name="m"} 2\n'
    b'vllm:kv_cache_usage_perc{model_name="m"} 0.5\n'
)


class Engine:
    """The answers of a server by path: a status, JSON or bytes, or an error to raise."""

    def __init__(self, key: str | None = None, **answers: Any) -> None:
        self.key = key
        self.requests: list[tuple[str, str | None]] = []
        self.answers: dict[str, Any] = {
            "/health": 200,
            "/v1/models": MODELS,
            "/metrics": METRICS,
            "/version": {"version": "0.32.0"},
        } | {f"/{name.replace('_', '/')}": answer for name, answer in answers.items()}

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        key = request.headers.get("authorization")
        self.requests.append((request.url.path, key))
        answer = self.answers[request.url.path]
        if request.url.path.startswith("/v1") and self.key is not None and key != self.key:
            return httpx.Response(401)
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            await trio.sleep_forever()
        if isinstance(answer, int):
            return httpx.Response(answer)
        return httpx.Response(
            200, content=answer if isinstance(answer, bytes) else json.dumps(answer)
        )


class Transport(httpx.MockTransport):
    doing: str | None = None


async def check(monkeypatch: pytest.MonkeyPatch, engine: Engine, **server: Any) -> ServerReport:
    monkeypatch.setattr(server_check, "HttpxTransport", lambda pool: Transport(engine))
    config = make_config(
        [{"url": "http://a.test:1", "name": "a", **server}], health_check_timeout=2
    )
    (report,) = await probe_fleet(config)
    return report


async def test_server_check_good_server_has_no_problem(autojump_clock, monkeypatch):
    engine = Engine()
    report = await check(monkeypatch, engine)
    assert (report.problems, report.health, report.key) == ([], "ok", "none")
    assert report.models == {"m": 4096, "lora": None}
    assert report.metrics == ("running", "waiting", "kv")
    assert report.version == "0.32.0"
    assert report.hint.startswith("is full with 3 running and 2 waiting")
    assert engine.requests == [
        (path, None) for path in ("/health", "/v1/models", "/metrics", "/version")
    ]


@pytest.mark.parametrize(("needed", "key"), [("Bearer s3cret", "accepted"), (None, "not needed")])
async def test_server_check_key_is_tried_with_and_without(
    autojump_clock, monkeypatch, needed: str | None, key: str
):
    engine = Engine(key=needed)
    report = await check(monkeypatch, engine, api_key="s3cret")
    assert (report.key, report.problems) == (key, [])
    assert engine.requests.count(("/v1/models", None)) == 1
    assert engine.requests.count(("/v1/models", "Bearer s3cret")) == 1


@pytest.mark.parametrize(
    ("settings", "key", "configured"),
    [
        ({"api_key": "wrong"}, "refused", False),
        ({"api_key": "wrong"}, "refused", True),
        ({}, "missing", False),
        ({}, "missing", True),
    ],
)
async def test_server_check_refused_key_is_a_problem_but_for_configured_models_without_key(
    autojump_clock, monkeypatch, settings: dict[str, Any], key: str, configured: bool
):
    models = {"models": ["m"]} if configured else {}
    report = await check(monkeypatch, Engine(key="Bearer s3cret"), **settings, **models)
    assert report.key == key
    expected = [] if configured and not settings else [f"/v1/models answered 401: key {key}"]
    assert report.problems == expected
    assert report.models is None


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_server_check_without_health_uses_model_list(autojump_clock, monkeypatch, status):
    report = await check(monkeypatch, Engine(health=status))
    assert (report.health, report.problems) == ("ok", [])


async def test_server_check_failing_health_is_a_problem_beside_the_list(
    autojump_clock, monkeypatch
):
    report = await check(monkeypatch, Engine(health=503))
    assert (report.health, report.problems) == ("answered 503", ["/health answered 503"])
    assert report.models is not None


async def test_server_check_unreachable_server_is_not_asked_for_metrics(
    autojump_clock, monkeypatch
):
    engine = Engine(health=httpx.ConnectError("connection refused"))
    report = await check(monkeypatch, engine)
    assert report.problems == [f"/health: {report.health}"]
    assert "connection refused" in report.health
    assert report.health_seconds is None
    assert [path for path, _ in engine.requests] == ["/health", "/v1/models"]


@pytest.mark.parametrize(("doing", "waited_for"), [(None, "answer"), ("connection", "connection")])
async def test_server_check_silent_server_gets_the_time_of_a_health_check(
    autojump_clock, monkeypatch, doing: str | None, waited_for: str
):
    monkeypatch.setattr(Transport, "doing", doing)
    began = trio.current_time()
    report = await check(monkeypatch, Engine(health=None))
    assert report.problems == [f"/health: no {waited_for} in 2 s"]
    assert trio.current_time() - began == 2


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (500, "/v1/models answered 500"),
        (httpx.ReadError("reset"), "/v1/models: "),
        (b"<html>", "/v1/models cannot be used: "),
        ({"data": [{"id": "m"}, {"name": "odd"}]}, "/v1/models: "),
        (b"[" * 1000, "/v1/models cannot be used: "),
    ],
)
@pytest.mark.parametrize("configured", [False, True])
async def test_server_check_unusable_list_is_a_problem_unless_models_are_configured(
    autojump_clock, monkeypatch, answer: Any, problem: str, configured: bool
):
    models = {"models": ["m"]} if configured else {}
    report = await check(monkeypatch, Engine(v1_models=answer), **models)
    if configured:
        assert report.problems == []
    else:
        assert len(report.problems) == 1
        assert report.problems[0].startswith(problem)


@pytest.mark.parametrize(
    ("metrics", "version", "shown"),
    [
        (404, 404, ""),
        (b"no metrics", {"version": 7}, ""),
        (b"\xff\xfe", {"version": "\x1b[31mred"}, ""),
        (b"", {"version": "9" * 100}, "9" * server_check.SHOWN_VERSION),
        (b"", b"[" * 100_000, ""),
    ],
)
async def test_server_check_odd_metrics_and_versions_are_left_out(
    autojump_clock, monkeypatch, metrics: Any, version: Any, shown: str
):
    report = await check(monkeypatch, Engine(metrics=metrics, version=version))
    assert (report.metrics, report.hint, report.version) == ((), "", shown)
    assert report.problems == []
