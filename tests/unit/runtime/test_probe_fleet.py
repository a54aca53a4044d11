"""`check-config --probe`: responses of servers are bounded and escaped before they are shown."""

from __future__ import annotations

import gzip
from typing import Any

import pytest
import trio

from support.fleet_makers import make_config
from support.scripted_server import ScriptedServer, Talk, answer, ok, silent
from vllm_router.cli.server_check import (
    SHOWN_VERSION,
    ServerReport,
    capacity_hint,
    missing_models,
    probe_fleet,
)

MODELS = ok(b'{"data": [{"id": "m", "max_model_len": 7}]}')


async def probed(pages: dict[bytes, bytes], **server: Any) -> ServerReport:
    """The report on a server with these responses, and an empty page for other paths.

    `server` is its configuration. With a key, `/v1/models` without it has the page `keyless`.
    """

    async def script(talk: Talk) -> None:
        while True:
            request = await talk.request()
            path = request.line.split()[1]
            if path == b"/v1/models" and request[b"authorization"] is None and "api_key" in server:
                path = b"keyless"
            page = pages.get(path, ok(b""))
            if not page:
                return
            await talk.send(page)

    async with trio.open_nursery() as nursery:
        scripted = ScriptedServer(nursery, script)
        port = await nursery.start(scripted.listen)
        one = {"url": f"http://127.0.0.1:{port}", **server}
        config = make_config([one], health_check_timeout=30)
        [report] = await probe_fleet(config)
        nursery.cancel_scope.cancel()
    return report


async def test_probe_fleet_odd_names_are_dropped_and_reported():
    page = b'{"data": [{"id": "m", "max_model_len": 7}, {"id": "\\ud800"}, {"id": "a\\u001b[2J"}]}'
    report = await probed({b"/v1/models": ok(page), b"/version": ok(b'{"version": "1\\n2"}')})
    assert report.models == {"m": 7}
    assert report.version == ""
    [problem] = report.problems
    assert "characters that cannot be printed" in problem
    assert problem.isprintable()


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (ok(gzip.compress(bytes(50_000_000), 1), b"content-encoding: gzip"), "it is longer than"),
        (ok(b"[" * 100_000), "cannot be used"),
        (ok(b"<html>"), "it is not JSON"),
    ],
    ids=["bomb", "nested", "html"],
)
async def test_probe_fleet_unusable_list_is_a_problem(page, words):
    report = await probed({b"/v1/models": page, b"/metrics": page})
    assert report.models is None
    assert any(words in problem for problem in report.problems)


async def test_probe_fleet_healthy_server_is_described():
    page = (
        b'vllm:num_requests_running 1\nvllm:num_requests_waiting{a="b"} 0\n'
        b"vllm:gpu_cache_usage_perc 0.5\nvllm:other 1\n"
    )
    version = b'{"version": "%b"}' % (b"1" * 100)
    report = await probed(
        {b"/v1/models": MODELS, b"/metrics": ok(page), b"/version": ok(version)}, name="gpu"
    )
    assert (report.name, report.health, report.problems) == ("gpu", "ok", [])
    assert report.health_seconds is not None
    assert report.metrics == ("running", "waiting", "kv")
    assert report.version == "1" * SHOWN_VERSION
    assert (report.key, report.hint) == ("none", "")


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_probe_fleet_server_without_health_page_is_judged_by_its_models(status):
    missing = answer(status, b"")
    report = await probed({b"/health": missing, b"/v1/models": MODELS})
    assert (report.health, report.problems, report.models) == ("ok", [], {"m": 7})
    report = await probed({b"/health": missing, b"/v1/models": answer(500, b"")})
    assert report.health == "answered 500"
    assert report.problems == ["/health answered 500", "/v1/models answered 500"]


async def test_probe_fleet_closed_connection_ends_the_checks_of_a_server():
    report = await probed({b"/health": b""})
    assert report.health_seconds is None
    assert report.problems == [f"/health: {report.health}"]
    report = await probed({b"/v1/models": b""})
    assert report.health == "ok"
    (problem,) = report.problems
    assert problem.startswith("/v1/models: ")


async def test_probe_fleet_silent_server_has_a_time_limit():
    async with trio.open_nursery() as nursery:
        server = ScriptedServer(nursery, silent)
        port = await nursery.start(server.listen)
        one = {"url": f"http://127.0.0.1:{port}"}
        [report] = await probe_fleet(make_config([one], health_check_timeout=0.05))
        nursery.cancel_scope.cancel()
    assert report.problems == ["/health: no answer in 0.05 s"]


@pytest.mark.parametrize(
    ("models", "keyless", "server", "key", "problems"),
    [
        (MODELS, answer(401, b""), {"api_key": "k"}, "accepted", []),
        (MODELS, MODELS, {"api_key": "k"}, "not needed", []),
        (
            answer(401, b""),
            MODELS,
            {"api_key": "k"},
            "refused",
            ["/v1/models answered 401: key refused"],
        ),
        (answer(403, b""), MODELS, {}, "missing", ["/v1/models answered 403: key missing"]),
        (answer(403, b""), MODELS, {"models": ["m"]}, "missing", []),
        (
            answer(403, b""),
            MODELS,
            {"models": ["m"], "api_key": "k"},
            "refused",
            ["/v1/models answered 403: key refused"],
        ),
    ],
    ids=["accepted", "not needed", "refused", "missing", "missing, models known", "refused, too"],
)
async def test_probe_fleet_key_is_judged_by_the_model_list(models, keyless, server, key, problems):
    report = await probed({b"/v1/models": models, b"keyless": keyless}, **server)
    assert (report.key, report.problems) == (key, problems)


@pytest.mark.parametrize(
    ("running", "waiting", "said", "hint"),
    [
        (
            8,
            3,
            None,
            "is full with 8 running and 3 waiting; max_concurrent_requests is not set, 8 would fit",
        ),
        (
            8,
            3,
            16,
            "is full with 8 running and 3 waiting; max_concurrent_requests says 16, 8 would fit",
        ),
        (8, 3, 8, ""),
        (
            8,
            0,
            4,
            (
                "runs 8 requests without a queue; max_concurrent_requests says 4: "
                "raise it, or leave it out to have it learnt"
            ),
        ),
        (8, 0, 8, ""),
        (8, 0, None, ""),
        (0, 3, None, ""),
    ],
)
def test_capacity_hint_compares_gauges_with_the_configured_capacity(running, waiting, said, hint):
    one = {"url": "http://a", **({"max_concurrent_requests": said} if said else {})}
    (server,) = make_config([one]).servers
    page = b"vllm:num_requests_running %d\nvllm:num_requests_waiting %d\n" % (running, waiting)
    assert capacity_hint(server, page) == hint
    assert capacity_hint(server, b"x" * 1_000_000) == ""


def test_missing_models_are_known_only_if_all_lists_are():
    tables = '[models]\nchat = "big"\n'
    config = make_config(
        [{"url": "http://a"}, {"url": "http://b", "models": ["small"]}], tables=tables
    )
    reports = [ServerReport(server.name, server.url) for server in config.servers]
    assert missing_models(config, reports) == []
    reports[0].models = {"tiny": None}
    assert missing_models(config, reports) == ["models.chat: no server has 'big'"]
    reports[0].models = {"big": None}
    assert missing_models(config, reports) == []
